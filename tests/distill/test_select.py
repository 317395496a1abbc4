"""Selections find the planted layer: a teacher in which one head of one layer does all look-ups."""

import io
import json
import re

import pytest
import torch
import yaml
from rich.console import Console

from distill import run, select
from distill.errors import Interrupted, UserError
from distill.planning import make_plan
from distill.recipe_file import check
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.selection import SCORERS, measurer
from distill.selection.checking import selection_options
from distill.selection.gates import GateState, _reads_recall
from distill.selection.measures import Material
from distill.selection.request import ask_for_selection
from distill.selection.resolution import cost_of
from distill.selection.scorer import count_of, evenly
from distill.selection.switched import SwitchedHeads, make_switched
from distill.selection.tables import show
from tests.conftest import tiny_entries

LAYERS, HEADS, LAYER, HEAD = 4, 2, 2, 1  # of the planted teacher; where the one head is
SMALL = {"window": 8, "sinks": 1, "families": ["passkey"], "length": 128, "trials": 3, "tokens": 256}
SMALLER = {
    "task": {"names": ["piqa"], "items": 6},
    "greedy": {"beam": 2, "look_ahead": 2},
    "gates": {"training_tokens": 2000, "lr": 0.3},
}
# Every scorer but the one that measures nothing and the one that ranks heads.
MEASURED = {by: SMALLER.get(by, {}) for by in SCORERS if by not in ("uniform", "retrieval-heads")}


@pytest.fixture(scope="session")
def planted(tmp_path_factory, tokenizer):
    """The folder of a Llama whose attention adds nothing but in one head: that one looks at every token alike and says
    again what letters and digits it saw, so that what stands in a text is likelier. Embeddings are one-hot, MLPs silent."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size, width = 320, 64
    texts = [(token, tokenizer.decode([token]).strip()) for token in range(size)]
    seen = [token for token, text in texts if re.fullmatch(r"[a-z]|[0-9]+", text)]
    assert 36 <= len(seen) <= width
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=width,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(2)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(size))
        for index, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
            if index == LAYER:
                part = slice(HEAD * width, HEAD * width + len(seen))
                layer.self_attn.q_proj.weight[HEAD * width : (HEAD + 1) * width] = 0.0
                layer.self_attn.v_proj.weight[part] = torch.eye(size)[seen]
                layer.self_attn.o_proj.weight[:, part] = 4.0 * torch.eye(size)[:, seen]
    folder = tmp_path_factory.mktemp("planted")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def entries(planted, text_files):
    """A recipe for the planted teacher whose pattern asks for a selection."""
    found = tiny_entries(planted, text_files)
    found["mixers"] = {"M": {"mixer": "discrete_mamba2"}}
    found["stages"] = [{"initialise": {"tokens": 128}}, {"align": {"tokens": 256, "lr": 1e-3}}]
    return found | {"pattern": {"keep": 2, "by": "recall", **SMALL}}


@pytest.fixture
def tiny(tiny_teacher, text_files):
    """A recipe of two stages for a random teacher, which selects: for runs, which take longer the wider a teacher is."""
    found = tiny_entries(tiny_teacher, text_files)
    found["stages"] = [{"initialise": {"tokens": 128}}, {"align": {"tokens": 256, "lr": 1e-3}}]
    return found | {"pattern": {"keep": 0.25, "by": "kl", "protect": [], **SMALL}}


@pytest.fixture
def task_folder(tmp_path):
    """Items whose right choice stands in the question, far enough back."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    words = ["zqx", "vkw", "jjq", "wxz", "kqv", "xxk"]
    lines = [
        {"ctx": f"{word} {word} is what the long story about the river and the town says. It says", "choices": [word, other]}
        for word, other in zip(words, words[1:] + words[:1], strict=True)
    ]
    (folder / "piqa.jsonl").write_text("\n".join(json.dumps({**line, "label": 0}) for line in lines))
    return folder


def written(tmp_path, entries):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


def chosen_by(entries, tmp_path, **options):
    entries["pattern"] |= options
    tmp_path.mkdir(exist_ok=True)
    return select(written(tmp_path, entries), runs=tmp_path / "runs")


def opened(entries):
    recipe = check(entries, "mine.yaml")
    session = Session.open(recipe)
    return session, selection_options(recipe)


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


# resuming


class StopsAfter(Stopper):
    """Asks to stop when so many measurements were allowed."""

    def __init__(self, count):
        super().__init__()
        self.left = count

    def due(self):
        self.left -= 1
        return "enough" if self.left < 0 else None


def count_measurements(monkeypatch):
    made, measure = [], Material.measure

    def counted(self, model, name):
        made.append(name)
        return measure(self, model, name)

    monkeypatch.setattr(Material, "measure", counted)
    return made


def test_an_interrupted_selection_measures_only_what_is_missing(entries, tmp_path, monkeypatch):
    made = count_measurements(monkeypatch)
    whole = chosen_by(entries, tmp_path / "whole" if (tmp_path / "whole").mkdir() is None else tmp_path)
    every = len(made)
    (tmp_path / "cut").mkdir()
    path = written(tmp_path / "cut", entries)
    made.clear()
    monkeypatch.setattr("distill.selection.request.Stopper", lambda: StopsAfter(5))
    with pytest.raises(Interrupted, match=r"enough while selecting; the same command goes on from .*selection\.json"):
        select(path, runs=tmp_path / "cut" / "runs")
    assert len(made) == 5
    monkeypatch.setattr("distill.selection.request.Stopper", Stopper)
    again = select(path, runs=tmp_path / "cut" / "runs")
    assert len(made) == every
    for chosen in (whole, again):  # what may differ
        del chosen["cost"]["seconds"], chosen["cost"]["predicted_seconds"], chosen["folder"]
        for numbers in chosen["models"].values():
            del numbers["seconds"]
    assert again == whole
    select(path, runs=tmp_path / "cut" / "runs")
    assert len(made) == every  # all of it is known


def test_a_kill_between_layers_leaves_whole_records(entries, tmp_path, monkeypatch):
    made = count_measurements(monkeypatch)
    measure = Material.measure

    def killed(self, model, name):
        if len(made) == 4:
            raise SystemExit
        return measure(self, model, name)

    monkeypatch.setattr(Material, "measure", killed)
    path = written(tmp_path, entries)
    with pytest.raises(SystemExit):
        select(path, runs=tmp_path / "runs")
    (file,) = (tmp_path / "runs").glob("*/selection.json")
    measured = json.loads(file.read_text())["measured"]
    assert sum(len(measures) for measures in measured.values()) == 4 and "layer 1" in measured
    monkeypatch.setattr(Material, "measure", measure)
    assert select(path, runs=tmp_path / "runs")["layers"] == [0, LAYER]
    text = json.loads(file.read_text())
    text["facts"]["teacher"] = "another"
    file.write_text(json.dumps(text))
    with pytest.raises(UserError, match="the teacher is not the one that was measured there"):
        select(path, runs=tmp_path / "runs")


def test_gates_resume_to_the_same_bits(entries, tmp_path, monkeypatch):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    options = {"by": "gates", "training_tokens": 1200, "save": 1}
    whole = chosen_by(entries, tmp_path / "whole", **options)
    monkeypatch.setattr("distill.selection.request.Stopper", lambda: StopsAfter(4))
    path = written(tmp_path / "cut", entries)
    with pytest.raises(Interrupted):
        select(path, runs=tmp_path / "cut" / "runs")
    monkeypatch.setattr("distill.selection.request.Stopper", Stopper)
    assert select(path, runs=tmp_path / "cut" / "runs")["ranking"] == whole["ranking"]


def test_gates_share_their_steps_and_survive_json(entries):
    entries["pattern"] |= {"by": "gates", "retrieval": 0.25}
    options = selection_options(check(entries, "here"))
    assert [_reads_recall(step, options) for step in range(8)] == [False, False, False, True] * 2
    state = GateState.new(3)
    state.take(torch.tensor([0.1, -0.2, 1 / 3]), lr=0.07)
    again = GateState.read(json.loads(json.dumps(state.entries())))
    for one, other in ((state, again), (GateState.read(state.entries()), again)):
        one.take(torch.tensor([0.3, 0.1, -1 / 7]), lr=0.07)
        other_after = GateState.read(other.entries())
        other_after.take(torch.tensor([0.3, 0.1, -1 / 7]), lr=0.07)
        assert torch.equal(one.logits, other_after.logits)


# the switched model


def test_nothing_switched_is_the_teacher(entries):
    session, options = opened(entries)
    batch = session.heldout_windows.batch(0, 2)
    switched, teacher = make_switched(session, options), session.teacher
    wanted = teacher.hidden(batch.ids, batch.positions)
    with torch.no_grad():
        assert torch.equal(switched.keep(range(LAYERS)).hidden(batch.ids, batch.documents), wanted)
        assert not torch.equal(switched.keep([0]).hidden(batch.ids, batch.documents), wanted)
        assert torch.equal(switched.keep([LAYER]).hidden(batch.ids, batch.documents), wanted)  # the others add nothing
        for windows in (False, True):
            heads = SwitchedHeads(teacher, options, windows)
            torch.testing.assert_close(heads.keep({}).hidden(batch.ids, batch.documents), wanted, rtol=1e-4, atol=1e-4)
            off = heads.keep({LAYER: [1 - HEAD]}).hidden(batch.ids, batch.documents)
            assert not torch.allclose(off, wanted, rtol=1e-2, atol=1e-2)


def test_a_gate_mixes(entries):
    session, options = opened(entries)
    switched, batch = make_switched(session, options), session.heldout_windows.batch(0, 1)
    with torch.no_grad():
        ends = [switched.keep(kept).hidden(batch.ids, batch.documents) for kept in (range(LAYERS), [])]
        for gate, wanted in zip((1.0, 0.0), ends, strict=True):
            found = switched.mix([torch.tensor(gate)] * LAYERS).hidden(batch.ids, batch.documents)
            torch.testing.assert_close(found, wanted)


def test_the_recipes_own_mixers_can_stand_in(entries, tmp_path):
    chosen = chosen_by(entries, tmp_path, stand_in="mixer", by="kl")
    assert chosen["ranking"][0]["name"] == str(LAYER) and chosen["layers"] == [0, LAYER]


def test_mixers_that_cannot_be_switched_one_by_one(entries, tmp_path):
    window = {"mixer": "attention", "window": 8}
    entries["mixers"] = {"W": window, "X": {**window, "share_kv": True}}
    with pytest.raises(UserError, match=r"a mixer shares another layer's keys and values.*use stand_in: window"):
        chosen_by(entries, tmp_path, rest="WX", stand_in="mixer")


# recipes


MISTAKES = [
    ({"by": None}, r"mine\.yaml: pattern\.by is missing; choose from " + ", ".join(SCORERS)),
    ({"by": "recal"}, r"pattern\.by: there is no scorer 'recal'; did you mean 'recall'"),
    ({"kep": 3}, r"pattern: kep is not a key here; did you mean 'keep'"),
    ({"beam": 3}, r"pattern: beam is not a key here"),
    ({"keep": 0}, r"pattern: keep is 0"),
    ({"keep": 1.5}, r"pattern: keep is 1\.5"),
    ({"keep": "many"}, r"pattern: keep is 'many'"),
    ({"protect": [-1]}, r"pattern: protect\.0 is -1"),
    ({"families": ["passky"]}, "there is no recall family 'passky'; did you mean 'passkey'"),
    ({"stand_in": "mamba"}, r"pattern: stand_in is 'mamba'"),
    ({"rest": "X"}, r"pattern\.rest uses 'X', but no mixer is given for it; there are M"),
    ({"rest": "AM"}, r"pattern\.rest is 'AM'; A is the letter of the layers that are kept"),
    ({"by": "task"}, r"pattern: tasks is missing"),
    ({"by": "retrieval-heads"}, r"chooses heads: the other layers need one letter whose mixer is split_heads, not 'M'"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[str(change) for change, _ in MISTAKES])
def test_mistakes_name_the_key(entries, changes, message):
    entries["pattern"] = {key: value for key, value in (entries["pattern"] | changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        check(entries, "mine.yaml")


def test_several_mixers_need_their_turns(entries):
    entries["mixers"]["G"] = {"mixer": "gla"}
    with pytest.raises(UserError, match=r"pattern\.rest is missing: it gives the order of the mixers G, M over the layers"):
        check(entries, "mine.yaml")
    entries["pattern"]["rest"] = "M"
    with pytest.raises(UserError, match=r"a mixer is given for 'G', but mine\.yaml: pattern\.rest \('M'\) does not use it"):
        check(entries, "mine.yaml")
    entries["pattern"] |= {"rest": "MG", "keep": 1}
    assert make_plan(check(entries, "mine.yaml")).layout.pattern == "AMGM"


def test_heads_that_a_recipe_already_keeps(entries):
    entries["mixers"] = {"S": {"mixer": "split_heads", "keep": [0]}}
    entries["pattern"] |= {"by": "retrieval-heads"}
    with pytest.raises(UserError, match=r"mixers\.S\.keep is what mine\.yaml: pattern selects; leave it out"):
        check(entries, "mine.yaml")


@pytest.mark.parametrize("by", SCORERS)
def test_a_plan_says_how_and_at_what_cost(entries, by, task_folder):
    if by == "retrieval-heads":
        entries["mixers"] = {"S": {"mixer": "split_heads"}}
    entries["pattern"] |= {"by": by} | ({"tasks": str(task_folder), "names": ["piqa"]} if by == "task" else {})
    plan = make_plan(check(entries, "here"))
    options = selection_options(check(entries, "here"))
    assert plan.selection["by"] == by
    assert (plan.selection["tokens"], plan.selection["training_tokens"]) == cost_of(options, LAYERS, HEADS)
    one = 3 * 128 + 256  # tokens of recall and KL
    wanted = {"uniform": 3 * one, "recall": 6 * one, "kl": 3 * one + 3 * 256, "gates": 3 * one}
    assert plan.selection["tokens"] == wanted.get(by, plan.selection["tokens"]) and plan.selection["tokens"] >= 3 * one
    assert plan.numbers()["selection"]["keep"] == 2


def test_selecting_what_a_written_pattern_keeps():
    def changed(pattern, **options):
        entries = {"pattern": pattern}
        ask_for_selection(entries, "r.yaml", **{"by": None, "keep": None, "tasks": None} | options)
        return entries["pattern"]

    assert changed("AMMM") == {"by": "recall", "keep": 0.25, "rest": "MMM"}
    assert changed("AMGG", by="kl", keep=3) == {"by": "kl", "keep": 3, "rest": "MGG"}
    assert changed({"keep": 4, "by": "kl"}, by="greedy") == {"keep": 4, "by": "greedy"}
    with pytest.raises(UserError, match=r"r\.yaml: the pattern 'M' keeps no attention; give .* with --keep"):
        changed("M")


def test_a_run_selects_trains_and_resumes(tiny, tmp_path, monkeypatch):
    tiny["twin"] = True
    recipe = check(tiny, "mine.yaml")
    made = count_measurements(monkeypatch)
    folder = run(recipe, runs=tmp_path)
    assert folder.path.name == f"tiny-{recipe.fingerprint}"
    assert folder.recipe() == recipe  # as given
    pattern = folder.read("selection.json")["chosen"]["pattern"]
    assert sorted(pattern) == ["A", "M", "M", "M"]
    resolved = yaml.safe_load((folder.path / "resolved.yaml").read_text())
    assert check(resolved, "resolved").pattern == pattern
    for student in (folder.student, folder.path / "twin" / "student"):
        assert json.loads((student / "config.json").read_text())["distill"]["layout"]["pattern"] == pattern
    count = len(made)
    (folder.path / "run.json").write_text(json.dumps(folder.read("run.json") | {"finished": False}))
    run(recipe, runs=tmp_path)
    assert len(made) == count
    text = (folder.path / "resolved.yaml").read_text()
    (folder.path / "resolved.yaml").write_text(text.replace(pattern, pattern[::-1]))
    (folder.path / "run.json").write_text(json.dumps(folder.read("run.json") | {"finished": False}))
    with pytest.raises(UserError, match=r"resolved\.yaml is not the layout that was selected here"):
        run(recipe, runs=tmp_path)


def test_the_command_shows_it_and_writes_a_recipe(entries, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from distill.cli import app

    monkeypatch.chdir(tmp_path)
    entries["pattern"] = "AM"
    written(tmp_path, entries)
    settings = [f"pattern.{key}={json.dumps(value)}" for key, value in SMALL.items()]
    arguments = ["select", "mine.yaml", "--by", "kl", "--write", "chosen.yaml", *settings]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "selected by kl" in result.output and "AMAM" in result.output and "understates" in result.output
    assert re.search(r"about [\d,]+ tokens", result.output) and "even" in result.output
    loaded = yaml.safe_load((tmp_path / "chosen.yaml").read_text())
    assert loaded["pattern"] == "AMAM" and "name" not in loaded
    assert check({**loaded, "name": "chosen"}, "chosen.yaml").mixers == entries["mixers"]
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, UserError) and "exists already" in str(again.exception)
    numbers = CliRunner().invoke(app, ["select", "mine.yaml", "--by", "kl", "--json", "-", *settings])
    assert json.loads(numbers.stdout)["pattern"] == "AMAM"


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
