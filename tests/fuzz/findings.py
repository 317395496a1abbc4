"""Findings grouped by cause, each with the inputs that show it."""

import json
from collections import Counter
from pathlib import Path


class Causes:
    """Every cause found so far. save: a folder for the first input of each."""

    def __init__(self, save: Path | None = None, echo: bool = True) -> None:
        self.known: dict[tuple, dict] = {}
        self.save, self.echo, self.kinds = save, echo, Counter()

    def add(self, name: str, case, findings: list) -> None:
        """Note what a case showed."""
        self.kinds[case.kind] += 1
        for finding in findings:
            new = finding.cause not in self.known
            entry = self.known.setdefault(
                finding.cause, {"name": name, "case": case, "detail": finding.detail, "kinds": Counter(), "inputs": []}
            )
            entry["kinds"][case.kind] += 1
            entry["inputs"].append(name)
            if new and self.echo:
                print(_entry(len(self.known), finding.cause, entry), flush=True)
            if new and self.save:
                self.save.mkdir(parents=True, exist_ok=True)
                with (self.save / f"{case.kind.replace(' ', '_')}.jsonl").open("a") as file:
                    file.write(case.text() + "\n")

    def told(self, tried: int, seconds: float) -> str:
        """All causes, the most frequent first, and how much was tried."""
        ordered = sorted(self.known.items(), key=lambda one: -sum(one[1]["kinds"].values()))
        tried_kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.kinds.items()))
        lines = [_entry(number, cause, entry) for number, (cause, entry) in enumerate(ordered, 1)]
        lines.append(f"{tried} inputs in {seconds:.0f} s ({tried_kinds}): {len(self.known) or 'no'} causes of findings")
        return "\n".join(lines)


def _entry(number: int, cause: tuple, entry: dict) -> str:
    what, type_, frame = cause
    times = sum(entry["kinds"].values())
    seen = ", ".join(entry["kinds"])
    shown = {"commands": entry["case"].commands, "steps": entry["case"].steps}
    data = json.dumps(shown)
    return (
        f"{number}. {what}: {type_ or '-'} in {frame or '-'}  ({times} x, {seen})\n"
        f"     again: python -m tests.fuzz {' '.join(entry['inputs'][:3])}\n"
        f"     input: {data[:500]}\n     {entry['detail'][:500]!r}"
    )
