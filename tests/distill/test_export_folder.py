"""The folder of an export: where it may be, which of the user's files stay in it, and what remains after a fault."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

import distill
from distill.errors import UserError
from distill.exporters.place import MARKER


@pytest.fixture
def run_copy(untrained_run, tmp_path, monkeypatch):
    """A run to export, in the working folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(untrained_run, tmp_path / "run")


def export(run, **options):
    return distill.export(run, **{"to": "portable", "verify": False, **options})


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_where_it_goes_by_default(run_copy):
    lines = []
    console = type("Lines", (), {"print": lambda self, line: lines.append(line)})()
    out = distill.export(run_copy, verify=False, console=console)
    assert out == run_copy / "export" / "portable" and (out / "config.json").exists()
    assert "target portable: no transformers class computes the same function" in lines[0]
    assert "as portable (bfloat16)" in lines[1] and "written: " in lines[2] and "iB" in lines[2]
    assert export(Path("run"), to=None) == Path("run/export/portable")


def test_a_finished_students_folder(run_copy, tmp_path):
    """That of a run knows its run; one that was taken elsewhere has to be told where to go."""
    assert export(run_copy / "student") == run_copy / "export" / "portable"
    assert "Recipe `tiny`" in (run_copy / "export" / "portable" / "README.md").read_text()
    shutil.copytree(run_copy / "student", tmp_path / "taken")
    with pytest.raises(UserError, match=r"taken is a student's folder outside a run; say with --out"):
        export("taken")
    out = export("taken", out="out")
    assert (out / "model.safetensors").read_bytes() == (run_copy / "export/portable/model.safetensors").read_bytes()
    assert "The recipe is not known" in (out / "README.md").read_text()
    assert contents(tmp_path / "taken").keys() == contents(run_copy / "student").keys()
    again = export("out", out="again")  # an export is a student's folder too
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_where_it_may_not_be(run_copy, tmp_path):
    (run_copy / "twin").mkdir()
    (run_copy / "twin" / "metrics.jsonl").touch()
    before = contents(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "loop").symlink_to("loop")
    for out, said in (
        (".", "--out is '.', the folder that this command runs in; name a new folder inside it"),
        ("", "the folder that this command runs in"),
        ("run/..", "the folder that this command runs in"),
        ("..", "and an export would replace both; choose another folder"),
        ("/", "and an export would replace both; choose another folder"),
        ("run", "run is the run folder itself, and an export would replace it; choose another folder"),
        ("run/student", "run/student is the student's own folder, and an export would replace it"),
        ("run/student/new", "run/student/new lies inside the student's folder student; choose a folder outside it"),
        ("run/twin", "run/twin is not empty, and was not written by an export; choose another folder"),
        ("file", "file is a file; name a folder to write the export into"),
        ("file/new", "the export to file/new could not be written: .*or name another folder"),
        ("link", "link is a link to elsewhere, and nothing is written through links"),
        ("loop", "loop is a link to loop, and nothing is written through links"),
        ("a\0b", "is not a valid file name"),
        ("n" * 300, "could not be written: .*name another folder"),
    ):
        with pytest.raises(UserError, match=said):
            export("run", out=out)
    (tmp_path / "file").unlink()
    assert contents(tmp_path) == before and not list((tmp_path / "elsewhere").iterdir())


def test_files_of_the_users_are_carried_over(run_copy, tmp_path):
    out = export(run_copy, out="out")
    (out / "notes.txt").write_text("mine")
    (out / "quantised" / "deep").mkdir(parents=True)
    (out / "quantised" / "deep" / "model.gguf").write_bytes(b"mine too")
    (out / "empty").mkdir()
    (out / "link").symlink_to("notes.txt")
    (out / "away").symlink_to("/nowhere", target_is_directory=True)
    (out / "students_model.py").unlink()  # of ours: it is written again
    (out / MARKER).rename(out / "kept")
    marker = json.loads((out / "kept").read_text())
    marker["files"]["students_of_old.py"] = "0" * 64  # listed, and gone
    (out / MARKER).write_text(json.dumps(marker))
    os.unlink(out / "kept")
    export(run_copy, out="out", dtype="float32")
    assert (out / "notes.txt").read_text() == "mine" and (out / "quantised/deep/model.gguf").read_bytes() == b"mine too"
    assert (out / "empty").is_dir() and os.readlink(out / "link") == "notes.txt" and os.readlink(out / "away") == "/nowhere"
    assert (out / "students_model.py").exists() and json.loads((out / "config.json").read_text())["dtype"] == "float32"
    listed = json.loads((out / MARKER).read_text())["files"]
    assert "notes.txt" not in listed and "students_of_old.py" not in listed and "README.md" in listed
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["README.md", "config.json", "students_model.py", "model.safetensors"])
def test_a_changed_file_of_an_export_is_not_lost(run_copy, name):
    out = export(run_copy, out="out")
    with (out / name).open("ab") as file:
        file.write(b" ")
    before = contents(out)
    with pytest.raises(UserError, match=rf"out/{name} was changed since it was exported.*move it away, or choose another"):
        export(run_copy, out="out")
    assert contents(out) == before
    (out / name).unlink()
    export(run_copy, out="out")


def test_names_that_the_new_export_needs(run_copy, monkeypatch):
    out = export(run_copy, out="out")
    marker = json.loads((out / MARKER).read_text())
    for name in ("students_model.py", "README.md"):
        rest = {file: digest for file, digest in marker["files"].items() if file != name}
        (out / MARKER).write_text(json.dumps({**marker, "files": rest}))
        before = contents(out)
        with pytest.raises(UserError, match=rf"out/{name} is not of the earlier export"):
            export(run_copy, out="out")
        assert contents(out) == before
    (out / "students_model.py").unlink()
    (out / "students_model.py").mkdir()  # a folder of the user's with that name
    (out / "students_model.py" / "mine").touch()
    (out / MARKER).write_text(json.dumps(marker))
    with pytest.raises(UserError, match=r"out/students_model.py/mine is not of the earlier export"):
        export(run_copy, out="out")


def test_a_folder_of_an_earlier_version(run_copy):
    out = export(run_copy, out="out")
    for text in ("portable\n", "", "{", "{}", '{"target": "portable", "files": {"a": "b"}}'):
        (out / MARKER).write_text(text)
        with pytest.raises(UserError, match=r"take your(s| own files) out and delete the folder"):
            export(run_copy, out="out")
    (out / MARKER).unlink()
    with pytest.raises(UserError, match="out is not empty, and was not written by an export"):
        export(run_copy, out="out")


@pytest.mark.parametrize("place", ["write", "mark", "carry", "swap"])
def test_a_full_disk_leaves_the_earlier_export(run_copy, tmp_path, monkeypatch, place):
    out = export(run_copy, out="out")
    (out / "notes.txt").write_text("mine")
    before = contents(out)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    names = {"write": "weights.write_file", "mark": "exporting.mark", "carry": "place._carry", "swap": "place.Place._swap"}
    with monkeypatch.context() as patch:
        patch.setattr(f"distill.exporters.{names[place]}", full)
        with pytest.raises(UserError, match=r"the export to out could not be written: .*No space left.*make room there"):
            export(run_copy, out="out")
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_a_kill_between_the_two_renamings(run_copy, tmp_path):
    """The earlier export, with what the user put there, is found again and gone on from."""
    out = export(run_copy, out="out")
    (out / "notes.txt").write_text("mine")
    out.rename(tmp_path / ".out.earlier")
    export(run_copy, out="out")
    assert (out / "notes.txt").read_text() == "mine" and not (tmp_path / ".out.earlier").exists()
    shutil.copytree(out, tmp_path / ".out.earlier")  # a kill behind both
    export(run_copy, out="out")
    assert (out / "notes.txt").read_text() == "mine" and not (tmp_path / ".out.earlier").exists()


def test_what_is_asked_for_is_refused_before_anything_is_read(run_copy, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.exporters.exporting._whole", lambda finished: pytest.fail("the student was read"))
    for options, said in (
        ({"to": "portabel"}, "there is no export target 'portabel'; did you mean 'portable'"),
        ({"dtype": "float16"}, "--dtype is 'float16'; did you mean 'bfloat16'|--dtype is 'float16'; did you mean 'float32'"),
        ({"quantize": "q8_0"}, "--quantize is 'q8_0', but portable has none"),
        ({"to": None, "quantize": "q8_0"}, "--quantize is 'q8_0', but the default target has none"),
        ({"engines": {"vlm": "python"}}, "--engine names the engine 'vlm'; did you mean 'vllm'"),
        (
            {"engines": {"vllm": "/nowhere/python"}},
            "--engine gives /nowhere/python as the Python of vllm, but it is not a program",
        ),
        ({"push": "a b/c"}, "--push is 'a b/c', which is not a valid repository name"),
        ({"push": "name"}, "--push is 'name'; it should read OWNER/NAME"),
        ({"public": True}, "--public needs --push: it makes the pushed repository public; add --push REPO"),
    ):
        with pytest.raises(UserError, match=said):
            export(run_copy, out="out", **options)
    monkeypatch.setenv("DISTILL_ENGINES", "mlx=/nowhere/python;vllm")
    with pytest.raises(UserError, match="DISTILL_ENGINES is 'vllm'; it should read NAME=PYTHON"):
        export(run_copy, out="out")
    monkeypatch.setenv("DISTILL_ENGINES", "mlx=/nowhere/python;")
    with pytest.raises(
        UserError, match="DISTILL_ENGINES gives /nowhere/python as the Python of mlx, but it is not a program"
    ):
        export(run_copy, out="out")
    assert not (tmp_path / "out").exists()
