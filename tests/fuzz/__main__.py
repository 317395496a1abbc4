"""`python -m tests.fuzz`: seeds until the time is up, or single ones again; findings grouped by cause, exit status 1 where any is."""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def main() -> int:
    """Parse the command line, try the cases, print what they show."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("inputs", nargs="*", help="SEED, SEED:INDEX, or a file of the corpus (all of it: corpus)")
    parser.add_argument("--seconds", type=float, help="try seed after seed for so long (FUZZ_SECONDS, or 600)")
    parser.add_argument("--first", type=int, default=0, help="the seed to begin with")
    parser.add_argument("--kinds", help="only these kinds of input, with commas between")
    parser.add_argument("--save", type=Path, help="write the first input of every cause into this folder")
    parser.add_argument("--quiet", action="store_true", help="print causes alone, at the end")
    asked = parser.parse_args()

    from tests.fuzz import forked
    from tests.fuzz.draws import Trees
    from tests.fuzz.findings import Causes
    from tests.fuzz.world import World

    forked.preload()
    folder, began = Path(tempfile.mkdtemp(prefix="distill-fuzz-")), time.monotonic()
    causes, wanted = Causes(asked.save, echo=not asked.quiet), set((asked.kinds or "").split(",")) - {""}
    try:
        world = World(folder)
        seconds = asked.seconds or float(os.environ.get("FUZZ_SECONDS", "600"))
        for name, case in inputs(asked.inputs, asked.first, Trees(world.pristine)):
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


def inputs(named: list[str], first: int, trees) -> Iterator[tuple]:
    """Names and cases: those asked for, or seed after seed without end."""
    from tests.fuzz.draws import cases_of
    from tests.fuzz.world import Case

    if not named:
        number = first
        while True:
            yield from ((f"{number}:{index}", case) for index, case in enumerate(cases_of(number, trees)))
            number += 1
    for name in named:
        path = CORPUS if name == "corpus" else Path(name)
        if path.exists():
            for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
                for number, line in enumerate(file.read_text().splitlines(), 1):
                    yield f"{file}:{number}", Case(**json.loads(line))
            continue
        number, _, index = name.partition(":")
        for place, case in enumerate(cases_of(int(number), trees)):
            if not index or place == int(index):
                yield f"{number}:{place}", case


if __name__ == "__main__":
    sys.exit(main())
