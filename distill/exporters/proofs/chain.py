"""The comparisons of a proof: student and exact export, exact and rounded export, rounded export and other engines."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError, reason_of
from distill.exporters.local_paths import take_out
from distill.exporters.proofs.answer import Answer
from distill.exporters.proofs.asked import Asked, Reading
from distill.exporters.proofs.bounds import BOUNDS, IN_FLOAT64, Bounds, bounds_of
from distill.exporters.proofs.comparing import check_ways, compare, compare_ids, divergence, rounding
from distill.exporters.proofs.fresh import Place, place
from distill.exporters.proofs.installed import Installed
from distill.exporters.proofs.proof import SCRIPTS, Proof
from distill.exporters.proofs.rounding import check_rounded
from distill.exporters.target import Form

if TYPE_CHECKING:
    from distill.exporters.source import Source
    from distill.exporters.target import Target

BASE = "transformers"  # the engine that the others are compared with
CUTS = ("llama.cpp",)  # engines with their own tokenizer, which must give the student's tokens


@dataclass
class Chain:
    """The comparisons of one export.

    student: the student's folder. written: the export's folder. engines: the installed engines that run the export.
    """

    student: Path
    written: Path
    target: "Target"
    source: "Source"
    form: Form
    asked: Asked
    engines: Mapping[str, Installed]
    place: Place

    @classmethod
    @contextmanager
    def of(
        cls,
        student: Path,
        written: Path,
        target: "Target",
        source: "Source",
        form: Form,
        reading: Reading | None,
        engines: Mapping[str, Installed],
        say: Callable[[str], None],
    ) -> Iterator["Chain"]:
        """Make a chain with a temporary folder next to the export, which is deleted when the block ends.

        Raises:
            UserError: the student's tokenizer cannot be read, or does not belong to the student.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(student)
        except Exception as error:  # transformers raises errors of any type on damaged files
            raise UserError(
                f"{student} has no tokenizer that can be read ({reason_of(error)}), and a proof needs text"
            ) from error
        asked = Asked.of(tokenizer, source, reading or Reading())
        with place(written, say) as folder:
            yield cls(student, written, target, source, form, asked, engines, folder)

    def proofs(self) -> dict[str, Proof]:
        """Return every engine's proof.

        Raises:
            UserError: the first difference beyond a bound.
        """
        proofs = {BASE: self._transformers()} if BASE in self.engines else {}
        for engine, where in self.engines.items():
            if engine != BASE:
                proofs[engine] = self._other(engine, where)
        return proofs

    def _transformers(self) -> Proof:
        """Compare the export before rounding with the student, and the published folder with that export, rounded."""
        bounds, where = bounds_of(BASE, self._model_type), self.engines[BASE]
        exact = self._exact
        self._say(BASE, where, f"the export {'' if exact == self.written else 'in float32 '}against the student")
        job = self._job("exact", exact, bounds, checks=True)
        jobs = [job]
        if exact != self.written:
            jobs.append(self._job("published", self.written, bounds, steps=len(self.engines) > 1))
        if where.own:  # one fresh process for both, which cannot import this project before the export has answered
            self._reference(first=jobs)
        else:
            for each in jobs:
                self.place.run(SCRIPTS[BASE], each, BASE, where)
            self._reference(along=job)
        found, student = self._answer("exact", BASE), self._answer("student", "the student")
        try:
            numbers: dict[str, Any] = check_ways(found, bounds) | compare(found, student, self.asked, bounds)
        except UserError as error:
            numbers = self._in_float64(error) | rounding(found, student)
        del numbers["kl"], numbers["top-1 agreement"]
        if exact != self.written:
            check_rounded(self.written, exact, self.form.dtype)
            rounded = self._answer("published", BASE)
            compare(rounded, student, self.asked, replace(bounds, logits=None, logprobs=None, tie=None))
            cost = divergence(rounded, student)
            numbers |= {f"{name} of {self.form.dtype}": value for name, value in cost.items()}
            numbers["perplexity"] = round(rounded.perplexity, 6)
        return Proof(BASE, "proved", version=found.version, numbers=numbers)

    def _in_float64(self, missed: UserError) -> dict[str, float | int | str]:
        """Compare the export with the student in float64, after they missed the bounds of float32.

        If they differ only by rounding, they agree in float64. If the export computes something else, they do not.

        Raises:
            UserError: the bound that was missed, and the first difference in float64.
        """
        self._say(BASE, self.engines[BASE], f"once more in float64, because in float32 {missed}")
        try:
            job = self._job("in float64", self._exact, IN_FLOAT64, checks=True)
            self.place.run(SCRIPTS[BASE], job, BASE, self.engines[BASE])
            self._reference(along=job, name="student in float64", bounds=IN_FLOAT64)
            found, student = self._answer("in float64", BASE), self._answer("student in float64", "the student")
            numbers = check_ways(found, IN_FLOAT64) | compare(found, student, self.asked, IN_FLOAT64)
        except UserError as error:
            raise UserError(f"{missed}; in float64 too: {error}") from missed
        return {"compared with the student in": "float64"} | numbers

    def _other(self, engine: str, where: Installed) -> Proof:
        """Compare an engine with transformers' float32 run of the published folder.

        Where transformers does not read the export, the engine is compared with the student.
        """
        bounds, base = bounds_of(engine, self._model_type, self.form), self._base
        self._say(engine, where, f"against {base.name}, in {bounds.dtype}")
        strings = list(self.asked.strings) if engine in CUTS else None
        job = self._job(engine, self.written, bounds, forced=base.tokens, strings=strings)
        self.place.run(SCRIPTS[engine], job, engine, where)
        found = self._answer(engine, engine)
        if strings:
            compare_ids(found, self.asked)
        return Proof(engine, "proved", version=found.version, numbers=compare(found, base, self.asked, bounds))

    @cached_property
    def _base(self) -> Answer:
        """The answer that the other engines are compared with."""
        if BASE in self.engines:
            return self._answer("exact" if self._exact == self.written else "published", BASE)
        self.place.say("the student, in float32")
        self._reference()
        return self._answer("student", "the student")

    @cached_property
    def _exact(self) -> Path:
        """The folder of the export in float32: the published folder itself, or another for the proof alone."""
        if self.form.dtype == "float32":
            return self.written
        exact = self.place.folder / "in float32"
        self.target.write(self.student, exact, replace(self.form, dtype="float32"))
        take_out(exact)
        return exact

    @cached_property
    def _model_type(self) -> str:
        path = self.written / "config.json"
        return json.loads(path.read_text()).get("model_type", "") if path.exists() else ""

    def _reference(
        self, first: Sequence[Path] = (), along: Path | None = None, name: str = "student", bounds: Bounds = BOUNDS[BASE]
    ) -> None:
        """Compute the student's answer, in a process that may run jobs of transformers first."""
        from distill.stages import adapters

        folder = adapters.merged_copy(self.student, self.place.folder / "merged")
        before = [str(path) for path in first]
        took = along or next(iter(first), None)
        job = self._job(
            name,
            folder,
            bounds,
            script=str(self.place.script(SCRIPTS[BASE])),
            first=before,
            along=None if took is None else str(self.place.folder / took.stem / "answer.json"),
        )
        own = Installed(sys.executable, True, "")
        self.place.run("reference", job, BASE if before else "the student", own, ours=True)

    def _job(self, name: str, folder: Path, bounds: Bounds, *, checks: bool = False, steps: bool = True, **rest) -> Path:
        asked = self.asked
        entries = {
            "folder": str(folder),
            "trust_remote_code": self.target.remote_code,
            "dtype": bounds.dtype,
            "texts": asked.texts,
            "rows": asked.rows,
            "prompts": asked.prompts,
            "steps": asked.steps if steps else 0,
            "forced": None,
            "checks": checks,
        }
        return self.place.job(name, entries | rest)

    def _answer(self, job: str, name: str) -> Answer:
        try:
            return Answer.read(self.place.folder / job, name)
        except (OSError, ValueError, LookupError) as error:
            raise UserError(
                f"{name} ended without an answer ({reason_of(error)}); --no-verify leaves the proof out"
            ) from error

    def _say(self, engine: str, where: Installed, what: str) -> None:
        self.place.say(f"{engine} {where.version}: {what}")
