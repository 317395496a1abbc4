"""A window length and a text for each stage: where each begins, what is kept and compared, and refusals."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

import distill
from distill.errors import Interrupted, UserError
from distill.planning import make_plan
from distill.recipe_file import check
from distill.runs import checkpoint
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.stages import stages_of
from distill.stages.texts import text_of, texts_of, tokens_read
from distill.text.windows import Windows
from distill.training.trackers import steps_before
from distill.training.twin import twin_recipe
from students.config import Layout

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def own(tmp_path):
    """A text of its own."""
    rows = [{"text": f"row {row}: " + "the river runs on and over stones to the sea " * 6} for row in range(60)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(tmp_path / "own.jsonl")}


@pytest.fixture
def entries(tiny_recipe, own):
    """Lengths 32, 32, 64, 64 with a text of its own, 32 of the usual text, 64 of the usual text."""
    tiny_recipe["evaluation"] = {"tokens": 64, "probe_tokens": 32, "passkey": [], "documents": 2}
    options = {"tokens": 512, "lr": 1e-3, "train": "mixers"}
    tiny_recipe["stages"] = [
        {"initialise": {"tokens": 128}},
        {"orient": {"tokens": 256, "lr": 1e-3, "calibration_tokens": 64}},
        {"align": {"tokens": 512, "lr": 1e-3, "seq_len": 64, "batch": 2, "calibration_tokens": 128}},
        {"imitate": options | {"seq_len": 64, "batch": 2, "data": [own]}},
        {"imitate": options},
        {"imitate": options | {"seq_len": 64}},
    ]
    return tiny_recipe


@pytest.fixture
def read(monkeypatch):
    """Every window that is read: text, length, number."""
    found, batch = [], Windows.batch

    def noted(self, first, count):
        found.extend((self.folder.name, self.seq_len, first + k) for k in range(count))
        return batch(self, first, count)

    monkeypatch.setattr(Windows, "batch", noted)
    return found


def test_where_each_stage_begins(entries, tmp_path, read, monkeypatch):
    """A stage goes on where the last one of its text and length stopped; resumed anywhere, to the same bits."""
    folder = distill.run(entries, runs=tmp_path / "whole")
    texts = {name for name, _, _ in read}
    session = Session.open(check(entries, "here"))
    usual, own = session.windows.folder.name, next(iter(session.stage_texts().values())).folder.name
    trained = [one for one in read if one[0] in (usual, own)]
    assert {usual, own} < texts  # and held-out text
    steps = {(usual, 32): 128 // 32 + 8 + 16, (usual, 64): 8 + 8, (own, 64): 8}
    for (name, length), last in steps.items():
        numbers = {number for text, size, number in trained if (text, size) == (name, length)}
        assert numbers == set(range(last)), (name, length)
    metrics = [(line["stage_index"], line["step"], line["tokens"]) for line in folder.metrics()]
    assert metrics == [
        *((1, step, 128) for step in (1, 2)),
        *((2, step, 128) for step in range(1, 5)),
        *((3, step, 128) for step in range(1, 5)),
        *((4, step, 128) for step in range(1, 5)),
        *((5, step, 256) for step in (1, 2)),
    ]
    states = [checkpoint.read_state(path, files=False) for path in sorted((folder.path / "checkpoints").glob("*-end"))]
    sha, own_sha = session.windows.meta.sha256[:16], next(iter(session.stage_texts().values())).meta.sha256[:16]
    assert (states[-1].window, states[-1].windows) == (16, {f"{sha} 32": 28, f"{own_sha} 64": 8})
    for step in range(3):  # every stage is stopped in its middle, too
        stops = 0
        while True:
            left = iter([None] * step + ["enough"] + [None] * 1000)
            monkeypatch.setattr(Stopper, "due", lambda self, left=left: next(left))
            try:
                again = distill.run(entries, runs=tmp_path / f"parts {step}")
                break
            except Interrupted:
                stops += 1
        one, two = (load_file(made.path / "student" / "model.safetensors") for made in (folder, again))
        assert stops >= 3 - step and all(torch.equal(one[name], two[name]) for name in one)


def test_a_recipe_without_them_is_what_it_was(tiny_recipe, tmp_path):
    """Its fingerprint, its state and the hash of that, and run.json."""
    recipe = check(tiny_recipe, "here")
    assert texts_of(recipe) == [text_of(recipe, stages_of(recipe)[-1])]
    state = checkpoint.RunState(1, "align", 3, False, 5, "teacher", processes=1)
    before = {name: value for name, value in vars(state).items() if name not in ("digest", "windows", "layouts")}
    assert state.hashed() == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    tiny_recipe["stages"] = tiny_recipe["stages"][:1]
    folder = distill.run(tiny_recipe, runs=tmp_path / "runs")
    assert "stage_texts" not in folder.read("run.json")
    changed = {**tiny_recipe, "stages": [*recipe.stages[:2], {"align": {**recipe.stages[2]["align"], "seq_len": 16}}]}
    assert check(changed, "here").fingerprint != recipe.fingerprint


def test_the_same_text_said_twice_is_one(entries, tmp_path):
    entries["stages"][3]["imitate"]["data"] = list(entries["data"]["train"])
    recipe = check(entries, "here")
    assert [(text.where, text.seq_len) for text in texts_of(recipe)] == [("data.train", 32), ("data.train", 64)]
    session = Session.open(recipe)
    assert session.stage_texts() == {}
    assert session.windows_of(stages_of(recipe)[3]) is session.windows_of(stages_of(recipe)[5])


def test_what_is_prepared_of_a_text_without_end(entries, own):
    """As much as the stages read that read it; a twin gets the tokens of stages that it leaves out."""
    entries["data"]["train"][0]["weight"] = 1.0
    recipe = check(entries, "here")
    usual, its = tuple(recipe.data.train), text_of(recipe, stages_of(recipe)[3]).sources
    assert tokens_read(recipe, usual) == (128 + 128) + (256 + 128) + (512 + 128) + (512 + 128) + (512 + 256)
    assert tokens_read(recipe, its) == 512 + 128
    entries["stages"][2]["align"] |= {"data": [own]}
    assert tokens_read(check(entries, "here"), its) == 2 * (512 + 128)
    entries["twin"] = True
    assert tokens_read(check(entries, "here"), its) == 2 * (512 + 128) + 256
    twin = twin_recipe(check(entries, "here"), Layout.over(4, entries["pattern"], entries["mixers"]))
    assert [(text_of(twin, entry).seq_len, entry.options.tokens) for entry in stages_of(twin)][:3] == [
        (32, 128),
        (64, 768),
        (64, 512),
    ]
    assert text_of(twin, stages_of(twin)[1]).sources == its


def test_steps_and_plans_count_windows_of_the_stage(entries):
    recipe = check(entries, "here")
    assert [steps_before(recipe, index) for index in range(7)] == [0, 0, 2, 6, 10, 14, 16]
    assert list(make_plan(recipe).tokens.values()) == [128, 256, 512, 512, 512, 512]


def test_another_text_of_a_stage_is_seen_on_resume(entries, own, tmp_path, monkeypatch):
    monkeypatch.setattr(Stopper, "due", lambda self: "enough")
    with pytest.raises(Interrupted):
        distill.run(entries, runs=tmp_path / "runs")
    (folder,) = (tmp_path / "runs").glob("tiny-*")
    assert list(json.loads((folder / "run.json").read_text())["stage_texts"]) == ["stages.3.imitate.data"]
    with open(own["path"], "a") as file:
        file.write(json.dumps({"text": "a row more"}) + "\n")
    with pytest.raises(UserError, match=r"the text of stages\.3\.imitate\.data is not the one this run was started with"):
        distill.run(entries, runs=tmp_path / "runs")


def test_heldout_text_in_the_text_of_a_stage(entries, tmp_path):
    entries["stages"][3]["imitate"]["data"] = list(entries["data"]["heldout"])
    recipe = check(entries, "here")
    found = Session.open(recipe).overlap
    assert found["exact"] == found["documents"] and found["runs"] == 1.0
    assert Session.open(recipe, trains=False).overlap == found  # which finds the texts prepared


def refused(entries, stage, **options):
    name = next(iter(entries["stages"][stage]))
    entries["stages"][stage][name] |= options
    with pytest.raises(UserError) as caught:
        recipe = check(entries, "here")
        make_plan(recipe)
        Session.open(recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "options", "said"),
    [
        (2, {"seq_len": 513}, "stages.2.align.seq_len is 513, but "),
        (5, {"seq_len": 1024}, "stages.5.imitate.seq_len is 1024, but "),
        (5, {"seq_len": 7}, "stages.imitate: seq_len is 7: it should be a whole number from 8"),
        (5, {"seq_len": "long"}, "stages.imitate: seq_len is 'long'"),
        (0, {"seq_len": 64}, "stages.initialise: seq_len is not a key here"),
        (4, {"data": []}, "stages.imitate: data is []"),
        (4, {"data": [{}]}, "stages.imitate: data.0: a source of text needs either path or hub"),
        (4, {"data": [{"path": "gone/*.jsonl"}]}, "stages.4.imitate.data.0: no file matches 'gone/*.jsonl'"),
        (2, {"data": [{"path": "gone.txt"}]}, "stages.2.align.data.0: no file matches 'gone.txt'"),
        (5, {"seq_len": 512, "batch": 65_536 * 2}, "stages.imitate: batch is 131072"),
    ],
)
def test_what_cannot_be(entries, stage, options, said):
    assert said in refused(entries, stage, **options)


def test_a_step_that_is_too_large(entries):
    said = refused(entries, 5, seq_len=32_768, batch=4096)
    assert "stages.5: an optimizer step of imitate would read 134,217,728 tokens, 4,096 windows of 32,768" in said
    assert said.endswith("lower data.batch, its own batch or its seq_len (now 32768)")


def test_a_text_shorter_than_a_window(entries, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "a b"}\n')
    said = refused(entries, 3, data=[{"path": str(tmp_path / "short.jsonl")}])
    assert said == "stages.3.imitate.seq_len is 64, but there are only 3 tokens of text in stages.3.imitate.data"
    del entries["stages"][3]["imitate"]["seq_len"]
    said = refused(entries, 3, data=[{"path": str(tmp_path / "short.jsonl")}])
    assert said == "data.seq_len is 32, but there are only 3 tokens of text in stages.3.imitate.data"


def test_a_stage_that_runs_out_of_memory_names_its_own_length(entries, tmp_path, monkeypatch):
    from distill.stages.align import Align

    def failing(self, batch):
        raise MemoryError()

    monkeypatch.setattr(Align, "losses", failing)
    monkeypatch.setattr("distill.training.saves.probe", lambda *arguments: {})
    with pytest.raises(
        UserError, match=r"stages\.align\.micro_batch \(now 2 .*\) or stages\.align\.seq_len \(now 64 tokens\)"
    ):
        distill.run(entries, runs=tmp_path / "runs")
