"""`python -m tests.fuzz`: the corpus, then seeds until the time is up, or single inputs again. Findings are grouped by
cause; the exit status is 1 where there is any.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
SEED = 20261127  # of the part of the corpus that the suite replays


def main() -> int:
    """Parse the command line, try the cases, print what they show."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("inputs", nargs="*", help="SEED, SEED:INDEX, FILE.jsonl, FILE.jsonl:LINE, or corpus")
    parser.add_argument("--seconds", type=float, help="the corpus, then seed after seed for so long (FUZZ_SECONDS, or 600)")
    parser.add_argument("--first", type=int, default=0, help="the seed to begin with")
    parser.add_argument("--sample", type=int, help="so many of the inputs, always the same ones")
    parser.add_argument("--kinds", help="only these kinds of input, with commas between")
    parser.add_argument("--controls", action="store_true", help="first see that the rule finds breaches made on purpose")
    parser.add_argument("--save", type=Path, help="write the first input of every cause into this folder")
    parser.add_argument("--quiet", action="store_true", help="print causes at the end alone")
    asked = parser.parse_args()

    from tests.fuzz import controls, forked
    from tests.fuzz.draws import Trees
    from tests.fuzz.findings import Causes
    from tests.fuzz.world import World

    forked.preload()
    folder, began = Path(tempfile.mkdtemp(prefix="distill-fuzz-")), time.monotonic()
    causes, wanted = Causes(asked.save, echo=not asked.quiet), set((asked.kinds or "").split(",")) - {""}
    seconds = asked.seconds or float(os.environ.get("FUZZ_SECONDS", "600"))
    try:
        world = World(folder)
        if asked.controls and (wrong := controls.missed(world.folder / "case")):
            print("the rule does not see what it should: " + "; ".join(wrong), file=sys.stderr)
            return 2
        for name, case in sampled(inputs(asked.inputs, asked.first, Trees(world.pristine)), asked.sample):
            if not asked.inputs and time.monotonic() - began > seconds:
                break
            if not wanted or case.kind in wanted:
                causes.add(name, case, world.try_(case))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for case in world.undone:
        print(f"this damage could not be done: {case}", file=sys.stderr)
    print(causes.told(world.tried, time.monotonic() - began))
    return 1 if causes.known else 0


def sampled(found: Iterator[tuple], count: int | None) -> Iterator[tuple]:
    """All, or so many of them, in their order."""
    if count is None:
        yield from found
        return
    every = list(found)
    for index in sorted(random.Random(SEED).sample(range(len(every)), min(count, len(every)))):
        yield every[index]


def inputs(named: list[str], first: int, trees) -> Iterator[tuple]:
    """Names and cases: those asked for, or the corpus and then seed after seed without end."""
    from tests.fuzz.draws import cases_of

    for name in named or ["corpus"]:
        path, _, line = name.partition(":")
        if path.isdigit():
            cases = enumerate(cases_of(int(path), trees))
            yield from ((f"{path}:{index}", case) for index, case in cases if not line or index == int(line))
        else:
            yield from written(CORPUS if path == "corpus" else Path(path), line)
    number = first
    while not named:
        yield from ((f"{number}:{index}", case) for index, case in enumerate(cases_of(number, trees)))
        number += 1


def written(path: Path, line: str) -> Iterator[tuple]:
    """The cases of a file, of one of its lines, or of a folder's files."""
    from tests.fuzz.world import Case

    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        shown = os.path.relpath(file)
        for number, text in enumerate(file.read_text().splitlines(), 1):
            if not line or number == int(line):
                yield f"{shown}:{number}", Case(**json.loads(text))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)  # libraries that were imported and never used complain of leaks at an ordinary exit
