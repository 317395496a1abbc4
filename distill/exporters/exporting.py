"""The way out of a run: refuse what can be refused, write beside, prove, say on a card what it is, and only then rename."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
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

FITTEST, ANY = "native", "portable"  # what is written by default: the first where it holds the student, else the second
DTYPES = get_args(get_type_hints(Form)["dtype"])
CANNOT_PROVE = (OSError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Finished:
    """A finished student: its folder, and that of its run where it has one."""

    student: Path
    run: RunDir | None

    @classmethod
    def of(cls, path: Path) -> "Finished":
        """Of a run folder, or of the folder of a student.

        Raises:
            UserError: it is neither, or the run has no student yet.
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
        """The run's folder, or the student's own."""
        return self.run.path if self.run else self.student

    def out(self, kind: str) -> Path:
        """Where an export goes that was not told where.

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
    """Write the finished student of a run for other software, prove it there, and push it where that is asked for.

    The folder is written beside `out`, proved, and then renamed: a half-written or a wrong one never stands there.

    Args:
        run: a run folder, or a finished student's folder. to: the target; by default `native` where it holds the student,
            else `portable`. out: the folder; RUN/export/TARGET by default. dtype: of the weights, bfloat16 by default.
            quantize: a type that the target has. verify: prove it in every engine that is to run it and is installed.
            engines: Pythons of engines that live elsewhere, by name; DISTILL_ENGINES names more. push: a repository of the
            hub, private unless `public`. say: told what is written and what is proved.

    Returns:
        the folder written.

    Raises:
        UserError: something asked for cannot be, the student is damaged, a folder is in the way or cannot be written, or an
            engine computes something else than the student.
    """
    from distill.exporters.pushing import check_repository, push_folder
    from distill.memory import enough_memory

    chosen, form = _asked(to, dtype, quantize)
    found = pythons(engines or {})
    form = replace(form, quantiser=found.get("llama.cpp"))
    if public and not push:
        raise UserError("--public says how a repository is made, and --push names none; add --push REPO")
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
    """One export on its way."""

    finished: Finished
    source: "Source"
    target: Target
    kind: str
    form: Form
    place: Place
    say: Callable[[str], None]

    def make(self, found: Mapping[str, str] | None, push: str | None) -> None:
        """Write, prove and rename. found: Pythons of engines; None where nothing is to be proved."""
        with _writable(self.place.path), self.place.new() as scratch:
            self._write(scratch)
            self.place.check_names([*paths_in(scratch), README])
            proofs = None if found is None else self._proved(scratch, found)
            self._card(scratch, proofs, push)
            mark(scratch, self.kind)

    def _write(self, scratch: Path) -> None:
        from distill.exporters.local_paths import take_out
        from distill.reading import size_of

        student = self.finished.student
        self.say(f"writing {student} as {self.kind} ({self.target.types(self.form)})")
        scratch.rmdir()  # targets make it
        try:
            self.target.write(student, scratch, self.form)
            take_out(scratch)
        except (LookupError, TypeError, ValueError) as error:  # of files that were edited
            said = reason_of(error) if type(error) is ValueError else "its files were edited"
            raise UserError(
                f"the student in {student} cannot be exported: {said}; delete it, and the same `distill run` saves it again"
            ) from error
        (scratch / MARKER).unlink(missing_ok=True)  # of an export that was exported
        size = sum((scratch / name).stat().st_size for name in paths_in(scratch))
        self.say(f"written: {size_of(size)}")

    def _proved(self, scratch: Path, found: Mapping[str, str]) -> "list[Proof]":
        from distill.exporters.proofs import prove

        home, kind = self.finished.home, self.kind
        options = f"--quantize {self.form.quantize} " if self.form.quantize else ""
        options += f"--dtype {self.form.dtype} " if self.form.dtype != Form.dtype else ""
        command = f"distill export {home} --to {kind} {options}--no-verify"
        fix = f"nothing was left in {self.place.path}; `{command}` writes it unproved"
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
    """Turn what a disk raises inside the block into a message."""
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
    """The target, None where none is named, and the form.

    Raises:
        UserError: there is no such target or type, or the target has no such quantisation.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; {nearest(dtype, DTYPES)}")
    chosen = target(to) if to is not None else None
    if quantize is not None:
        known = chosen.quantizations if chosen else ()
        if not known:
            raise UserError(f"--quantize is {quantize!r}, which {to or 'the default target'} has not; {_quantizing()}")
        if quantize not in known:
            raise UserError(f"--quantize is {quantize!r}; {nearest(quantize, known)}")
    return chosen, Form(cast(Literal["float32", "bfloat16"], dtype or Form.dtype), quantize)


def _quantizing() -> str:
    """Which targets have quantisations, for a message."""
    from distill.exporters import EXPORTERS

    found = {name: target(name).quantizations for name in EXPORTERS if target(name).quantizations}
    said = "; ".join(f"--to {name} has {', '.join(types)}" for name, types in found.items())
    return said or "no target has any, so leave it out"


def _fittest(source: "Source", say: Callable[[str], None]) -> str:
    """The target that most engines run: native where it is exact, else portable, which holds every student."""
    reason = target(FITTEST).refuses(source)
    why = f"no class of transformers' own is the same function: {reason}" if reason else "vLLM and other engines load it"
    kind = ANY if reason else FITTEST
    say(f"target {kind}: {why}")
    return kind


def _whole(finished: Finished) -> "Source":
    """Read what the export is made from, and what its card is.

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
    """Whether a folder is that of a student, by its config alone; a damaged one is, for what is wrong with it to be said."""
    if not (path / "config.json").is_file():
        return False
    try:
        return "distill" in json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return any(path.glob("*.safetensors"))
