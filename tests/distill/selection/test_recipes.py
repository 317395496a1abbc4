"""Recipes whose pattern asks for a selection: mistakes, plans and the command."""

import json
import re

import pytest
import yaml

from distill.errors import UserError
from distill.planning import make_plan
from distill.recipe_file import check
from distill.selection import SCORERS
from distill.selection.checking import selection_options
from distill.selection.request import ask_for_selection
from distill.selection.resolution import cost_of
from tests.distill.selection.planted import HEADS, LAYERS, SMALL, written

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
