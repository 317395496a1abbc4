"""What a run refuses before it trains, a plan refuses too, in the same words; and the other way round."""

import pytest
import torch

import distill
from distill.errors import UserError
from distill.exporters.portable import Portable
from distill.training.pipeline import Pipeline

SSM = "mixers.M={mixer: mamba2}"
# overrides of tiny.yaml, whose teacher has 4 layers, 4 heads, a width of 32 and positions for 512 tokens; what is said
LENGTHS = [
    (["data.seq_len=1024"], "data.seq_len is 1024, but "),
    (["evaluation.seq_len=513"], "evaluation.seq_len is 513, but "),
    (["evaluation.passkey=[256, 1024]"], "evaluation.passkey is 1024, but "),
    (["meta_tokens=490"], "data.seq_len is 32 after 490 meta tokens, but "),
    (["meta_tokens=512"], "meta_tokens is 512, but "),
    (["meta_tokens=60000"], "which leaves 0 for a text; make it 504 or less"),
    (["mixers.M.window.size=513"], "mixers.M.window.size is 513, but "),
    (["mixers.M={mixer: attention, window: 1000}"], "mixers.M.window is 1000, but "),
    (["mixers.M={mixer: parallel_heads, window: 600}"], "make it 512 or less"),
]
SIZES = [
    (["mixers.M={mixer: gla, gate_rank: 33}"], "gate_rank is 33, more than the model's width 32"),
    (["mixers.M={mixer: mamba1, dt_rank: 4000}"], "dt_rank is 4000, more than the model's width 32"),
    (["mixers.M={mixer: mamba2, n_groups: 3}"], "n_groups 3 does not divide the 4 attention heads"),
    (["mixers.M={mixer: split_heads, keep: [4]}"], "keep names 4; the heads here are 0 to 3"),
    (["mixers.M={mixer: split_heads, keep: {9: [1]}}"], "is given for '9'; the layers of M are 1, 3"),
    (["mixers.M={mixer: shared_attention, blocks: 3}"], "blocks (M) is 3, but M has 2 layers"),
    (["mixers.M={mixer: attention, share_kv: true}"], "shares keys and values, but no layer before it has any"),
    (["pattern=AMMMM"], "names 5 layers, but the model has 4"),
    (["stages.imitate.train=lora", "stages.imitate.lora={rank: 33}"], "lora.rank is 33, but model.layers.0."),
    (["stages.imitate.train=lora", "stages.imitate.lora={targets: [nope]}"], "'nope' is no module of the student"),
    (["stages.imitate.lr={new: 1e-3}"], "lr gives rates for new, but this stage also trains"),
]
SELECTIONS = [
    (["pattern={keep: 4, by: kl}"], "pattern.keep is 4, which leaves none of 4 layers to convert"),
    (["pattern={keep: 1, by: kl, protect: [0, 1]}"], "but 2 are protected"),
    (["pattern={keep: 1, by: kl, protect: [4]}"], "pattern.protect names layer 4; the layers are 0 to 3"),
    (["pattern={keep: 1, by: kl, length: 513}"], "pattern.length is 513, but "),
    (["pattern={keep: 1, by: kl, length: 128, window: 513}"], "pattern.window is 513, but "),
    (["pattern={keep: 1, by: task, length: 128, tasks: nowhere}"], "there is no such folder"),
    (["pattern={keep: 1, by: kl, length: 128, stand_in: mixer}", "mixers.M={mixer: attention, share_kv: true}"], "stand_in"),
]
PLACES = [
    (["data.train.0.path=nowhere.txt"], "data.train.0: no file matches 'nowhere.txt'"),
    (["data.heldout.0.path=nowhere/*.jsonl"], "data.heldout.0: no file matches 'nowhere/*.jsonl'"),
    (["data.train.0.path=tiny.yaml"], "is not a file of text"),
    (["teacher=nowhere/at/all"], "nowhere/at/all"),
    (["trackers=[aim]"], "trackers: aim is not installed here"),
    (["twin=true", SSM], "twin: true needs mixers with a window branch"),
]


def refusals(overrides, runs):
    """What a plan says, and what a run says, which makes no folder."""
    for verb, options in ((distill.plan, {}), (distill.run, {"runs": runs})):
        with pytest.raises(UserError) as refused:
            verb("tiny.yaml", overrides=overrides, **options)
        yield str(refused.value)
    assert not runs.exists()


@pytest.mark.parametrize(("overrides", "part"), [*LENGTHS, *SIZES, *SELECTIONS, *PLACES], ids=str)
def test_a_plan_refuses_what_a_run_refuses(place, tmp_path, overrides, part):
    planned, run = refusals(overrides, tmp_path / "runs")
    assert planned == run and part in planned


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here(place, tmp_path):
    planned, run = refusals(["device=cuda"], tmp_path / "runs")
    assert planned == run and "device is 'cuda', but PyTorch sees no GPU here" in planned


def test_a_target_that_cannot_hold_the_layout(place, tmp_path, monkeypatch):
    monkeypatch.setattr(Portable, "refuses", lambda self, of: f"{of.layout.pattern} of {of.family} has no name there")
    planned, run = refusals(["export=[portable]"], tmp_path / "runs")
    assert planned == run and "export: portable cannot hold this student: AMAM of llama has no name there" in planned


@pytest.mark.parametrize("change", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_a_batch_that_processes_cannot_share(place, tmp_path, monkeypatch, change):
    monkeypatch.setenv(change, "3")
    planned, run = refusals([], tmp_path / "runs")
    assert planned == run and "data.batch is 4, and a batch of 4 windows cannot be shared by 3 processes" in planned
    planned, run = refusals(["data.batch=6", "stages.align.batch=4"], tmp_path / "runs")
    assert planned == run and "stages.2.align.batch is 4, and a batch of 4 windows" in planned


# with the teacher and the text at hand


CHECKED = [
    (["data.separator=<nope>"], "data.separator: the tokenizer has no token '<nope>'"),
    (["data.train.0.column=body"], "data.train.0: there is no column 'body'"),
    (
        ["evaluation.seq_len=512", "pattern={keep: 1, by: kl, length: 128}", "data.heldout.0.path=few.txt"],
        "one window of 512, but a selection needs text that its student is not evaluated on",
    ),
    (["data.train.0.path=word.txt", "data.seq_len=512"], "data.seq_len is 512, but there are only"),
]


@pytest.mark.parametrize(("overrides", "part"), CHECKED, ids=str)
def test_a_checked_plan_refuses_what_a_run_refuses(copied_place, tmp_path, monkeypatch, overrides, part):
    (copied_place / "word.txt").write_text("a word")
    (copied_place / "few.txt").write_text("a few words of text. " * 60)
    said = []
    for verb, options in ((distill.plan, {"check": True}), (distill.run, {"runs": tmp_path / "runs"})):
        with pytest.raises(UserError) as refused:
            verb("tiny.yaml", overrides=overrides, **options)
        said.append(str(refused.value))
    assert said[0] == said[1] and part in said[0]
    assert not (tmp_path / "runs").exists()


def test_mixers_larger_than_the_memory(place, tmp_path, monkeypatch):
    """Before anything trains: 16,384 states a channel may be meant, but not on this machine."""
    monkeypatch.setattr("distill.memory.capacity", lambda device: 2**23)
    monkeypatch.setattr(Pipeline, "__init__", lambda *unused: pytest.fail("a student was made"))
    wide, little = "mixers.M={mixer: mamba2, d_state: 4096}", "mixers.M={mixer: mamba2, d_state: 1000}"
    said = (
        (wide, r"tiny: the mixers take .* GiB, .* this cpu is 0\.0 GiB; ask for smaller options .*'d_state': 4096"),
        (little, r"tiny: the [\d,]+ parameters of stage orient, their gradients and AdamW's moments take .* GiB"),
    )
    for verb, options in ((distill.plan, {"check": True}), (distill.run, {"runs": tmp_path})):
        for override, part in said:
            with pytest.raises(UserError, match=part):
                verb("tiny.yaml", overrides=[override], **options)
    assert distill.plan("tiny.yaml").bytes < 2**23  # and what fits is no matter


def test_select_refuses_it_before_it_measures(place, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.selection.request.resolve", lambda *unused: pytest.fail("a selection began"))
    for overrides, part in (*LENGTHS[:1], *SIZES[:1], *SELECTIONS[:4]):
        with pytest.raises(UserError) as refused:
            distill.select("tiny.yaml", overrides=overrides, runs=tmp_path / "runs")
        assert part in str(refused.value)
    with pytest.raises(UserError, match="heldout"):
        distill.select("tiny.yaml", overrides=["data.heldout.0.path=nowhere.txt"], runs=tmp_path / "runs")
