"""The measurements of a selection: made for a scorer one after the other, each recorded at once."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.division import divided, dividing, shares
from distill.errors import Interrupted, UserError
from distill.runs.progress import PLAIN_SECONDS
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.selection.measures import Material
from distill.selection.options import Options
from distill.selection.switched import Switched, make_switched
from students.skeleton import Student
from teachers.fingerprint import difference

FILE = "selection.json"  # in the run folder
MATERIAL = "material"  # the fact that names the words and the text of the measurements
TEACHER = "teacher"  # the key of the model without any replaced layer


class Records:
    """The file selection.json: `facts` that the measurements depend on, `measured` by key and measure, entries that a scorer
    saves, and at the end `chosen`."""

    def __init__(self, folder: RunDir, facts: Mapping[str, str], writes: bool, file: str = FILE) -> None:
        """writes: False for all processes but the first. file: its name in the folder.

        Raises:
            UserError: the file holds measurements of another teacher, recipe or text.
        """
        self.folder, self.writes, self.file = folder, writes, file
        self.content: dict[str, Any] = folder.read(file, {}) or {"facts": dict(facts)}
        self.content = {"facts": {}, "measured": {}, **self.content}
        for name, value in facts.items():
            known = self.content["facts"].get(name, value if name == "recipe" else "")  # earlier versions had no "recipe"
            chosen = name == MATERIAL and "chosen" in self.content  # a finished choice stays valid
            if difference(known, value) and not chosen:
                raise UserError(
                    f"{folder.path / file}: the {name.replace('_', ' ')} is not the one that was measured there; restore "
                    "the earlier one, or start again with --fresh"
                )

    def of(self, key: str) -> dict[str, dict[str, float]]:
        """The recorded numbers of a key, by measure."""
        return self.content["measured"].get(key, {})

    def add(self, key: str, measure: str, found: dict[str, float]) -> None:
        """Record one measurement and write the file."""
        self.content["measured"].setdefault(key, {})[measure] = found
        self.save()

    def save(self, **entries: Any) -> None:
        """Record further entries and write the file."""
        self.content.update(entries)
        if self.writes:
            self.folder.write(self.file, self.content)

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.folder.path / self.file

    @property
    def tokens(self) -> int:
        """Tokens of all forward passes so far, including those of earlier attempts."""
        return self._sum("tokens") + self.content.get("trained", {}).get("tokens", 0)

    @property
    def seconds(self) -> float:
        """Seconds taken so far, including those of earlier attempts."""
        return self._sum("seconds") + self.content.get("trained", {}).get("seconds", 0.0)

    def _sum(self, name: str) -> float:
        return sum(found[name] for measures in self.content["measured"].values() for found in measures.values())


class Measurer:
    """Measures models of a selection: holds the texts, the switched model and the records.

    `total` is the expected number of measurements, for the estimate of the time left."""

    def __init__(self, session: Session, options: Options, records: Records, console: Console, stopper: Stopper) -> None:
        self.session, self.records = session, records
        self.options: Any = options  # of the scorer's own class
        self.console, self.stopper = console, stopper
        self.material = Material(session, options)
        self._apart = False  # whether each process measures a different model
        self.total, self._made, self._began, self._printed = 0, 0, time.monotonic(), time.monotonic()

    @cached_property
    def switched(self) -> Switched:
        """The teacher with a switch in every layer."""
        with self.session.accelerator.autocast():
            return make_switched(self.session, self.options)

    @property
    def layers(self) -> int:
        """The number of layers to choose from."""
        return self.session.teacher.n_layers

    @property
    def heads(self) -> int:
        """The number of attention heads of a layer."""
        return self.session.teacher.config.num_attention_heads

    def measure(self, key: str, make: Callable[[], Student], measures: Sequence[str]) -> dict[str, float]:
        """Measure the model that `make` gives, except what is recorded already. Returns named numbers.

        Raises:
            Interrupted: a signal came or the time is up; all measurements so far are kept.
        """
        for name in measures:
            if name not in self.records.of(key):
                self.stop_if_asked()
                self.material.prepare(name)
                began = time.monotonic()
                found = self._finite(key, name, self.material.measure(make(), name))
                self.records.add(key, name, {**found, "seconds": round(time.monotonic() - began, 3)})
        self._tell(key)
        known = self.records.of(key)
        return {name: value for measure in measures for name, value in known[measure].items()}

    def measure_all(
        self, models: Mapping[str, Callable[[], Student]], measures: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """As `measure`, for several independent models by key; each process measures one model at a time.

        Raises:
            Interrupted: as `measure`, on all processes.
        """
        with dividing():
            at_once = shares()[1]
        keys = list(models)
        found: dict[str, dict[str, float]] = {}
        for start in range(0, len(keys), at_once):
            found |= self._measure_round({key: models[key] for key in keys[start : start + at_once]}, measures)
        return found

    def _measure_round(
        self, models: Mapping[str, Callable[[], Student]], measures: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Measure one model on each process. Every process records the results of all."""
        if len(models) == 1:
            return {key: self.measure(key, make, measures) for key, make in models.items()}

        def known(key: str) -> dict[str, dict[str, float]]:
            self._apart = True
            try:
                self.measure(key, models[key], measures)
            finally:
                self._apart = False
            return {name: self.records.of(key)[name] for name in measures}

        self.stop_if_asked()
        with dividing():
            found = dict(zip(models, divided(list(models), known), strict=True))
        for key, by_measure in found.items():
            for name, numbers in by_measure.items():
                if name not in self.records.of(key):
                    self.records.add(key, name, numbers)
        return {key: {name: value for one in found[key].values() for name, value in one.items()} for key in models}

    def _finite(self, key: str, measure: str, found: dict[str, float]) -> dict[str, float]:
        """Return the numbers, or refuse them if one is not finite."""
        wrong = [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]
        if wrong:
            raise UserError(
                f"the selection measured {measure} of {key}, and {wrong[0]}: the model's outputs are not finite in "
                f"{self.session.accelerator.mixed_precision} precision; try precision=float32, or pattern.protect"
            )
        return found

    def layout(self, kept: Sequence[int], measures: Sequence[str]) -> dict[str, float]:
        """Numbers of the model that keeps attention in these layers."""
        return self.layouts([tuple(kept)], measures)[tuple(kept)]

    def layouts(
        self, layouts: Sequence[tuple[int, ...]], measures: Sequence[str]
    ) -> dict[tuple[int, ...], dict[str, float]]:
        """As `layout`, for several layouts, by the kept layers."""
        keys = {self._key(sorted(kept)): kept for kept in layouts}
        models = {key: partial(self._keep, kept) for key, kept in keys.items()}
        return {keys[key]: numbers for key, numbers in self.measure_all(models, measures).items()}

    def _keep(self, kept: Sequence[int]) -> Student:
        return self.switched.keep(sorted(kept))

    def _key(self, kept: Sequence[int]) -> str:
        return TEACHER if len(kept) == self.layers else f"kept {'-'.join(map(str, kept)) or 'none'}"

    def stop_if_asked(self) -> None:
        """Stop the selection on every process if one was asked to stop; all measurements are kept.

        Raises:
            Interrupted: a signal came, or the time is up.
        """
        with dividing(not self._apart):
            reasons = divided(range(shares()[1]), lambda index: self.stopper.due())
        if reason := next(filter(None, reasons), None):
            raise Interrupted(f"{reason} while selecting; the same command goes on from {self.records.path}")

    def expect(self, keys: int) -> None:
        """Set the number of measurements that will follow."""
        self.total, self._made, self._began = keys, 0, time.monotonic()

    def _tell(self, key: str) -> None:
        self._made += 1
        now = time.monotonic()
        if now - self._printed > PLAIN_SECONDS:
            self._printed = now
            left = (self.total - self._made) * (now - self._began) / self._made
            if self.total:
                self.console.print(f"  {self._made}/{self.total} measured ({key})  about {max(0.0, left):.0f} s left")
            else:  # the teacher's own measurement, from which the time of the others is estimated
                self.console.print(f"  measured the {key}")

    def trained(self, tokens: int, total: int) -> None:
        """Print the progress of a scorer that trains."""
        now = time.monotonic()
        if now - self._printed > PLAIN_SECONDS:
            self._printed = now
            self.console.print(f"  {min(tokens, total):,}/{total:,} tokens of training")
