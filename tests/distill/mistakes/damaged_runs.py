"""Run folders to damage, and the damage."""

import json


def run_folder(place, name):
    (folder,) = place.joinpath("runs").glob(f"{name}-*")
    return folder


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def facts(**changes):
    def damage(folder):
        file = folder / "run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage
