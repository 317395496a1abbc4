"""Ends of runs that fail, are killed or are deleted: the same command makes what is missing, and nothing made is lost."""

import json
import shutil

import pytest
from rich.console import Console
from safetensors.torch import load_file

import distill
from distill.errors import UserError
from distill.evaluation.nonfinite import NotFinite
from distill.reports import add_judgement
from distill.runs import checkpoint
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.training import ending, pipeline
from tests.distill.mistakes.conftest import hashes
from tests.distill.mistakes.damaged_runs import run_folder


def again(name="short"):
    return distill.run(f"{name}.yaml", runs="runs")


def refused(name="short"):
    """What the same command says."""
    with pytest.raises(UserError) as raised:
        again(name)
    return str(raised.value)


def no_session(*arguments, **keywords):
    raise AssertionError("a teacher was loaded for what needs none")


def test_a_report_that_was_deleted_is_written_again(copied_place, monkeypatch, capsys):
    folder = run_folder(copied_place, "short")
    before = hashes(folder)
    (folder / "report.html").unlink()
    (folder / "report.md").unlink()
    monkeypatch.setattr(Session, "open", no_session)
    again()
    said = capsys.readouterr().err
    assert "lacks report; making them again" in said and str(folder.name) in said
    after = hashes(folder)
    assert {name for name in before if after[name] != before[name]} <= {"run.json", "report.html"}  # a page says where it is
    again()
    assert "made again" not in capsys.readouterr().err and hashes(folder) == after


@pytest.mark.parametrize("name", ["evaluations.json", "matrices.npz", "samples.json"])
def test_results_that_were_deleted_are_made_again(copied_place, name):
    folder = RunDir(run_folder(copied_place, "short"))
    before, weights = folder.read("evaluations.json")["final"], hashes(folder.student)
    (folder.path / name).unlink()
    again()
    assert folder.read("evaluations.json")["final"]["rows"] == before["rows"]
    assert hashes(folder.student) == weights and folder.read("run.json")["finished"]
    assert all((folder.path / made).stat().st_size for made in ("matrices.npz", "samples.json", "report.html"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", ""])
def test_a_student_that_was_deleted_is_saved_again(copied_place, capsys, name):
    folder = RunDir(run_folder(copied_place, "short"))
    before, steps = hashes(folder.path), folder.metrics()
    shutil.rmtree(folder.student) if not name else (folder.student / name).unlink()
    again()
    assert "it is saved again from the last checkpoint" in " ".join(capsys.readouterr().err.split())
    after = hashes(folder.path)
    weights = "student/model.safetensors"
    assert after[weights] == before[weights] and after["evaluations.json"] == before["evaluations.json"]
    assert folder.metrics() == steps and folder.read("run.json")["finished"]


def test_a_student_that_is_gone_with_its_checkpoints(copied_place, refuse):
    """Training again is not what `run` was asked for; checkpoints alone may go, to make room."""
    folder = run_folder(copied_place, "short")
    shutil.rmtree(folder / "checkpoints")
    (folder / "report.html").unlink()
    again()
    shutil.rmtree(folder / "student")
    refuse(copied_place, ["run", "short.yaml"], ["its student in ", "lacks files", "restore one", "with --fresh"])


def failing(error):
    def fail(*arguments, **keywords):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotFinite("student, fidelity: layer 2 is not finite"), "judging the student: student, fidelity: layer 2"),
        (KeyError("x"), "an internal error; --debug shows it"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_judgement_that_fails_loses_nothing(copied_place, monkeypatch, error, said):
    folder = RunDir(run_folder(copied_place, "short"))
    weights, final = hashes(folder.student), folder.read("evaluations.json")["final"]
    folder.change("evaluations.json", lambda evaluations: evaluations.pop("final"))
    folder.update("run.json", finished=False, ended={"student": folder.read("run.json")["ended"]["student"]})
    (folder.path / "report.html").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(ending, "judge_session", failing(error))
        told = refused()
    assert said in told and "the student is saved in " in told and "give the same command again to repeat this part" in told
    assert "KeyError" not in told and hashes(folder.student) == weights and not folder.read("run.json").get("finished")
    page = (folder.path / "report.html").read_text()
    assert "has not been evaluated yet" in page or "judging the student" in page
    again()
    assert folder.read("evaluations.json")["final"]["rows"] == final["rows"] and folder.read("run.json")["finished"]
    assert hashes(folder.student) == weights and "KL" in (folder.path / "report.html").read_text()


def test_a_number_that_no_json_can_hold_loses_no_student(copied_place, monkeypatch):
    folder = RunDir(run_folder(copied_place, "short"))
    broken = json.loads(json.dumps(folder.read("evaluations.json")["final"]))
    broken["rows"]["student"]["fidelity"]["kl"] = float("nan")
    folder.change("evaluations.json", lambda evaluations: evaluations.pop("final"))
    with monkeypatch.context() as patch:
        patch.setattr(ending, "judge_session", lambda *arguments, **keywords: broken)
        assert "cannot hold final.rows.student.fidelity.kl: it is nan" in refused()
    again()
    assert folder.read("evaluations.json")["final"]["rows"]["student"]["fidelity"]["kl"] > 0


def test_a_last_stage_that_is_not_finite_on_heldout_text_is_saved(copied_place, monkeypatch):
    folder, error = RunDir(run_folder(copied_place, "half")), NotFinite("the student's logits are not finite")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "fidelity", failing(error))
        patch.setattr(ending, "judge_session", failing(error))
        assert "judging the student: the student's logits are not finite; the student is saved in" in refused("half")
    last = checkpoint.latest(folder.checkpoints)
    assert last.name == "1-align-end" and "the student's logits" in folder.read("run.json")["stopped"]
    weights = load_file(folder.student / "model.safetensors")
    steps = len(folder.metrics())
    again("half")
    assert len(folder.metrics()) == steps and folder.read("run.json")["finished"]
    same = load_file(folder.student / "model.safetensors")
    assert all((same[name] == tensor).all() for name, tensor in weights.items())


# `eval` while a run judges itself


def test_what_eval_finds_while_a_run_is_judged_is_kept(copied_place, monkeypatch):
    folder = RunDir(run_folder(copied_place, "short"))
    final = folder.read("evaluations.json")["final"]
    folder.change("evaluations.json", lambda evaluations: evaluations.pop("final"))

    def meanwhile(*arguments, **keywords):
        add_judgement(folder, {**final, "suite": "quick", "target": "x"}, Console(quiet=True))
        return final

    monkeypatch.setattr(ending, "judge_session", meanwhile)
    again()
    found = folder.read("evaluations.json")
    assert found["final"]["suite"] == "run" and found["suites"]["quick"]["target"] == "x" and found["after"]
    assert "distill eval x --suite quick" in (folder.path / "report.html").read_text()


def test_a_student_that_is_replaced_while_it_is_judged(copied_place, monkeypatch, refuse):
    folder = run_folder(copied_place, "short")
    final = RunDir(folder).read("evaluations.json")["final"]

    def meanwhile(*arguments, **keywords):
        (folder / "student").rename(folder / "before")
        shutil.copytree(folder / "before", folder / "student")
        shutil.rmtree(folder / "before")
        return dict(final)

    monkeypatch.setattr("distill.evaluation.target.judge_session", meanwhile)
    refuse(copied_place, ["eval", folder], ["student was replaced while it was judged"])
