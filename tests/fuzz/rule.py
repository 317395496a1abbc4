"""The rule: a command ends with 0, 2 or 3 and says one thing; it touches nothing of others, and runs nothing that came with
the input.

A breach is a `Finding`, and its cause is what was breached, the exception and our innermost function.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.forked import Outcome
from tests.fuzz.values import MARK

LONGEST = 4000  # characters of a message; what is longer is the input itself
WORDS_OF_PYTHON = re.compile(
    r"'\w+' object |NoneType|object is not|unsupported operand|not supported between|index out of range|positional argument"
    r"|indices must be|\b(Key|Type|Attribute|Index|Assertion|Runtime|Recursion|Overflow|Unicode\w+)Error\b"
    r"|unexpected keyword|recursion depth|mat1 and mat2|too large to convert|values to unpack|cannot unpack"
    r"|invalid literal for|could not convert|math domain|argument of type|os\.PathLike|embedded null|int too (large|big)"
    r"|\(['\"][\w.]+['\"]\)|must be real number|Exceeds the limit|size mismatch for"
    r"|out of bounds for|surrogates not allowed|'\w+' codec"
)
WITHOUT_REASON = re.compile(r"(?<!shape )\(\)|: *;|; *;|: None\b|: *$|error: *$|\( *;")
VERBATIM = ("generate", "report", "export", "recipes")  # whose standard output is a text or a path, for programs too
QUOTED = re.compile(r"""'[^'\n]*'|"[^"\n]*"|\{.*\}|\[.*\]""")  # what was given may hold anything
ASIDE = re.compile(r"""\(".*"\)""")  # what a library said, quoted behind what we say
COMPLAINT = re.compile(r"^error: |─ Error ─", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """A breach. what: of the rule. type, frame: of the exception; detail: what was said or touched, for people."""

    what: str
    type: str
    frame: str
    detail: str

    @property
    def cause(self) -> tuple[str, str, str]:
        """What makes two findings one."""
        return self.what, self.type, self.frame


def judge(outcome: Outcome, argv: list[str]) -> list[Finding]:
    """What one command did wrong, the gravest alone."""
    error, told = outcome.error or {}, f"{outcome.output}\n{outcome.said}"
    root = error
    while root.get("cause"):
        root = root["cause"]

    def found(what: str, detail: str, at: dict = error) -> list[Finding]:
        where = at.get("frame") or error.get("frame") or at.get("deepest", "")
        return [Finding(what, at.get("type", ""), where, f"{detail} [{root.get('type')} in {root.get('deepest')}]")]

    if outcome.wrote:
        return found("writes elsewhere", ", ".join(outcome.wrote))
    if outcome.stopped:
        return found({"time": "hangs", "memory": "memory without bound"}[outcome.stopped], "stopped by the watchdog")
    if outcome.code < 0:
        return found("killed by a signal", str(outcome.code))
    if "panicked at" in told:
        return found("panic", _line(told, "panicked at"))
    if outcome.code not in (0, 2, 3) or "Traceback (most recent call last)" in told:
        return found("traceback", f"exit {outcome.code}: {error.get('message', '') or told.strip()[-200:]}")
    shown = outcome.said if argv and argv[0] in VERBATIM else told
    if "\x1b" in shown:
        return found("escape bytes", repr(_line(shown, "\x1b")))
    deepest = {**root, "frame": error.get("frame", "")}
    return _message(outcome, lambda what, detail: found(what, detail, deepest)) if outcome.code else []


def _message(outcome: Outcome, found) -> list[Finding]:
    """What is wrong with the message of a command that ended with 2 or 3."""
    said = outcome.said[match.start() :] if (match := re.search("^(error|stopped): ", outcome.said, re.MULTILINE)) else ""
    said = said.strip() or outcome.said.strip()
    complaints = len(COMPLAINT.findall(outcome.said))
    if outcome.code == 2 and complaints != 1:
        return found("not one message", f"{complaints} messages: {said[:300]}")
    if len(said) > LONGEST:
        return found("endless message", f"{len(said)} characters: {said[:200]}")
    if match := WORDS_OF_PYTHON.search(ASIDE.sub("", said)):
        return found("Python's words", f"{match[0]!r} in: {said[:400]}")
    if match := WITHOUT_REASON.search(QUOTED.sub("x", said)):
        return found("no reason", f"{match[0]!r} in: {said[:400]}")
    return []


def _line(text: str, part: str) -> str:
    return next((line for line in text.splitlines() if part in line), "")[:300]


def accepted(folder: Path, argv: list[str]) -> list[Finding]:
    """What a command that ended with 0 left in the run folders: all of a finished run, and pages without markup."""
    findings = []
    for run in sorted((folder / "runs").glob("[!.]*")):
        facts = _json(run / "run.json")
        if (
            argv[0] == "run"
            and isinstance(facts, dict)
            and facts.get("finished") is True
            and run.name.startswith(_name(argv))
        ):
            absent = [n for n in ("student/model.safetensors", "report.html", "evaluations.json") if not (run / n).is_file()]
            findings += [Finding("finished without", "", name, f"{run.name} has no {name}") for name in absent]
        for page in run.glob("report.html"):
            if page.is_file() and MARK in page.read_text(errors="replace"):
                findings.append(Finding("markup in a page", "", page.name, f"{MARK} stands in {page.name} as it is"))
    return findings


def _name(argv: list[str]) -> str:
    return Path(argv[1]).stem if len(argv) > 1 else ""


def _json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


# What `plan` cannot know without `--check`: it reads the teacher's config alone.
NEEDS_TEACHER = ("the tokenizer has no token",)


def disagreement(planned: Outcome, ran: Outcome) -> list[Finding]:
    """Where plan and run do not say the same of an input."""
    error = ran.error or planned.error or {}
    if planned.code == 0 and ran.code == 2 and not any(part in ran.said for part in NEEDS_TEACHER):
        return [Finding("plan accepts, run refuses", error.get("type", ""), error.get("frame", ""), ran.said.strip()[-300:])]
    if planned.code == 2 and ran.code in (0, 3):
        return [Finding("plan refuses, run accepts", error.get("type", ""), error.get("frame", ""), planned.said[-300:])]
    return []


def late(before: int, after: int, outcome: Outcome) -> list[Finding]:
    """A refusal after steps were taken. Numbers that are not finite show only there."""
    error = outcome.error or {}
    if outcome.code == 2 and after > before and error.get("type") != "NonFinite":
        return [
            Finding("refuses after training", error.get("type", ""), error.get("frame", ""), outcome.said.strip()[-300:])
        ]
    return []
