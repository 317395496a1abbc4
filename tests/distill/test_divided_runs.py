"""Whole runs whose later stages are divided over two processes: one process's losses, evaluations and layouts."""

import json

import pytest
import yaml
from rich.console import Console

import distill
from tests.distill.two_processes import in_two


@pytest.fixture(scope="module")
def entries(chat_teacher, text_files, tmp_path_factory):
    """Every stage that follows `align`, on chats and pairs; the new layer has its own rate."""
    from tests.conftest import chat_entries

    folder, rows, pairs = tmp_path_factory.mktemp("later"), [], []
    for number in range(40):
        asked = {"role": "user", "content": f"what {number}?"}
        good = {"role": "assistant", "content": f"{number}: " + "over the stones " * (number % 3)}
        rows.append({"messages": [asked, good]})
        pairs.append({"prompt": [asked], "chosen": [good], "rejected": [{"role": "assistant", "content": "stones"}]})
    for name, found in (("chats", rows), ("held", rows[:12]), ("pairs", pairs[:24])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    entries = chat_entries(chat_teacher, text_files, folder)
    step = {"tokens": 1152, "lr": 1e-3}
    entries["stages"] = [
        {"initialise": {"tokens": 256}},
        {"imitate": step | {"train": "all", "ce": 0.2, "tokens": 768}},
        {"replace": {"layers": [2], "tokens": 256}},
        {"imitate": step | {"layers": "new"}},
        {"tune": step | {"train": "all", "kl": 0.5}},
        {"prefer": step | {"train": "all", "data": [{"path": str(folder / "pairs.jsonl")}]}},
    ]
    return entries


@pytest.fixture(scope="module")
def alone(entries, tmp_path_factory):
    return distill.run(entries, runs=tmp_path_factory.mktemp("alone"), console=Console(quiet=True))


@pytest.mark.parametrize("shard", ["student", pytest.param("all", marks=pytest.mark.processes)])
def test_later_stages_in_two_processes(entries, alone, tmp_path, shard):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(entries | {"shard": shard}))
    code, said = in_two("-m", "distill.cli", "run", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "two"))
    assert code == 0, said
    (path,) = (tmp_path / "two").glob("tiny-*")
    found, wanted = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()], alone.metrics()
    assert [line["stage"] for line in found] == [line["stage"] for line in wanted]
    assert {line["stage"] for line in found} == {"imitate", "tune", "prefer"}
    for name in ("loss", "gradient_norm", "reward_margin", "win_share"):
        numbers = [[line[name] for line in lines if name in line] for lines in (found, wanted)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-5), name
    one, two = (json.loads((folder / "evaluations.json").read_text()) for folder in (alone.path, path))
    assert two["after"]["2-replace"]["pattern"] == one["after"]["2-replace"]["pattern"] == "AMMM"
    kls = [[stage["kl"] for stage in judged["after"].values()] for judged in (two, one)]
    assert kls[0] == pytest.approx(kls[1], rel=1e-4)
