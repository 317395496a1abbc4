"""Run folders and students that were edited, damaged, cut short, moved or made by another version."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import distill
from distill.errors import UserError
from tests.distill.mistakes.damaged_runs import edit, facts, run_folder

# of a stopped run: what is done to its folder, and what going on with it says
DAMAGES = {
    "an edited recipe": (
        lambda folder: edit(folder / "recipe.yaml", "seq_len: 32", "seq_len: 64"),
        ["recipe.yaml is not the recipe this run was started with", "change the original recipe", "--fresh"],
    ),
    "a recipe that is no YAML": (
        lambda folder: (folder / "recipe.yaml").write_text("name: [half"),
        ["recipe.yaml is not valid YAML"],
    ),
    "a recipe with a foreign key": (
        lambda folder: edit(folder / "recipe.yaml", "batch: 4", "batch: 4\n  bach: 5"),
        ["recipe.yaml: data.bach is not a key here; did you mean 'batch'"],
    ),
    "another recipe's": (
        lambda folder: shutil.copy(next(folder.parent.glob("short-*")) / "recipe.yaml", folder / "recipe.yaml"),
        ["recipe.yaml is not the recipe this run was started with", "the folder is another run's"],
    ),
    "another version's": (
        facts(format=7, versions={"distill": "9.1"}),
        ["run.json: distill 9.1 wrote this run in format 7", "reads format 1", "go on with that version", "--fresh"],
    ),
    "another teacher's": (facts(teacher="0" * 16), ["the teacher is not the one this run was started with", "--fresh"]),
    "another text's": (facts(train_text="x"), ["the train text is not the one this run was started with", "--fresh"]),
    "half a run.json": (
        lambda folder: (folder / "run.json").write_text('{"teacher": '),
        ["run.json is damaged", "delete it to have it made again"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_run_folders(copied_place, refuse, name):
    damage, parts = DAMAGES[name]
    damage(run_folder(copied_place, "half"))
    refuse(copied_place, ["run", "half.yaml"], parts)


def no_student(folder):
    shutil.rmtree(folder / "student")


def cut_weights(folder):
    file = folder / "student" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def fewer_weights(folder):
    file = folder / "student" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})


def another_format(folder):
    file = folder / "student" / "config.json"
    config = json.loads(file.read_text())
    config["distill"]["format"] = 8
    file.write_text(json.dumps(config))


def no_weights(folder):
    (folder / "student" / "model.safetensors").unlink()


# of a finished run: what is done to its student, and what judging and generating say
STUDENTS = {
    "none": (no_student, ["has no finished student"]),
    "cut weights": (cut_weights, ["cannot be loaded as a student", "name a run folder or a whole student's folder"]),
    "a missing tensor": (fewer_weights, ["has no weights for model.layers.2.mlp.up_proj.weight (1 missing in all)"]),
    "another version's": (another_format, ["`distill` entry has format 8; this version reads "]),
    "no weights": (no_weights, ["cannot be loaded as a student", "name a run folder or a whole student's folder"]),
}


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_students(copied_place, refuse, verb, name):
    damage, parts = STUDENTS[name]
    folder = run_folder(copied_place, "short")
    damage(folder)
    refuse(copied_place, [verb, folder, *(["The river"] if verb == "generate" else [])], parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["eval", "gone"], ["gone cannot be loaded as a student", "name a run folder"]),
        (["eval", "runs/stopped"], ["runs/stopped has no finished student yet", "`distill run` goes on with it"]),
        (["eval", "runs/finished", "--json", "gone/n.json"], ["--json is gone/n.json", "there is no folder gone"]),
        (["eval", "runs/finished", "--heldout", "gone.jsonl"], ["data.heldout.0: no file matches 'gone.jsonl'"]),
        (["eval", "runs/finished", "--suite", "quik"], ["there is no suite 'quik'; did you mean 'quick'?"]),
        (
            ["eval", "runs/finished", "--tasks", "gone"],
            ["--tasks is gone, but there is no such folder", "hellaswag.jsonl.xz"],
        ),
        (["eval", "runs/finished", "--teacher", "./gone"], ["teacher './gone' is no folder here"]),
        (["export", "gone", "--out", "x"], ["gone is no run folder: it has no recipe.yaml"]),
        (["export", "runs/stopped", "--out", "x"], ["runs/stopped has no finished student yet"]),
        (["export", "runs/finished", "--out", "runs"], ["runs holds the run folder finished", "choose another folder"]),
        (["export", "runs/finished", "--out", "tiny.yaml"], ["tiny.yaml is a file; name a folder"]),
        (["export", "runs/finished", "--out", "tiny.yaml/x"], ["tiny.yaml/x could not be written", "another folder"]),
        (["export", "runs/finished", "--out", "x", "--to", "portabel"], ["no export target 'portabel'", "'portable'?"]),
        (["generate", "gone", "hello"], ["gone has no finished student"]),
        (["generate", "runs/stopped", "hello"], ["has no finished student", "name a finished run's folder"]),
        (["generate", "out/../text", "hello"], ["has no finished student"]),
        (["generate", "runs/finished", ""], ["the prompt '' has no tokens", "give it at least one word"]),
        (["generate", "runs/finished", "hello", "--chat"], ["has no chat template; leave out --chat"]),
        (
            ["generate", "runs/finished", "hello", "--tokens", "0"],
            ["--tokens is 0; it takes a whole number from 1 to 1,048,576"],
        ),
        (["generate", "runs/finished", "hello", "--prefill-chunk", "0"], ["--prefill-chunk is 0"]),
        (
            ["generate", "runs/finished", "hello", "--temperature", "-1"],
            ["--temperature is -1.0; it takes 0 or a number from 0.001 to 1,000"],
        ),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("eval", "export", "generate") else None,
)
def test_targets(place, refuse, arguments, parts):
    refuse(place, arguments, parts)


def test_a_student_without_its_tokenizer(copied_place, refuse):
    folder = run_folder(copied_place, "short")
    (folder / "student" / "tokenizer.json").write_text("{")
    refuse(copied_place, ["generate", folder, "hello"], ["the tokenizer in ", "copy the teacher's tokenizer files there"])


def test_a_teacher_of_another_vocabulary(place, tiny_teacher, tmp_path, refuse):
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(330)
    model.save_pretrained(folder)
    refuse(place, ["eval", "runs/finished", "--teacher", folder], ["has a vocabulary of 320", "one of 330"])


def test_another_teacher_of_the_same_sizes(place, tiny_teacher, tmp_path, refuse):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = ["was distilled from", "they differ in the weights; pass its own teacher"]
    refuse(place, ["eval", "runs/finished", "--teacher", folder], said)


@pytest.mark.parametrize(
    "entries",
    [{"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"hidden_act": "gelu"}],
)
def test_another_teacher_of_the_same_weights(place, tiny_teacher, tmp_path, refuse, entries):
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    if "rope_theta" in entries:
        config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config | entries))
    refuse(place, ["eval", "runs/finished", "--teacher", folder], ["was distilled from", "they differ in the config; pass"])


@pytest.mark.parametrize("verb", ["eval", "report"])
@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("- align:", "- alignn:", "there is no stage 'alignn'; did you mean 'align'"),
        ("data:", "export: [portabel]\ndata:", "export: there is no target 'portabel'"),
    ],
    ids=["stage", "target"],
)
def test_a_recipe_that_is_none_any_more(copied_place, refuse, verb, old, new, part):
    """It is refused before anything is judged, by the file's name."""
    folder = run_folder(copied_place, "short")
    edit(folder / "recipe.yaml", old, new)
    refuse(copied_place, [verb, folder], ["recipe.yaml", part])


def test_the_python_api_says_the_same(place):
    with pytest.raises(UserError, match="gone cannot be loaded as a student"):
        distill.evaluate("gone")
    with pytest.raises(UserError, match=r"there is no export target 'x'; choose from .*portable"):
        distill.export("runs/finished", to="x", out="y")
    with pytest.raises(UserError, match="has no finished student yet"):
        distill.export("runs/stopped", out="y")
