"""The rehearsal before training of what a run's end needs: mended where nothing is lost, or refused with the reason."""

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

import distill
import students
from distill import run
from distill.build import build
from distill.errors import UserError
from distill.evaluation.samples import PROMPT, continuations
from distill.generation_config import inherited
from distill.recipe_file import check
from distill.training import pipeline
from distill.training.rehearsal import check_questions
from teachers.teacher import Teacher


@pytest.fixture
def no_training(monkeypatch):
    """Whatever is refused must be refused before a stage begins."""

    def begun(self, *unused):
        raise AssertionError("a stage began")

    monkeypatch.setattr(pipeline.Pipeline, "_begin", begun)


def changed(teacher, folder, file="generation_config.json", **entries):
    """A copy of a teacher's folder with entries of a JSON file changed."""
    shutil.copytree(teacher, folder)
    path = folder / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | entries))
    return str(folder)


def short(entries, **more):
    entries["stages"] = [entries["stages"][0], {"align": {"tokens": 128, "lr": 1e-3}}]
    return check(entries | more, "tiny.yaml")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"temperature": 0.9}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1}, {}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"num_beams": 1, "length_penalty": 2.0, "early_stopping": True}, {"num_beams": 1}),
        ({"num_beams": 2, "length_penalty": 2.0}, {"num_beams": 2, "length_penalty": 2.0}),
        ({"output_scores": True, "output_attentions": True}, {}),
        ({"pad_token_id": -1, "eos_token_id": [1, 2]}, {"eos_token_id": [1, 2]}),
        ({"cache_implementation": "hybrid", "max_length": 20}, {"max_length": 20}),
        ({"cache_implementation": "static"}, {}),
        ({"repetition_penalty": 1.1, "something_of_its_own": 3}, {"repetition_penalty": 1.1, "something_of_its_own": 3}),
    ],
    ids=str,
)
def test_generation_settings_can_be_saved(given, kept, tmp_path):
    """Those of a search that is off are left out; whatever does something stays."""
    found = inherited(GenerationConfig(**given), "x")
    found.save_pretrained(tmp_path)
    assert {name: value for name, value in found.to_diff_dict().items() if name != "transformers_version"} == kept


def test_a_run_of_an_old_chat_model_ends(tiny_teacher, tiny_recipe, tmp_path):
    """`temperature` without sampling, and a search that the report's own text must not follow."""
    settings = {"temperature": 0.9, "return_dict_in_generate": True, "num_beams": 2, "stop_strings": ["e"]}
    folder = changed(tiny_teacher, tmp_path / "teacher", **settings, transformers_version="4.28.0")
    done = run(short(tiny_recipe, teacher=folder, export=["portable"]), runs=tmp_path / "runs")
    saved = json.loads((done.student / "generation_config.json").read_text())
    assert "temperature" not in saved and saved["num_beams"] == 2
    assert (done.path / "export" / "portable" / "config.json").exists() and done.read("samples.json")["student"]
    assert students.load(done.student).generation_config.num_beams == 2


def test_what_cannot_be_saved_is_refused(tiny_teacher, tiny_recipe, tmp_path, no_training, monkeypatch):
    monkeypatch.setattr("distill.generation_config._refusal", lambda config: "it is odd")
    with pytest.raises(UserError, match=r"generation_config\.json of .* could not be saved with a student: it is odd"):
        run(short(tiny_recipe), runs=tmp_path)


def broken(*unused, **more):
    raise RuntimeError("this never\nworks")


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("transformers.PreTrainedModel.save_pretrained", "save the student"),
        ("transformers.PreTrainedTokenizerBase.save_pretrained", "save the teacher's tokenizer with it"),
        ("distill.exporters.portable.Portable.write", "export to portable"),
        ("transformers.GenerationMixin.generate", "generate with teacher and student"),
        ("distill.evaluation.recall.Tokens.marked", "ask for its passkeys"),
        ("distill.training.rehearsal.empty", "judge the row window_layout"),
        ("distill.training.rehearsal.matrices", "draw the matrices of its layers"),
        ("distill.training.rehearsal.run_page", "write its report"),
    ],
)
def test_every_step_of_the_end_is_tried(tiny_recipe, tmp_path, no_training, monkeypatch, place, what):
    monkeypatch.setattr(place, broken)
    said = rf"tiny: at its end the run could not {what}: RuntimeError: this never works; .*nothing has been trained yet"
    with pytest.raises(UserError, match=said):
        run(short(tiny_recipe, export=["portable"]), runs=tmp_path)
    assert not list(tmp_path.glob("tiny-*/student"))


def test_a_disk_without_room_is_refused(tiny_recipe, tmp_path, no_training, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 100_000)
    monkeypatch.setattr("distill.training.rehearsal.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"will take 0\.\d MiB in .*, and 0\.1 MiB are free; make room there"):
        run(short(tiny_recipe, export=["portable"], twin=True), runs=tmp_path)


# lengths


def test_passkeys_beyond_the_positions(tiny_recipe, tmp_path, no_training):
    """Those that a recipe asks for are refused."""
    every = tiny_recipe["stages"]
    options = tiny_recipe["evaluation"] | {"passkey": [256, 1024]}
    with pytest.raises(UserError, match=r"evaluation\.passkey is 1024, but .* has positions for 512 tokens; make it 512"):
        run(short(tiny_recipe, evaluation=options), runs=tmp_path)
    with pytest.raises(UserError, match=r"passkey is 512 after 3 meta tokens, but .* for 512 tokens; make it 509 or less"):
        entries = tiny_recipe | {"stages": every, "meta_tokens": 3, "evaluation": options | {"passkey": [512]}}
        run(check(entries, "tiny.yaml"), runs=tmp_path)


def gpt2(tokenizer, positions):
    """A teacher whose positions are learned: beyond them there is nothing."""
    from teachers.families import FAMILIES

    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 320, "n_positions": positions}
    return Teacher("gpt2", GPT2LMHeadModel(GPT2Config(**sizes)).eval(), tokenizer, FAMILIES["gpt2"])


def test_the_tokens_of_the_questions_count(tiny_recipe, tokenizer):
    """A passkey's smallest text is longer than asked for where a tokenizer cuts words into many tokens."""
    tiny_recipe["evaluation"] |= {"passkey": [64]}
    recipe = check(tiny_recipe, "tiny.yaml")
    check_questions(recipe, gpt2(tokenizer, 512))
    with pytest.raises(UserError, match=r"passkey is \[64\], and the shortest text of 64 takes \d+ tokens of .* for 80"):
        check_questions(recipe, gpt2(tokenizer, 80))


@pytest.mark.parametrize(("more", "said"), [(0, 0), (1, 1), (20, 20), (200, 48)])
def test_texts_end_where_the_positions_do(tokenizer, monkeypatch, more, said):
    prompt = len(tokenizer(PROMPT).input_ids)
    teacher = gpt2(tokenizer, prompt + more)
    student, _ = build(teacher, students.Layout("AM", {"M": {"mixer": "discrete_mamba2"}}))
    lengths, decode = [], type(tokenizer).decode

    def counted(self, ids, **rest):
        lengths.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    continuations(teacher, student)
    assert lengths == [said, said]


def test_a_run_leaves_out_what_is_too_long(tiny_recipe, tiny_teacher, tmp_path):
    """Of the usual lengths: the table says what it lacks."""
    folder = changed(tiny_teacher, tmp_path / "teacher", "config.json", max_position_embeddings=400)
    options = {name: value for name, value in tiny_recipe["evaluation"].items() if name != "passkey"}
    done = run(short(tiny_recipe, teacher=folder, evaluation=options), runs=tmp_path / "runs")
    final = done.read("evaluations.json")["final"]
    assert [cell["length"] for cell in final["rows"]["student"]["passkey"]] == [256]
    assert {
        "rows": ["every"],
        "evaluation": "passkey",
        "part": "512",
        "reason": "the teacher has positions for 400 tokens",
    } in (final["not_run"])


# the plan


def test_a_checked_plan_has_the_numbers(tiny_recipe):
    recipe = short(tiny_recipe, export=["portable"], twin=True)
    assert distill.plan(recipe).identity is None
    found = distill.plan(recipe, check=True).numbers()["identity"]
    assert found["logits"] < 1e-5 and found["attention"] < 1e-4 and set(found["layers"]) == {"1", "3"}


def test_a_checked_plan_refuses_what_a_run_would(tiny_teacher, tiny_recipe, tmp_path, monkeypatch):
    options = tiny_recipe["evaluation"] | {"passkey": [1024]}
    with pytest.raises(UserError, match=r"evaluation\.passkey is 1024"):
        distill.plan(short(tiny_recipe, evaluation=options), check=True)
    with pytest.raises(UserError, match="trackers"):
        distill.plan(short(tiny_recipe, trackers=["aim"]), check=True)
    monkeypatch.setattr("transformers.GenerationMixin.generate", broken)
    with pytest.raises(UserError, match="could not generate with teacher and student"):
        distill.plan(short(tiny_recipe), check=True)


def test_a_twin_without_a_window_is_no_plan(tiny_recipe):
    mixers = {"M": {"mixer": "discrete_mamba2"}}
    with pytest.raises(UserError, match="twin: true needs mixers with a window branch; this layout has none"):
        distill.plan(short(tiny_recipe, mixers=mixers, twin=True))


# types


def test_a_run_in_bfloat16_ends(tiny_recipe, tmp_path):
    """As on a GPU: what is drawn and written down is float32."""
    little = {"tokens": 64, "documents": 1, "probe_tokens": 64, "passkey": []}
    folder = run(short(tiny_recipe, precision="bfloat16", evaluation=little), runs=tmp_path)
    with np.load(folder.path / "matrices.npz") as arrays:
        assert len(arrays) and all(arrays[name].dtype == np.float32 for name in arrays)
    assert (folder.path / "report.html").exists()
