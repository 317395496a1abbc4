"""Exports at the end of a run, and exports by hand in their place."""

import json
from shlex import quote

import pytest

import distill
from distill.errors import UserError
from distill.evaluation.suites import EVALUATIONS
from distill.exporters.place import MARKER
from distill.recipe_file import check


def test_a_run_whose_export_is_not_proved(tiny_recipe, tmp_path, monkeypatch):
    """Its student and the rest of its end stay, and the export that the message names finishes it."""
    seen = []

    def prove(student, written, target, source, form, *, pythons, say):
        seen.append(form.dtype)
        raise UserError("vllm gives 1.0 where the student gives 2.0 (prompt 1, position 7)")

    monkeypatch.setattr("distill.exporters.proofs.prove", prove)
    little = {"tokens": 64, "probe_tokens": 64, "passkey": []}
    entries = tiny_recipe | {"stages": [{"initialise": {"tokens": 64}}], "evaluation": little, "export": ["portable"]}
    recipe = check(entries, "tiny.yaml")
    for _ in range(2):
        with pytest.raises(UserError) as raised:
            distill.run(recipe, runs=tmp_path)
        (folder,) = tmp_path.glob("tiny-*")
        said = str(raised.value)
        for part in (
            "position 7",
            f"`distill export {quote(str(folder))} --to portable --no-verify` writes it without a proof",
            f"the student is saved in {folder / 'student'}",
            "give the same command again to repeat this part of the run (export/portable)",
        ):
            assert part in said
        assert (folder / "student" / "config.json").exists() and (folder / "report.html").exists()
        assert not list((folder / "export").iterdir())
    assert seen == ["bfloat16"] * 2 and not json.loads((folder / "run.json").read_text()).get("finished")
    out = distill.export(folder, verify=False)
    (out / "notes.txt").write_text("mine")
    done = distill.run(recipe, runs=tmp_path)
    assert done.read("run.json")["finished"] and len(seen) == 2
    assert "notes.txt" not in "".join(done.read("run.json")["ended"]["export/portable"]["files"])
    (out / "notes.txt").unlink()  # the user's: the run lacks nothing
    distill.run(recipe, runs=tmp_path)
    assert len(seen) == 2
    (out / MARKER).unlink()
    (out / "config.json").unlink()
    with pytest.raises(UserError, match="is not empty, and was not written by an export"):
        distill.run(recipe, runs=tmp_path)


def test_an_export_elsewhere_is_not_the_runs(untrained_run, tmp_path):
    before = sorted(path.name for path in untrained_run.iterdir())
    distill.export(untrained_run, out=tmp_path / "out", verify=False)
    assert sorted(path.name for path in untrained_run.iterdir()) == before


def test_what_is_exported_can_be_used_by_name(untrained_run, tiny_teacher, text_files, tmp_path):
    """The folder is a student's: it generates and is judged, in the types that it was written in."""
    out = distill.export(untrained_run, out=tmp_path / "out", verify=False)
    assert distill.generate(out, "The river", tokens=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.evaluation.judging.EVALUATIONS", {"fidelity": EVALUATIONS["fidelity"]})
        heldout = str(text_files / "heldout.jsonl")
        rows = distill.evaluate(out, teacher=str(tiny_teacher), heldout=heldout)["rows"]
    assert 0 < rows["student"]["fidelity"]["kl"] < 20
