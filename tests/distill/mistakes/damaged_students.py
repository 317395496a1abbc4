"""Damage to a student's folder: each function does it or gives one that does."""

import json
import os

import torch
from safetensors.torch import load_file, save_file

from tests.distill.mistakes.damaged_teachers import config

RAN = "ran"  # a file that code of a folder would leave where it runs


def entry(change):
    """Change the `distill` entry of config.json."""

    def damage(folder):
        file = folder / "config.json"
        entries = json.loads(file.read_text())
        change(entries["distill"])
        file.write_text(json.dumps(entries))

    return damage


def layout(**changes):
    return entry(lambda found: found["layout"].update(changes))


def mixer(**changes):
    return entry(lambda found: found["layout"]["mixers"]["M"].update(changes))


def attention(**changes):
    return entry(lambda found: found["attention"].update(changes))


def settings(**changes):
    return _changed("generation_config.json", changes)


def tokenizer(**changes):
    return _changed("tokenizer_config.json", changes)


def _changed(name, changes):
    def damage(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def vocabulary(change):
    def damage(folder):
        file = folder / "tokenizer.json"
        entries = json.loads(file.read_text())
        change(entries)
        file.write_text(json.dumps(entries))

    return damage


def program(folder):
    """A module that leaves a file where it is imported."""
    (folder / "evil.py").write_text(f"open({str(folder.parent / RAN)!r}, 'w')\n")


def code(folder):
    program(folder)
    config(model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(folder)


def code_of_the_tokenizer(folder):
    program(folder)
    tokenizer(auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")(folder)


def index_of(name):
    """An index in place of the weights that names one file for every tensor."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def linked(name):
    def damage(folder):
        (folder / name).unlink()
        (folder.parent / "secret").write_text("a: secret")
        (folder / name).symlink_to(folder.parent / "secret")

    return damage


def fifo(name):
    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def infinite(folder):
    """Finite weights whose products are not."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
