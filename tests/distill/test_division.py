"""Evaluation and selection by two processes: each does a share, and both get one process's tables, to the bit."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

import distill
from distill.division import divided, divided_tables, dividing, first_decides, shares
from distill.evaluation import suites
from distill.evaluation.nonfinite import NotFinite
from distill.evaluation.target import judge_target
from distill.recipe_file import load
from tests.distill.two_processes import in_two

SIZES = {"passkey": (64, 128), "passkey_trials": 4, "recall": (96,), "recall_trials": 2, "depths": (0.0, 1.0)}
SIZES |= {"grid_trials": 1, "speed": (32,), "items": 4, "window": 32, "heldout_tokens": 2048}
SELECTIONS = {
    "recall": {"keep": 1, "by": "recall", "length": 64, "trials": 2, "tokens": 128, "window": 6, "sinks": 1},
    "greedy": {"keep": 2, "by": "greedy", "measure": "kl", "length": 64, "trials": 2, "tokens": 128, "window": 6},
}
# What each of two processes finds, in a file of its own.
TWO = """
import json, os, sys
import tests.conftest
from tests.distill.test_division import found_by, refused
folder, runs, recipe, tasks, out = sys.argv[1:]
found = found_by(folder, f"{runs}-both", recipe, tasks)
found["refused"] = refused()
with open(f"{out}-{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
"""


def found_by(folder, runs, recipe, tasks):
    """A run's judgement by every evaluation, selections, and how many passes of the teacher's body this process made."""
    from teachers.teacher import Teacher

    passes, hidden = [], Teacher.hidden

    def counted(self, ids, positions):
        passes.append(1)
        return hidden(self, ids, positions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suites.SUITES, "standard", replace(suites.SUITES["standard"], **SIZES))
        patch.setattr(Teacher, "hidden", counted)
        patch.setattr("distill.evaluation.scoring.BATCH_TOKENS", {"cpu": 128})
        patch.setattr("distill.runs.session.BATCH_TOKENS", {"cpu": 64})
        judged, _ = judge_target(folder, None, None, "standard", tasks, None)
        chosen = {}
        for name, pattern in SELECTIONS.items():
            chosen[name] = distill.select(load(recipe, [f"pattern={json.dumps(pattern)}"]), runs=runs)
    for row in judged["rows"].values():
        row.pop("speed", None)
    judged["against_teacher"] = {row: {**beside, "speed": None} for row, beside in judged["against_teacher"].items()}
    judged = {key: value for key, value in judged.items() if key not in ("seconds", "identity")}
    facts = ("layers", "ranking", "models", "pattern")
    chosen = {name: {fact: one[fact] for fact in facts} for name, one in chosen.items()}
    for one in chosen.values():
        for numbers in one["models"].values():
            del numbers["seconds"]
    return json.loads(json.dumps({"judged": judged, "chosen": chosen, "passes": len(passes)}))


def refused():
    """What each process has of work divided, and what it raises where a part fails that one of them does."""
    said = []

    def work(index):
        if index in (3, 6):
            raise NotFinite(f"part {index}")
        return [shares()[1], index]

    with dividing():
        said.append(divided([0, 1, 2], work))
        said.append(first_decides(lambda: "the first"))
        tables = divided_tables(
            [0, 1, 2], lambda i: torch.full((i, 2), i / 3, dtype=torch.float64), lambda i: (i, 2), torch.device("cpu")
        )
        said.append([table.tolist() for table in tables])
        try:
            divided(range(8), work)
        except NotFinite as error:
            said.append(str(error))
        try:
            divided([0, 1], lambda index: {}[index] if index else index)
        except (KeyError, RuntimeError) as error:
            said.append("KeyError" in f"{type(error).__name__} {error}")
    return said


def test_two_processes_find_what_one_finds(judged_run, tmp_path):
    entries = yaml.safe_load((judged_run / "recipe.yaml").read_text())
    entries |= {"stages": entries["stages"][:1], "twin": False, "mixers": {"M": {"mixer": "discrete_mamba2"}}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(entries))
    (tmp_path / "two.py").write_text(TWO)
    arguments = [str(part) for part in (judged_run, tmp_path / "runs", tmp_path / "tiny.yaml", judged_run.parent / "tasks")]
    code, said = in_two(str(tmp_path / "two.py"), *arguments, str(tmp_path / "found"))
    assert code == 0, said
    alone = found_by(*arguments)
    tables = [[[index / 3] * 2] * index for index in range(3)]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert found["judged"] == alone["judged"] and found["chosen"] == alone["chosen"]
        assert found["passes"] < alone["passes"]  # each did a share
        whole, first, made, raised, foreign = found["refused"]
        assert whole == [[1, 0], [1, 1], [1, 2]] and first == "the first" and made == tables
        assert raised == "part 3" and foreign is True


def test_one_process_divides_nothing():
    with dividing():
        assert shares() == (0, 1) and divided([1, 2], lambda item: item + 1) == [2, 3]
