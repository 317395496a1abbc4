"""The walk of CONTRIBUTING.md: one batch of an align step, from the command line to the kernel, in at most ten functions."""

import re
import sys
import traceback
from pathlib import Path

import pytest
import yaml

from distill import cli
from students.mixers import state_space

ROOT = Path(__file__).parent.parent
HOPS = 10  # of a mixer without branches, the op included; a window branch beside it is one more


@pytest.mark.parametrize(("window", "more"), [(None, 0), ({"size": 4, "sinks": 2}, 1)], ids=["plain", "window"])
def test_a_batch_takes_the_walk(tiny_recipe, tmp_path, monkeypatch, window, more):
    tiny_recipe["mixers"] = {"M": {"mixer": "discrete_mamba2"} | ({"window": window} if window else {})}
    tiny_recipe["stages"] = [{"initialise": {"tokens": 64}}, {"align": {"tokens": 128, "lr": 1e-3}}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    walks = seen_in_steps(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["distill", "run", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as ended:
        cli.entry()
    assert not ended.value.code
    (walk,) = set(walks)
    assert len(walk) <= HOPS + more, walk
    if window is None:
        assert list(walk) == named()


def seen_in_steps(monkeypatch) -> list[tuple[str, ...]]:
    """Filled with our functions on the stack whenever a training step is inside the op, the op last."""
    walks, op = [], state_space.ssd

    def noted(*arguments, **keywords):
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(ROOT)]
        ours = [frame for frame in frames if Path(frame.filename).relative_to(ROOT).parts[0] in ("distill", "students")]
        if any(frame.name == "step" for frame in ours):
            walks.append((*(f"{Path(frame.filename).relative_to(ROOT)}:{frame.name}" for frame in ours), OP))
        return op(*arguments, **keywords)

    monkeypatch.setattr(state_space, "ssd", noted)
    return walks


OP = "students/kernels/ssd/__init__.py:ssd"


def named() -> list[str]:
    """The walk as CONTRIBUTING.md tells it."""
    table = re.findall(r"^\| \d+ \| `([\w/.]+)` \| `([\w.]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return [f"{file}:{name.rpartition('.')[2]}" for file, name in table]
