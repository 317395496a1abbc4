"""The place, made once, and cases tried on copies of it."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from distill.shipped import SCHEMA
from tests.fuzz import damage, damage_models, forked, place, rule
from tests.fuzz.values import real

STEPS = (damage, damage_models)  # imported, they have filled the table of steps
WORKED_ON = ("answers", "cache")  # verbs that go on with the folder of --out, under a lock beside it
OWN = ("runs", "cache", "home", "tmp")  # what commands may write to


@dataclass(frozen=True)
class Case:
    """An input: what is done to the place, and the commands that then meet it. answers: what the terminal types. compare:
    whether the first two are a plan and a run, which should agree."""

    kind: str
    commands: list[list]
    steps: list[dict] = field(default_factory=list)
    answers: str = ""
    compare: bool = False

    def text(self) -> str:
        """The case as a line of JSON."""
        return json.dumps({key: value for key, value in asdict(self).items() if value or key == "kind"})


class World:
    """A made place in a folder of its own, and what its stopped run ends with when nobody disturbs it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pristine, self.tried = folder, folder / "place", 0
        self.undone: list[str] = []  # cases whose damage could not be done
        made = forked.call(lambda: place.make(self.pristine), self._empty(folder / "place"))
        if made.code:
            raise RuntimeError(f"the place could not be made:\n{made.output}{made.said}")
        for arguments, status in place.RUNS:
            argv = [_argument(one, self.pristine) for one in arguments]
            ended = forked.call(forked.command(argv), self.pristine)
            if ended.code != status:
                raise RuntimeError(f"{' '.join(argv)} ended with {ended.code}, not {status}:\n{ended.said}")
        case = self._copy()
        ended = forked.call(forked.command(["run", "half.yaml"]), case)
        if ended.code:
            raise RuntimeError(f"the stopped run did not go on:\n{ended.said}")
        self.bits = _bits(case)

    def _empty(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        return folder

    def _copy(self) -> Path:
        target = self.folder / "case"
        if target.exists():
            shutil.rmtree(target)
        return shutil.copytree(self.pristine, target, symlinks=True)

    def try_(self, case: Case) -> list[rule.Finding]:
        """What a case shows."""
        self.tried += 1
        folder, findings, outcomes = self._copy(), [], []
        done = forked.call(lambda: damage.apply(case.steps, folder) and None, folder)
        if done.code:
            self.undone.append(f"{case.text()[:300]}\n{done.said.strip()[-300:]}")
            return []
        before = _snapshot(folder)
        for arguments in case.commands:
            argv = [_argument(one, folder) for one in arguments]
            steps = _steps(folder)
            outcome = forked.call(forked.command(argv), folder, case.answers)
            outcomes.append(outcome)
            findings += rule.judge(outcome, argv) or rule.late(steps, _steps(folder), outcome)
            findings += self._touched(before, folder, argv, case)
            if outcome.code == 0:
                findings += rule.accepted(folder, argv)
        if case.compare and not findings:
            findings += rule.disagreement(*outcomes[:2])
        if not findings and case.kind == "stopped run":
            findings += self._goes_on(case, folder, outcomes[-1])
        return findings

    def _touched(self, before: dict, folder: Path, argv: list[str], case: Case) -> list[rule.Finding]:
        """Files beside the run folders, the cache and what the command names as its output."""
        ran = [path for path in (folder / "outside" / "executed", folder / "executed") if path.exists()]
        if ran:
            for path in ran:
                path.unlink()
            return [rule.Finding("runs code", _damaged(case), argv[0], "code that came with the input ran")]
        named = [folder / argv[i + 1] for i, one in enumerate(argv[:-1]) if one in ("--out", "--json", "--write", "--runs")]
        if argv[:2] == ["recipes", "cp"]:
            named += [folder / argv[-1], (folder / argv[-1]).parent / SCHEMA]
        named += [path.with_name(f".{path.name}.lock") for path in named if argv[0] in WORKED_ON]
        mine = named if argv[0] in WORKED_ON else []
        after = _snapshot(folder)
        new = [name for name in after.keys() - before.keys() if not any(_within(folder / name, place) for place in named)]
        other = [name for name in before if not any(_within(folder / name, place) for place in mine)]
        changed = sorted(name for name in other if before[name] != after.get(name)) or sorted(new)
        before.update(after)
        if not changed:
            return []
        return [rule.Finding("touches others' files", Path(changed[0]).name, argv[0], ", ".join(changed[:5]))]

    def _goes_on(self, case: Case, folder: Path, outcome: forked.Outcome) -> list[rule.Finding]:
        """Whether the stopped run came to its bits, or, once the damage is mended, still does."""
        if not any(arguments[:2] == ["run", "half.yaml"] for arguments in case.commands):
            return []
        if outcome.code == 0 and case.commands[-1][0] == "run":
            return (
                [] if _bits(folder) == self.bits else [rule.Finding("other bits", "", _damaged(case), "accepted the damage")]
            )
        if int(hashlib.sha256(case.text().encode()).hexdigest(), 16) % 3:
            return []
        for step in case.steps:
            self._mend(folder, damage.resolve(step["file"], self.pristine))
        again = forked.call(forked.command(["run", "half.yaml"]), folder)
        if again.code:
            return [rule.Finding("does not go on when mended", "", _damaged(case), again.said.strip()[-300:])]
        same = _bits(folder) == self.bits
        return (
            [] if same else [rule.Finding("other bits when mended", "", _damaged(case), "the refusal left something behind")]
        )

    def _mend(self, folder: Path, name: str) -> None:
        target, whole = folder / name, self.pristine / name
        if target.is_symlink() or target.is_file():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        if whole.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(whole, target)
        elif whole.is_dir():
            shutil.copytree(whole, target)


def _damaged(case: Case) -> str:
    return Path(case.steps[0]["file"]).name if case.steps else ""


def _within(path: Path, place: Path) -> bool:
    """Whether a new file is what was asked for, lies in it, or is a folder on the way there."""
    path, place = Path(os.path.normpath(path)), Path(os.path.normpath(place))
    return path.is_relative_to(place) or place.is_relative_to(path)


def _argument(one, folder: Path) -> str:
    text = real(one)
    text = damage.resolve(text, folder) if isinstance(text, str) else str(text)
    return text.replace("\0", "")  # no argument of a program can hold one


def _bits(folder: Path) -> dict[str, str]:
    students = sorted((folder / "runs").glob("half-*/student/model.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in students}


def _steps(folder: Path) -> int:
    """Lines of every run's metrics."""
    files = [path for path in (folder / "runs").glob("*/metrics.jsonl") if path.is_file()]
    return sum(path.read_bytes().count(b"\n") for path in files)


def _snapshot(folder: Path) -> dict[str, str]:
    """Everything beside what commands may write to: of files their hash, of links their target."""
    found = {}
    for top in folder.iterdir():
        if top.name in OWN:
            continue
        for path in [top, *top.rglob("*")] if top.is_dir() and not top.is_symlink() else [top]:
            name = str(path.relative_to(folder))
            if path.is_symlink():
                found[name] = f"-> {path.readlink()}"
            elif path.is_file():
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[name] = "a folder"
    return found
