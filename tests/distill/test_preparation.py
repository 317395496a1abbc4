"""Text in shards: the same bytes for every number of processes and after interruptions; lost shards are made again."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

import distill
from distill.errors import UserError
from distill.recipe import TextSource
from distill.text import pieces, preparation, progress, shards, tokenising
from distill.text.preparation import Tokenising, prepare
from distill.text.prepared import load
from distill.text.windows import Windows
from tests.distill.prepared_folders import write
from tests.small_disks import small_disk_at

SIZE = 600  # tokens of a shard here


@pytest.fixture(autouse=True)
def small_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SIZE", SIZE)
    monkeypatch.setattr(pieces, "ROWS", 8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A local text, a mixture of two whose first comes several times, a data set's folder, and rows of several documents."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "set").mkdir()
    for name, count in (("one", 90), ("two", 150), ("set/train-0", 60), ("set/train-1", 60), ("many", 40)):
        also = "<end>more of {0} here<end>{0}" if name == "many" else ""
        texts = [f"{name} number {row}: {'the river runs on ' * (1 + row % 7)}" for row in range(count)]
        rows = [{"text": text + also.format(text)} for text in texts] + [{"text": " "}]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = {name: str(folder / f"{name}.jsonl") for name in ("one", "two", "many")}
    return {
        "local": [TextSource(path=path["one"]), TextSource(path=path["two"])],
        "mixture": [TextSource(path=path["one"], weight=3.0), TextSource(path=path["two"], weight=1.0)],
        "set": [TextSource(hub=str(folder / "set"))],
        "set and files": [TextSource(hub=str(folder / "set")), TextSource(path=path["one"])],
        "several documents a row": [TextSource(path=path["many"])],
    }


KINDS = ["local", "mixture", "set", "set and files", "several documents a row"]


@pytest.fixture
def prepared(tokenizer, tmp_path, monkeypatch):
    """Prepare in a cache of this name."""

    def prepared(sources, cache, processes=1, limit=None, **options):
        monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / cache))
        options |= {"separator": None, "seed": 3, "limit": limit, "where": "data.train", "how": Tokenising(processes)}
        return prepare(sources, tokenizer, **options)

    return prepared


def content(folder):
    """The bytes of everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stopping(monkeypatch, after, error=KeyboardInterrupt):
    """Have the document of this number end the preparation."""
    add = shards.Writer.add

    def counted(self, *given):
        if self.documents == after:
            raise error()
        add(self, *given)

    monkeypatch.setattr(shards.Writer, "add", counted)
    return lambda: monkeypatch.setattr(shards.Writer, "add", add)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_whatever_the_processes(prepared, sources, kind):
    one, three = (prepared(sources[kind], f"by {count}", count) for count in (1, 3))
    assert content(one) == content(three)
    text = load(one)
    assert len(text.shards) > 3 and all(SIZE <= shard.counts.tokens < SIZE + 200 for shard in text.shards[:-1])
    assert (
        sorted(path.name for path in one.iterdir())[-1] == "meta.json" and len(list(one.iterdir())) == len(text.shards) + 1
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_preparation_goes_on(prepared, sources, kind, monkeypatch, tmp_path):
    """From every shard on, to the same bytes; rows whose documents are all in whole shards are not tokenised again."""
    whole = prepared(sources[kind], "whole")
    text = load(whole)
    for after in (0, 3, text.meta.documents // 2, text.meta.documents - 1):
        with pytest.raises(KeyboardInterrupt):
            again = stopping(monkeypatch, after)
            prepared(sources[kind], "parts", 2)
        again()
        done = sum(shard.first_document + shard.counts.documents <= after for shard in text.shards)
        left = list((tmp_path / "parts" / "prepared").glob(".unfinished-*/0*"))
        assert len(left) == done and not list((tmp_path / "parts").rglob(".writing"))
    seen, encode = [], pieces._ids
    monkeypatch.setattr(pieces, "_ids", lambda made, texts, **options: seen.extend(texts) or encode(made, texts, **options))
    parts = prepared(sources[kind], "parts")
    assert content(parts) == content(whole)
    rest = sum(shard.counts.documents for shard in text.shards[done:])
    assert len(seen) <= rest + 2 * pieces.ROWS < text.meta.documents  # the tokenizer is also asked how texts open


def test_what_was_read_of_files_is_not_read_again(prepared, sources, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        again = stopping(monkeypatch, 100)
        prepared(sources["local"], "parts")
    again()
    monkeypatch.setattr("distill.text.sources.read", lambda *given: pytest.fail("a file was read again"))
    assert len(load(prepared(sources["local"], "parts")).shards) > 3


def test_a_limit_counts_over_shards_and_attempts(prepared, sources, monkeypatch):
    whole = prepared(sources["mixture"], "whole", limit=2000)
    with pytest.raises(KeyboardInterrupt):
        again = stopping(monkeypatch, load(whole).meta.documents // 2)
        prepared(sources["mixture"], "parts", limit=2000)
    again()
    assert content(prepared(sources["mixture"], "parts", limit=2000)) == content(whole)
    assert 2000 <= load(whole).tokens < 2100


def work(tokenizer, source, cache, processes, at_it, go_on, said):
    """What a killed process does: prepares, and waits in the middle of the third shard."""
    os.environ["DISTILL_CACHE"] = str(cache)
    sys.stderr = said.open("w", buffering=1)
    add = shards.Writer.add

    def waiting(self, *given):
        if self.shards == 2 and self.open and not at_it.is_set():
            at_it.set()
            go_on.wait()
        add(self, *given)

    shards.Writer.add = waiting
    options = {"separator": None, "seed": 3, "limit": None, "where": "data.train", "how": Tokenising(processes)}
    try:
        prepare([source], tokenizer, **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@pytest.fixture
def begun(tokenizer, sources, tmp_path):
    """Processes that prepare: each with what lets it go on, and the file of its standard error."""
    context, processes = multiprocessing.get_context("fork"), []

    def begun(count=1, waits=True):
        at_it, go_on, said = context.Event(), context.Event(), tmp_path / f"said {len(processes)}"
        arguments = (tokenizer, sources["local"][1], tmp_path / "parts", count, at_it, go_on, said)
        process = context.Process(target=work, args=arguments)
        processes.append(process)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            process.start()
        assert not waits or at_it.wait(60), said.read_text()
        return process, go_on, said

    yield begun
    for process in processes:
        process.kill()


def children(process):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
def test_kill_9_in_the_middle_of_a_shard(prepared, sources, begun, tmp_path):
    """What is whole stays; the processes that tokenise end too; whoever comes goes on to the same bytes."""
    process, _, _ = begun(2)
    workers = children(process)
    assert len(workers) == 2
    process.kill()
    process.join()
    (left,) = (tmp_path / "parts" / "prepared").glob(".unfinished-*")
    assert {"00000", "00001", ".writing"} <= {path.name for path in left.iterdir()}
    until = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, workers))
    stamp = (left / "00001" / "tokens.npy").stat().st_ino
    parts = prepared(sources["local"][1:], "parts")
    assert content(parts) == content(prepared(sources["local"][1:], "whole")) and not left.exists()
    assert (parts / "00001" / "tokens.npy").stat().st_ino == stamp


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
def test_a_killed_worker_is_one_message(prepared, sources, begun, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "ROWS", 2)
    process, go_on, said = begun(2)
    for worker in children(process):
        os.kill(worker, signal.SIGKILL)
    go_on.set()
    process.join(60)
    assert process.exitcode == 2
    wanted = "error: a process that tokenises was killed from outside, perhaps because memory ran out; give the same command"
    assert said.read_text().startswith(wanted) and said.read_text().count("\n") == 1
    assert content(prepared(sources["local"][1:], "parts")) == content(prepared(sources["local"][1:], "whole"))


def test_two_at_once(prepared, sources, begun, tmp_path):
    """The second waits and says for whom, and finds what the first made."""
    first, go_on, _ = begun()
    second, _, said = begun(waits=False)
    until = time.monotonic() + 30
    while not (said.exists() and said.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    assert said.read_text().startswith(f"data.train: process {first.pid} on ") and "; waiting for it" in said.read_text()
    go_on.set()
    first.join(60), second.join(60)
    assert first.exitcode == second.exitcode == 0 and said.read_text().count("\n") == 1
    (made,) = (tmp_path / "parts" / "prepared").iterdir()
    assert content(made) == content(prepared(sources["local"][1:], "whole"))


def test_a_shard_that_is_gone_is_made_again(prepared, sources, monkeypatch):

    for kind in ("local", "mixture", "set"):
        folder = prepared(sources[kind], "cache")
        before, count = content(folder), len(load(folder).shards)
        for gone in ([1], [0, 2], [count - 1]):
            for number in gone:
                shutil.rmtree(folder / f"{number:05d}")
            with pytest.raises(UserError, match=rf"lacks its shard .*{gone[0]:05d}; the same command makes it again"):
                load(folder)
            assert prepared(sources[kind], "cache") == folder and content(folder) == before
    (folder / "00001" / "tokens.npy").unlink()
    with pytest.raises(UserError, match=r"delete .*/00001, and the same command makes it again"):
        _ = load(folder).shards[1].tokens


def test_a_damaged_shard_is_seen_when_it_is_read(prepared, sources):

    folder = prepared(sources["local"], "cache")
    file = folder / "00002" / "tokens.npy"
    altered = bytearray(file.read_bytes())
    altered[-3] ^= 1
    file.write_bytes(altered)
    windows = Windows(folder, 8, 0)
    per_shard = (windows.prepared.shards[0].counts.tokens - 1) // 8
    windows.batch(0, per_shard)
    with pytest.raises(UserError, match=r"00002/tokens.npy is not what was written .*; delete .*/00002, and the same"):
        windows.batch(0, 3 * per_shard)
    shutil.rmtree(folder / "00002")
    prepared(sources["local"], "cache")
    Windows(folder, 8, 0).batch(0, 3 * per_shard)
    shutil.rmtree(folder / "00001")
    shutil.copytree(folder / "00002", folder / "00001")
    with pytest.raises(UserError, match=r"00001 is a shard of another text; delete .*/00001, and the same command makes it"):
        Windows(folder, 8, 0).batch(0, 2 * per_shard)


def test_files_that_changed_between_two_attempts(prepared, tmp_path, monkeypatch):
    """The text of the first attempt is no part of the second's, though its content is what it was when it was named."""
    file = tmp_path / "x.jsonl"
    rows = "".join(json.dumps({"text": f"row {n} " * 30}) + "\n" for n in range(40))
    file.write_text(rows)
    with pytest.raises(KeyboardInterrupt):
        again = stopping(monkeypatch, 30)
        prepared([TextSource(path=str(file))], "parts")
    again()
    (left,) = (tmp_path / "parts" / "prepared").glob(".unfinished-*")
    (left / "00000" / "meta.json").write_text("not what was written")
    os.utime(file, ns=(1, 1))
    assert content(prepared([TextSource(path=str(file))], "parts")) == content(
        prepared([TextSource(path=str(file))], "whole")
    )


def test_what_nobody_goes_on_with_goes(prepared, sources, monkeypatch, tmp_path):
    """Parts of other texts stay for a month; what has none goes at once."""
    place = tmp_path / "cache" / "prepared"
    for name in ("old", "new", "empty"):
        (place / f".unfinished-{name}" / ("reading" if name == "empty" else "00000")).mkdir(parents=True)
    os.utime(place / ".unfinished-old", (1, 1))
    prepared(sources["local"], "cache")
    assert [path.name for path in place.glob(".unfinished-*")] == [".unfinished-new"]


def test_a_full_disk_keeps_what_is_whole(tokenizer, sources, tmp_path, monkeypatch):
    options = {"separator": None, "seed": 3, "limit": None, "where": "data.train"}
    with small_disk_at(tmp_path / "disk", "1m") as disk:
        monkeypatch.setenv("DISTILL_CACHE", str(disk / "cache"))
        add, filler = shards.Writer.add, disk / "filler"

        def filling(self, *given):
            if self.shards == 2 and not filler.exists():
                with pytest.raises(OSError), filler.open("wb", buffering=0) as file:  # twice what the disk holds
                    for _ in range(2000):
                        file.write(b"x" * 1000)
            add(self, *given)

        full = rf"data\.train could not be prepared: .*{os.strerror(errno.ENOSPC)}.*DISTILL_CACHE"
        with monkeypatch.context() as patch, pytest.raises(UserError, match=full):
            patch.setattr(shards.Writer, "add", filling)
            prepare(sources["local"], tokenizer, **options)
        (left,) = (disk / "cache" / "prepared").iterdir()
        assert {path.name for path in left.iterdir()} == {"00000", "00001", "reading", "stamps.json"}
        filler.unlink()
        parts = content(prepare(sources["local"], tokenizer, **options))
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "whole"))
    assert parts == content(prepare(sources["local"], tokenizer, **options))


# windows of several shards


@pytest.fixture
def three(tmp_path):
    """Three shards of 40, 40 and 30 tokens, each its own place."""
    lengths = [20, 20, 35, 5, 30]
    write(tmp_path / "three", np.arange(110, dtype=np.uint16), np.cumsum([0, *lengths])[:-1], [0] * 5, ["a"], size=40)
    return tmp_path / "three"


@pytest.fixture(autouse=True)
def folder_of_three(tmp_path):
    (tmp_path / "three").mkdir()


def test_windows_of_several_shards(three):
    windows = Windows(three, 8, 5)
    assert windows.count == 4 + 4 + 3  # none goes over the end of a shard
    wanted = [0, 8, 16, 24, 40, 48, 56, 64, 80, 88, 96]
    epochs = [windows.batch(epoch * 11, 11).ids[:, 0].tolist() for epoch in range(4)]
    assert all(sorted(epoch) == wanted for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    for first, last in ((0, 4), (4, 8), (8, 11)):
        assert set(epochs[0][first:last]) == set(wanted[first:last])
    assert len({tuple(np.searchsorted([40, 80], epoch, side="right")) for epoch in epochs}) > 1  # of the shards too
    whole = windows.batch(0, 30)
    parts = [Windows(three, 8, 5).batch(first, 6) for first in range(0, 30, 6)]
    assert whole.trained is None and whole.loss_weights is whole.weights
    for name, value in vars(whole).items():
        assert value is None or torch.equal(value, torch.cat([getattr(part, name) for part in parts])), name
    assert torch.equal(whole.targets, whole.ids + 1)
    assert Windows(three, 8, None).batch(0, 12).ids[:, 0].tolist() == [*wanted, 0]


def test_the_first_windows_need_the_first_shard(three):
    for number in (1, 2):
        (three / f"0000{number}" / "tokens.npy").write_bytes(b"")
    windows = Windows(three, 8, 5)
    assert windows.batch(0, 4).ids.max() < 40
    with pytest.raises(UserError, match=r"00001/tokens\.npy is not what was written"):
        windows.batch(0, 5)


def test_one_shard_has_the_order_of_its_seed(tmp_path):
    """The permutation of all windows, as it was before there were shards."""
    (tmp_path / "one").mkdir()
    write(tmp_path / "one", np.arange(4001, dtype=np.uint16), np.asarray([0]), [0], ["a"])
    for seed, epoch in ((0, 0), (7, 0), (7, 3)):
        right = np.random.default_rng([seed, epoch]).permutation(500) * 8
        assert Windows(tmp_path / "one", 8, seed).batch(500 * epoch, 500).ids[:, 0].tolist() == right.tolist()


# processes, progress, the verb


def test_how_many_processes(monkeypatch):
    monkeypatch.setattr(tokenising, "usable_cores", lambda: 16)
    monkeypatch.setattr(tokenising.sys, "platform", "linux")
    assert [tokenising.processes_for(size) for size in (1000, None, 10**9)] == [1, 16, 16]
    assert tokenising.processes_for(1000, 5) == 5 and tokenising.processes_for(None, 1) == 1
    monkeypatch.setattr(tokenising.sys, "platform", "darwin")
    assert tokenising.processes_for(None) == 1
    monkeypatch.setattr(tokenising.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(UserError, match="--processes is 4, but this system cannot fork processes; leave it out"):
        tokenising.processes_for(None, 4)


@pytest.mark.parametrize(
    ("tokens", "begun", "limit", "share", "seconds", "said"),
    [
        (5_000, 0, 20_000, None, 10, "5,000 tokens of 7 documents prepared, 500 tokens/s, 30 s left"),
        (5_000, 3_000, 20_000, 0.5, 10, "200 tokens/s, 25 s left"),
        (5_000, 0, None, 0.01, 10, "500 tokens/s, 16 min left"),
        (5_000, 0, None, 0.001, 10, "500 tokens/s, 2.8 h left"),
        (5_000, 0, None, None, 10, "500 tokens/s"),
        (5_000, 5_000, None, 0.5, 10, "0 tokens/s"),
    ],
)
def test_progress(tokens, begun, limit, share, seconds, said):
    line, _ = progress.TextProgress("data.train", begun, limit, None).line(tokens, 7, share, seconds)
    assert line.endswith(said) if "left" in said or said.endswith("tokens/s") else line == said


def test_progress_as_lines(prepared, sources, monkeypatch, capsys):
    monkeypatch.setattr(progress, "TICKS", 0.0)
    prepared(sources["local"], "cache")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 100 and all(line.startswith("data.train: ") and "tokens/s" in line for line in lines)


def test_the_verb(tiny_recipe, tmp_path, monkeypatch):
    """Prepares every text of a recipe without its teacher's weights; a run prepares nothing after it."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.jsonl").write_text(json.dumps({"text": "the river runs on " * 400}))
    tiny_recipe["stages"][3]["imitate"] |= {"data": [{"path": str(tmp_path / "own.jsonl")}], "seq_len": 64}
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *given, **options: pytest.fail("loaded"))
        made = distill.prepare(tiny_recipe, processes=2)
    assert list(made) == ["data.heldout", "data.train", "stages.3.imitate.data"]
    for facts in made.values():
        text = load(type(tmp_path)(facts["folder"]))
        assert (text.tokens, len(text.shards), text.meta.sha256) == (facts["tokens"], facts["shards"], facts["sha256"])
    assert list(made["stages.3.imitate.data"]["windows"]) == ["64"]
    monkeypatch.setattr(preparation, "_write", lambda *given: pytest.fail("prepared again"))
    distill.run(tiny_recipe, runs=tmp_path / "runs")
    for processes in (0, 1025):
        with pytest.raises(UserError, match="processes is"):
            distill.prepare(tiny_recipe, processes=processes)


MEASURED = """
import json, random, resource, sys
from transformers import AutoTokenizer
from distill.recipe import TextSource
from distill.text.preparation import Tokenising, prepare
folder, teacher, tokens, processes = sys.argv[1:]
most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tokenizer, chance = AutoTokenizer.from_pretrained(teacher), random.Random(1)
words = ["river", "the", "runs", "on", "and", "over", "stones", "to", "sea", "a", "valley", "lies", "below"]
rows = [" ".join(chance.choices(words, k=chance.randint(50, 900))) for _ in range(60)]
each = sum(len(ids) for ids in tokenizer(rows)["input_ids"])
for name, count in (("little", 1), ("much", -(-int(tokens) // each))):
    with open(f"{folder}/{name}.jsonl", "w") as file:
        for turn in range(count):
            file.writelines(json.dumps({"text": f"{turn} {row}"}) + "\\n" for row in rows)
options = {"separator": None, "seed": 0, "limit": None, "where": "x", "how": Tokenising(int(processes))}
prepare([TextSource(path=f"{folder}/little.jsonl")], tokenizer, **options)
before = most()
made = prepare([TextSource(path=f"{folder}/much.jsonl")], tokenizer, **options)
print(most() - before, json.loads((made / "meta.json").read_text())["tokens"])
"""


def test_memory(tmp_path, tiny_teacher):
    """Two million tokens of made-up text add at most 200 MiB to the process."""
    command = [sys.executable, "-c", MEASURED, str(tmp_path), str(tiny_teacher), "2000000", "2"]
    environment = os.environ | {"DISTILL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    taken, tokens = map(int, done.stdout.split())
    assert tokens >= 2_000_000 and taken < 200 * 2**20, f"{taken / 2**20:.0f} MiB for {tokens:,} tokens"
