"""Selections find the planted layer: a teacher in which one head of one layer does all look-ups."""

import io
import json

import pytest
import torch
from rich.console import Console

from distill import run, select
from distill.errors import UserError
from distill.planning import make_plan
from distill.recipe_file import check
from distill.runs.run_dir import RunDir
from distill.runs.stopper import Stopper
from distill.selection import measurer
from distill.selection.checking import selection_options
from distill.selection.scorer import count_of, evenly
from distill.selection.tables import show
from tests.distill.selection.planted import HEAD, HEADS, LAYER, LAYERS, MEASURED, SMALL, chosen_by, opened, written

# what is chosen


@pytest.mark.parametrize("by", MEASURED)
def test_a_planted_layer_is_ranked_first(entries, tmp_path, task_folder, by):
    extra = {"tasks": str(task_folder)} if by == "task" else {}
    chosen = chosen_by(entries, tmp_path, by=by, **MEASURED[by], **extra)
    best, *others = chosen["ranking"]
    assert best["name"] == str(LAYER) and best["kept"] and best["score"] > 0
    assert all(best["score"] > other["score"] for other in others)
    assert chosen["layers"] == [0, LAYER] and chosen["pattern"] == "AMAM"
    models = chosen["models"]
    assert models["chosen"]["kl"] == pytest.approx(models["teacher"]["kl"], abs=1e-5)
    if by == "recall":  # the even layout is the same here
        assert models["even"] == models["chosen"]
    assert chosen["cost"]["tokens"] > 0 and chosen["cost"]["seconds"] > 0


def test_keeping_another_layer_is_seen_to_lose_recall(entries, tmp_path):
    chosen = chosen_by(entries, tmp_path, keep=1, by="uniform")
    assert chosen["layers"] == [0] and chosen["pattern"] == "AMMM"
    models = chosen["models"]
    assert models["chosen"]["kl"] > 0.01 and models["chosen"]["choice"] < models["teacher"]["choice"] - 0.1


@pytest.mark.parametrize("by", ["uniform", "kl", "greedy"])
def test_every_nth_layer_says_what_it_costs(entries, tmp_path, by, monkeypatch):
    """The planted layer 2 is in no interval of one layer but n = 3; two layers come to n = 2, without it."""
    options = MEASURED.get(by, {})
    chosen = chosen_by(entries, tmp_path / "a", by=by, keep=1, periodic=True, **options)
    found = chosen["periodic"]
    if by == "uniform":
        assert found == {"every": 4, "score": None, "free": [0], "free_score": None} and chosen["pattern"] == "MMMA"
    else:
        assert found["every"] == 3 and chosen["pattern"] == "MMAM" and found["free"] == [LAYER]
        assert found["score"] == found["free_score"]
    chosen = chosen_by(entries, tmp_path / "b", by=by, keep=2, periodic=True, **options)
    found, models = chosen["periodic"], chosen["models"]
    assert chosen["pattern"] == "MAMA" and chosen["layers"] == [1, 3] and found["every"] == 2
    if by != "uniform":
        assert LAYER in found["free"] and found["score"] < found["free_score"]
        assert models["free"]["kl"] < models["chosen"]["kl"]
        assert models["free"]["kl"] == pytest.approx(models["teacher"]["kl"], abs=1e-5)
    console = Console(record=True, width=400, file=io.StringIO())
    show(chosen, console)
    text = console.export_text()
    assert "every n-th layer, n = 2; the free choice is " in text and "the free choice, untrained" in text
    monkeypatch.setattr(measurer.Measurer, "_measure_round", None)  # the same command reads what was found
    assert select(written(tmp_path, entries), runs=tmp_path / "b" / "runs")["periodic"] == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 3}, r"pattern\.keep is 3, 3 of 4 layers, but with periodic: .* no interval keeps 3; keep 2, 1"),
        ({"keep": 0.75}, r"pattern\.keep is 0\.75, 3 of 4 layers"),
        ({"protect": [0]}, r"pattern\.protect names layers \[0\], but with periodic: true the interval alone decides"),
        ({"by": "retrieval-heads"}, r"pattern\.periodic keeps whole layers, and retrieval-heads chooses single heads"),
        ({"periodic": "often"}, r"pattern: periodic is 'often'"),
    ],
    ids=str,
)
def test_intervals_that_cannot_be(entries, changes, message):
    if "by" in changes:
        entries["mixers"] = {"S": {"mixer": "split_heads"}}
    entries["pattern"] |= {"periodic": True, "keep": 1, "by": "kl"} | changes
    with pytest.raises(UserError, match=message):
        make_plan(check(entries, "mine.yaml"))


def test_a_plan_shows_an_interval(entries):
    entries["pattern"] |= {"periodic": True, "keep": 2, "by": "kl"}
    plan = make_plan(check(entries, "mine.yaml"))
    assert plan.layout.pattern == "MAMA"
    assert plan.selection["tokens"] == 4 * (3 * 128 + 256) + LAYERS * 256


@pytest.mark.parametrize("ablate", ["zero", "window"])
def test_a_planted_head_is_ranked_first_and_feeds_split_heads(entries, tmp_path, ablate):
    entries["mixers"] = {"S": {"mixer": "split_heads", "ssm": {"mixer": "discrete_mamba2"}}}
    chosen = chosen_by(entries, tmp_path, keep=1, by="retrieval-heads", ablate=ablate)
    assert chosen["ranking"][0]["name"] == f"{LAYER}.{HEAD}" and chosen["ranking"][0]["kept"]
    assert chosen["layers"] == [0] and chosen["heads"] == {str(LAYER): [HEAD]} and chosen["pattern"] == "ASSS"
    assert chosen["mixers"]["S"]["keep"] == {str(LAYER): [HEAD]}
    assert chosen["models"]["chosen"]["choice"] == pytest.approx(chosen["models"]["teacher"]["choice"], abs=1e-3)


def test_a_run_keeps_the_heads_that_it_selects(tiny, tmp_path):
    tiny["mixers"] = {"S": {"mixer": "split_heads", "ssm": {"mixer": "discrete_mamba2"}}}
    tiny["pattern"] |= {"keep": 2, "by": "retrieval-heads"}
    folder = run(check(tiny, "mine.yaml"), runs=tmp_path)
    chosen = folder.read("selection.json")["chosen"]
    kept = chosen["mixers"]["S"]["keep"]
    assert sum(map(len, kept.values())) == 2 and chosen["pattern"] == "SSSS"
    assert [entry["name"] for entry in chosen["ranking"][:2]] == [
        entry["name"] for entry in chosen["ranking"] if entry["kept"]
    ]
    assert json.loads((folder.student / "config.json").read_text())["distill"]["layout"]["mixers"]["S"]["keep"] == kept


def test_heads_of_a_whole_layer_keep_it_whole(entries):
    from distill.selection.heads import RetrievalHeads
    from distill.selection.scorer import Ranked

    entries["mixers"] = {"S": {"mixer": "split_heads"}}
    entries["pattern"] |= {"by": "retrieval-heads", "keep": 3, "protect": []}
    ranking = [Ranked(layer, score, {}, head) for layer, head, score in ((1, 1, 3.0), (3, 0, 2.0), (1, 0, 1.0), (0, 0, 0.0))]
    choice = RetrievalHeads.choose(selection_options(check(entries, "here")), ranking, LAYERS, HEADS)
    assert choice.layers == [1] and choice.heads == {3: [0]}


def test_greedy_sees_pairs(entries, tmp_path, monkeypatch):
    """Layers 1 and 3 are worth something together alone, layer 2 a little on its own: a beam of one takes layer 2 and
    misses the pair, and one of three finds it."""

    def worth(kept):
        return 1.0 * ({1, 3} <= set(kept)) + 0.1 * (2 in kept)

    def measured(self, layouts, measures):
        return {kept: {"choice": worth(kept), "kl": 0.0} for kept in layouts}

    monkeypatch.setattr(measurer.Measurer, "layouts", measured)
    narrow = chosen_with_fake(entries, tmp_path / "a", beam=1)
    wide = chosen_with_fake(entries, tmp_path / "b", beam=3)
    assert narrow == [0, 1, 2] and wide == [0, 1, 3]


def chosen_with_fake(entries, path, beam):
    from distill.selection.greedy import Greedy

    session, options = opened(entries | {"pattern": {"keep": 3, "by": "greedy", "beam": beam, **SMALL}})
    path.mkdir()
    records = measurer.Records(RunDir(path), {}, writes=False)
    bench = measurer.Measurer(session, options, records, Console(quiet=True), Stopper())
    return Greedy.choose(options, Greedy().rank(bench), LAYERS, HEADS).layers


# budgets


def test_even_spread_and_protection():
    assert evenly(8, 30) == [0, 3, 7, 11, 15, 18, 22, 26]
    assert evenly(2, 4) == [0, 2]
    assert evenly(2, 4, [3]) == [0, 3]
    assert evenly(1, 4, [3]) == [3]
    for count in range(1, 12):
        kept = evenly(count, 12, [0, 7][:count])
        assert len(set(kept)) == count and set([0, 7][:count]) <= set(kept)


@pytest.mark.parametrize(("keep", "kept"), [(0.25, 1), (0.5, 2), (3, 3), (0.01, 1)])
def test_budgets_are_kept(entries, keep, kept):
    entries["pattern"] |= {"keep": keep}
    assert count_of(selection_options(check(entries, "here")), LAYERS) == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 4}, "leaves none of 4 layers to convert"),
        ({"keep": 1, "protect": [0, 3]}, r"pattern.keep is 1, 1 of 4 layers, but 2 are protected \(\[0, 3\]\)"),
        ({"protect": [9]}, "pattern.protect names layer 9; the layers are 0 to 3"),
        ({"protect": [1, 1]}, "names layer 1; it is named twice"),
        ({"by": "task", "tasks": "/nowhere"}, "tasks is /nowhere, but there is no such folder"),
        ({"length": 1024}, "pattern.length is 1024, but .* has positions for 512"),
    ],
)
def test_budgets_that_do_not_fit(entries, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        chosen_by(entries, tmp_path, **changes)


def test_protected_layers_are_neither_measured_nor_converted(entries, tmp_path):
    chosen = chosen_by(entries, tmp_path, by="kl", protect=[1, 3], keep=2)
    assert chosen["pattern"] == "MAMA"
    assert {entry["name"] for entry in chosen["ranking"]} == {"0", "2"} and not any(e["kept"] for e in chosen["ranking"])


def test_a_forced_choice_is_among_its_tokens_alone(entries):
    from distill.evaluation.scoring import Marked, score

    teacher = opened(entries)[0].teacher
    among = [5, 9, 77]
    choices = [score(teacher, None, [Marked([1, 2, 3, token], ((3, 4),))], among)[0][0] for token in among]
    free = [score(teacher, None, [Marked([1, 2, 3, token], ((3, 4),))])[0][0] for token in among]
    assert torch.tensor([choice.logprob for choice in choices]).exp().sum().item() == pytest.approx(1.0, abs=1e-4)
    shifts = [one.logprob - other.logprob for one, other in zip(choices, free, strict=True)]
    assert min(shifts) > 0 and shifts == pytest.approx([shifts[0]] * 3, abs=1e-4)
    assert [one.greedy for one in choices] == [one.greedy for one in free]
