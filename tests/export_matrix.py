"""The export matrix: every student in every engine, proved there, as a table. `python -m tests.export_matrix --help`.

`make test-export` runs it in environments of its own. It ends with 1 where an export that should run in an engine is not the
student there, or where an engine that was asked for did not prove anything.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from distill.errors import UserError
from distill.exporters import EXPORTERS, target
from distill.exporters.containers import fitting
from distill.exporters.engines import ENGINES, parsed, pythons
from distill.exporters.proofs import Proof, prove
from distill.exporters.proofs.asked import Reading
from distill.exporters.source import Source
from distill.exporters.target import Form
from distill.reports.tables import markdown
from tests.export.rows import students

BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
OLDEST = "oldest transformers"


@dataclass
class Line:
    """One student: the class that holds it, what each engine proved or said, bytes by target, and what failed."""

    student: str
    container: str
    cells: dict[str, dict] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def proofs_of(student: Path, to: str, place: Path, found: dict[str, str], say, line: Line, reading: Reading) -> list[Proof]:
    """Write and prove one export; what fails is noted."""
    source, form, out = Source.read(student), Form(), place / to
    if reason := target(to).refuses(source):
        return [Proof(engine, "cannot", reason) for engine in ENGINES]
    try:
        if not out.exists():
            target(to).write(student, out, form)
        line.sizes[to] = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
        return prove(student, out, target(to), source, form, pythons=found, say=say, reading=reading)
    except (UserError, ValueError, OSError) as error:
        line.failures.append(f"{to}: {error}")
        return []


def line_of(name: str, student: Path, place: Path, found: dict[str, str], oldest: str | None, say, reading: Reading) -> Line:
    """Every engine's word on one student. llama.cpp reads what `gguf` writes, the others what `native` does."""
    source = Source.read(student)
    container = fitting(source).container
    line = Line(name, "none" if container is None else container.name)
    for proof in proofs_of(student, "native", place, found, say, line, reading):
        if proof.engine != "llama.cpp":
            line.cells[proof.engine] = asdict(proof)
    if oldest:
        for proof in proofs_of(student, "native", place, {"transformers": oldest}, say, line, replace(reading, tokens=50)):
            if proof.engine == "transformers":
                line.cells[OLDEST] = asdict(proof)
    if "gguf" in EXPORTERS:
        for proof in proofs_of(student, "gguf", place, found, say, line, reading):
            if proof.engine == "llama.cpp":
                line.cells[proof.engine] = asdict(proof)
    return line


def lines(arguments, found: dict[str, str], say) -> Iterator[Line]:
    for name, make in students(arguments.trained).items():
        if arguments.rows and not any(part.lower() in name.lower() for part in arguments.rows):
            continue
        with tempfile.TemporaryDirectory(prefix="distill-matrix-") as scratch:
            say(f"== {name}")
            student = Path(make(Path(scratch) / "student"))
            reading = Reading(tokens=arguments.tokens)
            yield line_of(name, student, Path(scratch), found, arguments.oldest, say, reading)
            shutil.rmtree(student, ignore_errors=True)


def table(made: list[Line]) -> str:
    """The matrix in Markdown, and its reasons below."""
    columns = ["transformers", OLDEST, "vllm", "mlx", "llama.cpp"]
    versions = {
        column: next((v for line in made if (v := line.cells.get(column, {}).get("version"))), "") for column in columns
    }
    reasons: list[str] = []
    heads = [f"{column.replace('oldest transformers', 'transformers')} {versions[column]}".strip() for column in columns]
    rows = []
    for line in made:
        cells = [cell(line.cells.get(column), reasons, line) for column in columns]
        size = ", ".join(f"{line.sizes[to] / 1e6:.1f} MB" if to in line.sizes else "-" for to in ("native", "gguf"))
        rows.append([line.student, line.container, *cells, size])
    text = markdown(["student", "class", *heads, "native, gguf"], rows)
    return text + "\n\n" + "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)) + "\n"


def cell(proof: dict | None, reasons: list[str], line: Line) -> str:
    """What one engine proved, in few words; a reason is a number of the list below the table."""
    if proof is None:
        return "**failed**" if line.failures else "-"
    if proof["state"] == "absent":
        return "not installed"
    if proof["state"] == "cannot":
        if proof["why"] not in reasons:
            reasons.append(proof["why"])
        return f"no ({reasons.index(proof['why']) + 1})"
    numbers = proof["numbers"]
    named = (("logits", "logits"), ("log-probabilities", "log-probabilities"), ("kl", "KL"))
    known = [f"{said} {numbers[key]:.0e}" for key, said in named if key in numbers]
    if "logits" not in numbers and "log-probabilities" not in numbers:
        known.append(f"top-1 {numbers['top-1 agreement']:.1%}")
    said = ", ".join(known[:1] if "logits" in numbers else known[:2])
    if dtype := numbers.get("compared with the student in"):
        said += f" ({dtype}; float32 rounds {numbers['log-probabilities, rounded to float32']:.0e})"
    return f"{said}; {numbers['tokens']}"


def into(page: Path, text: str) -> None:
    """Put the matrix into a page, between its marks."""
    before, begin, rest = page.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} has no {BEGIN} ... {END} to put the matrix between")
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", action="append", default=[], help="NAME=PYTHON; DISTILL_ENGINES names more")
    parser.add_argument("--oldest", help="the Python of an environment with the oldest supported transformers")
    parser.add_argument("--rows", action="append", default=[], help="only students whose name has this part")
    parser.add_argument("--tokens", type=int, default=200, help="greedy tokens behind each prompt")
    parser.add_argument("--no-trained", dest="trained", action="store_false", help="leave out the student that is trained")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--page", type=Path, help="put the table into this page")
    arguments = parser.parse_args()
    found, start, made = pythons(parsed(arguments.engine)), time.perf_counter(), []

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:7.1f} s  {line}", flush=True)

    for line in lines(arguments, found, say):
        made.append(line)
        for failure in line.failures:
            say(f"FAILED {line.student}: {failure}")
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(each) for each in made], indent=1) + "\n")
    print(table(made))
    if arguments.page:
        into(arguments.page, table(made))
    silent = [name for name in found if not any(line.cells.get(name, {}).get("state") == "proved" for line in made)]
    for name in silent:
        say(f"FAILED: {name} was asked for and proved nothing")
    return int(bool(silent or any(line.failures for line in made)))


if __name__ == "__main__":
    sys.exit(main())
