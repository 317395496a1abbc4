"""`distill export`: check the student and the options, write a temporary folder, prove it, add the model card, rename."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Literal, cast, get_args, get_type_hints

from distill.errors import UserError, nearest, reason_of
from distill.exporters import target
from distill.exporters.engines import pythons
from distill.exporters.place import MARKER, README, Place, mark, paths_in
from distill.exporters.target import Form, Target
from distill.runs.run_dir import RunDir

if TYPE_CHECKING:
    from distill.exporters.proofs import Proof
    from distill.exporters.source import Source

FITTEST, ANY = "native", "portable"  # the default target is FITTEST where it can hold the student, else ANY
DTYPES = get_args(get_type_hints(Form)["dtype"])
CANNOT_PROVE = (OSError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Finished:
    """A finished student: its folder, and its run folder if it belongs to a run."""

    student: Path
    run: RunDir | None

    @classmethod
    def of(cls, path: Path) -> "Finished":
        """Find the student of a run folder, or of a student's own folder.

        Raises:
            UserError: the folder is neither, or the run has no student yet.
        """
        if not (path / "recipe.yaml").is_file() and _is_student(path):
            beside = path.parent / "recipe.yaml"
            return cls(path, RunDir.existing(path.parent) if path.name == "student" and beside.is_file() else None)
        run = RunDir.existing(path)
        if not run.student.exists():
            raise UserError(f"{run.path} has no finished student yet; {run.why_unfinished}")
        return cls(run.student, run)

    @property
    def home(self) -> Path:
        """The run folder, or the student's own folder outside a run."""
        return self.run.path if self.run else self.student

    def out(self, kind: str) -> Path:
        """Return the default folder of an export: RUN/export/KIND.

        Raises:
            UserError: the student belongs to no run.
        """
        if self.run is None:
            raise UserError(f"{self.student} is a student's folder outside a run; say with --out which folder to write")
        return self.run.path / "export" / kind


def export_student(
    run: str | PathLike,
    *,
    to: str | None = None,
    out: str | PathLike | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    verify: bool = True,
    engines: Mapping[str, str] | None = None,
    push: str | None = None,
    public: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Export the finished student of a run, prove the export in the installed engines, and push it if `push` is given.

    The export is written to a temporary folder next to `out`, proved, and then renamed to `out`. So `out` never holds an
    incomplete or a wrong export.

    Args:
        run: a run folder, or a finished student's folder. to: the target; by default `native` where it can hold the student,
            else `portable`. out: the folder; RUN/export/TARGET by default. dtype: of the weights, bfloat16 by default.
            quantize: one of the target's quantisations. verify: prove the export in every installed engine that runs this
            target. engines: the Python interpreters of engines with their own environment, by engine; DISTILL_ENGINES adds
            more. push: a repository on the hub, private unless `public`. say: called with each line of progress.

    Returns:
        the folder written.

    Raises:
        UserError: an option is invalid, the student is damaged, the folder cannot be written or holds other files, or an
            engine computes something else than the student.
    """
    from distill.exporters.pushing import check_repository, push_folder
    from distill.memory import enough_memory

    chosen, form = _asked(to, dtype, quantize)
    found = pythons(engines or {})
    form = replace(form, quantiser=found.get("llama.cpp"))
    if public and not push:
        raise UserError("--public needs --push: it makes the pushed repository public; add --push REPO")
    if push:
        check_repository(push)
    finished = Finished.of(Path(run))
    place = _checked(Path(out), finished) if out is not None else None
    with enough_memory("exporting the student"):
        source = _whole(finished)
        kind = to or _fittest(source, say)
        chosen = chosen or target(kind)
        if reason := chosen.refuses(source):
            raise UserError(
                f"{kind} cannot hold the student in {finished.student}: {reason}; --to {ANY} holds every student"
            )
        place = place or _checked(finished.out(kind), finished)
        written = _Writing(finished, source, chosen, kind, form, place, say)
        written.make(found if verify else None, push)
    if push:
        push_folder(place.path, push, public, say)
    return place.path


@dataclass(frozen=True)
class _Writing:
    """One export in progress."""

    finished: Finished
    source: "Source"
    target: Target
    kind: str
    form: Form
    place: Place
    say: Callable[[str], None]

    def make(self, found: Mapping[str, str] | None, push: str | None) -> None:
        """Write, prove and rename the export. found: Python interpreters by engine; None skips the proof."""
        with _writable(self.place.path), self.place.new() as scratch:
            self._write(scratch)
            self.place.check_names([*paths_in(scratch), README])
            proofs = None if found is None else self._proved(scratch, found)
            self._card(scratch, proofs, push)
            mark(scratch, self.kind)
        for engine, preparation in self.target.preparations(self.source).items():
            self.say(f"{engine}: {preparation}")

    def _write(self, scratch: Path) -> None:
        from distill.exporters.local_paths import take_out
        from distill.reading import size_of

        student = self.finished.student
        self.say(f"writing {student} as {self.kind} ({self.target.types(self.form)})")
        scratch.rmdir()  # the target creates it
        try:
            self.target.write(student, scratch, self.form)
            take_out(scratch)
        except (LookupError, TypeError, ValueError) as error:  # the student's files were edited
            said = reason_of(error) if type(error) is ValueError else "its files were edited"
            raise UserError(
                f"the student in {student} cannot be exported: {said}; delete it, and the same `distill run` saves it again"
            ) from error
        (scratch / MARKER).unlink(missing_ok=True)  # copied along where the student is itself an export
        size = sum((scratch / name).stat().st_size for name in paths_in(scratch))
        self.say(f"written: {size_of(size)}")

    def _proved(self, scratch: Path, found: Mapping[str, str]) -> "list[Proof]":
        from distill.exporters.proofs import prove

        home, kind = self.finished.home, self.kind
        options = f"--quantize {self.form.quantize} " if self.form.quantize else ""
        options += f"--dtype {self.form.dtype} " if self.form.dtype != Form.dtype else ""
        elsewhere = self.finished.run is None or self.place.path != self.finished.out(kind)
        options += f"--out {quote(str(self.place.path))} " if elsewhere else ""
        command = f"distill export {quote(str(home))} --to {kind} {options}--no-verify"
        fix = f"nothing was written to {self.place.path}; `{command}` writes it without a proof"
        student = self.finished.student
        try:
            proofs = prove(student, scratch, self.target, self.source, self.form, pythons=found, say=self.say)
        except UserError as error:
            raise UserError(f"the {kind} export of {student} was not published: {error}; {fix}") from error
        except CANNOT_PROVE as error:
            raise UserError(f"the {kind} export of {student} could not be proved: {reason_of(error)}; {fix}") from error
        for proof in proofs:
            version = f" {proof.version}" if proof.version else ""
            self.say(f"{proof.engine}{version}: {proof.state}{f' ({proof.why})' if proof.why else ''}")
        return proofs

    def _card(self, scratch: Path, proofs: "list[Proof] | None", push: str | None) -> None:
        from distill.exporters.cards import Facts, card

        facts = Facts(
            self.finished.student, self.finished.run, self.source, self.kind, self.target, self.form, proofs, scratch
        )
        path = self.place.path
        name = push or str(path.name if path.is_absolute() else path)
        (scratch / README).write_text(card(facts, name, hub=push is not None), "utf-8")


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    """Turn disk errors inside the block into a `UserError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the export to {out} could not be written: {str(error) or reason_of(error)}; make room there, or name another "
            "folder"
        ) from error


def _checked(out: Path, finished: Finished) -> Place:
    with _writable(out):
        return Place.checked(out, finished.home, finished.student)


def _asked(to: str | None, dtype: str | None, quantize: str | None) -> tuple[Target | None, Form]:
    """Return the target (None if none is named) and the form.

    Raises:
        UserError: the target or the type does not exist, or the target does not have the quantisation.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; {nearest(dtype, DTYPES)}")
    chosen = target(to) if to is not None else None
    if quantize is not None:
        known = chosen.quantizations if chosen else ()
        if not known:
            raise UserError(f"--quantize is {quantize!r}, but {to or 'the default target'} has none; {_quantizing()}")
        if quantize not in known:
            raise UserError(f"--quantize is {quantize!r}; {nearest(quantize, known)}")
    return chosen, Form(cast(Literal["float32", "bfloat16"], dtype or Form.dtype), quantize)


def _quantizing() -> str:
    """List the targets that have quantisations, for a message."""
    from distill.exporters import EXPORTERS

    found = {name: target(name).quantizations for name in EXPORTERS if target(name).quantizations}
    said = "; ".join(f"--to {name} has {', '.join(types)}" for name, types in found.items())
    return said or "no target has any, so leave it out"


def _fittest(source: "Source", say: Callable[[str], None]) -> str:
    """Choose the default target: native where it is exact, else portable, which holds every student."""
    reason = target(FITTEST).refuses(source)
    why = f"no transformers class computes the same function: {reason}" if reason else "vLLM and other engines load it"
    kind = ANY if reason else FITTEST
    say(f"target {kind}: {why}")
    return kind


def _whole(finished: Finished) -> "Source":
    """Check every file that the export and its card are made from; return the student's `Source`.

    Raises:
        UserError: the student or a file of its run is damaged.
    """
    from distill.exporters.cards.results import results
    from distill.exporters.whole import check_whole

    if finished.run is not None:
        finished.run.laid_out()
        results(finished.run)
    return check_whole(finished.student)


def _is_student(path: Path) -> bool:
    """Whether a folder holds a student, by its config.json alone.

    A damaged config.json next to weights counts as a student's, so that a later check can name the damage.
    """
    if not (path / "config.json").is_file():
        return False
    try:
        return "distill" in json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return any(path.glob("*.safetensors"))
