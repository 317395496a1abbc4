"""The run folder: the one place that knows which file is where, and that writes none of them halfway.

recipe.yaml          as given, overrides included          run.json        versions, data and teacher hashes, progress
metrics.jsonl        one line a logged step                transfer.json   where every weight of the student came from
evaluations.json     every evaluation made so far          checkpoints/    <stage>-<step>, the last ones
student/             the finished student                  report.html, report.md, twin/
selection.json       what a selection of layers measured   resolved.yaml   the recipe with the layout that it chose
"""

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distill.disk import append_line, check_name, refuse_link, sweep, write_text
from distill.errors import UserError, reason_of
from distill.reading import read_json, read_lines, read_text
from distill.recipe import Recipe, parse
from distill.runs.records import STEP, schema_of
from distill.stages import check_stages
from distill.strict_json import dumps
from distill.version import __version__
from distill.yaml_file import read

FORMAT = 1  # of a run folder: raise it where one of an earlier version can no longer be read or gone on with
VERSIONED = ("torch", "transformers", "accelerate", "peft", "datasets", "triton", "tokenizers", "safetensors")
ELSEWHERE = "free it, or make runs elsewhere with --runs"
LOCK, LOCK_SECONDS = ".changing", 30  # a file that whoever changes a file of the folder holds, for milliseconds


class RunDir:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @classmethod
    def open(cls, recipe: Recipe, runs: Path, fresh: bool) -> "RunDir":
        """The folder of a recipe, made on first use; `fresh` empties it first.

        Raises:
            UserError: the folder's recipe.yaml was edited, or belongs to another recipe.
        """
        return cls.at(cls.path_of(recipe, runs), recipe, fresh)

    @staticmethod
    def path_of(recipe: Recipe, runs: Path) -> Path:
        """Where a recipe's folder is, whether it exists or not; a UserError names folders that are no UTF-8."""
        check_name(runs)
        return runs / f"{recipe.name}-{recipe.fingerprint}"

    @classmethod
    def at(cls, path: Path, recipe: Recipe, fresh: bool) -> "RunDir":
        """As `open`, for a folder of this path."""
        folder = cls(path)
        try:
            if path.is_symlink() and not (path / "recipe.yaml").is_file():  # a run that was moved may be linked to
                refuse_link(path)
            if fresh and path.exists():
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
            for place in (path, path / "checkpoints"):
                for entry in place.iterdir() if place.is_dir() else ():
                    refuse_link(entry)
            sweep(path)
        except (OSError, ValueError) as error:  # a ValueError is of a name that no file can have
            raise UserError(f"the run folder {path} cannot be made: {reason_of(error)}; {ELSEWHERE}") from error
        folder.check_format()
        file = path / "recipe.yaml"
        if file.exists() and folder.recipe().fingerprint != recipe.fingerprint:
            raise UserError(
                f"{file} is not the recipe this run was started with (it was edited, or the folder is another run's); "
                "change the recipe outside and run that, or start again with --fresh"
            )
        if not file.exists():
            write_text(file, recipe.yaml())
        return folder

    @classmethod
    def finished(cls, recipe: Recipe, runs: Path) -> "RunDir | None":
        """The folder of a recipe whose run is over, report and exports included; None where there is none.

        Raises:
            UserError: as `open`.
        """
        path = cls.path_of(recipe, runs)
        if not os.path.exists(path / "recipe.yaml"):
            return None
        folder = cls.at(path, recipe, fresh=False)
        return folder if folder.read("run.json", {}).get("finished") else None

    @classmethod
    def existing(cls, reference: str | os.PathLike) -> "RunDir":
        """A folder that holds a run.

        Raises:
            UserError: it does not.
        """
        path = Path(reference)
        if not os.path.isfile(path / "recipe.yaml"):
            raise UserError(f"{path} is no run folder: it has no recipe.yaml")
        folder = cls(path)
        folder.check_format()
        return folder

    def check_format(self) -> None:
        """Refuse a folder that another version of distill wrote in another way.

        Raises:
            UserError: naming both formats and the version.
        """
        known = self.read("run.json", {})
        if known.get("format", FORMAT) != FORMAT:
            writer = known.get("versions", {}).get("distill", "another")
            raise UserError(
                f"{self.path / 'run.json'}: distill {writer} wrote this run in format {known['format']}, but this one "
                f"({__version__}) reads format {FORMAT}; go on with that version, or start again with --fresh"
            )

    def recipe(self) -> Recipe:
        """The recipe that the folder was made for.

        Raises:
            UserError: recipe.yaml is damaged.
        """
        file = self.path / "recipe.yaml"
        return _recipe_in(file)

    def resolve(self, recipe: Recipe) -> None:
        """Keep the recipe with its layout written out, beside the one as given.

        Raises:
            UserError: resolved.yaml is there and says something else.
        """
        file = self.path / "resolved.yaml"
        if not file.exists():
            write_text(file, recipe.yaml())
        elif _unmarked(_recipe_in(file)).fingerprint != _unmarked(recipe).fingerprint:
            raise UserError(
                f"{file} is not the layout that was selected here (it was edited); run it as a recipe of its own, or start "
                "again with --fresh"
            )

    def laid_out(self) -> Recipe:
        """The recipe with its layout written out: the folder's own where a selection chose it, else as given.

        Raises:
            UserError: a file is damaged.
        """
        file = self.path / "resolved.yaml"
        return _recipe_in(file) if file.exists() else self.recipe()

    @property
    def why_unfinished(self) -> str:
        """What ended the run early for good, or how it goes on."""
        return self.read("run.json", {}).get("stopped") or "the same `distill run` goes on with it"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        """The folder of the finished student."""
        return self.path / "student"

    def read(self, name: str, default: Any = None) -> Any:
        """A JSON file of the folder, or the default where there is none.

        Raises:
            UserError: the file is damaged.
        """
        file = self.path / name
        schema, fix = schema_of(name)
        return read_json(file, schema, fix=fix) if os.path.lexists(file) else default

    def write(self, name: str, content: Any) -> None:
        """Replace a JSON file of the folder, never leaving half of one."""
        write_text(self.path / name, dumps(content, str(self.path / name), indent=1))

    def update(self, name: str, **entries: Any) -> dict:
        """Add entries to a JSON mapping of the folder."""
        return self.change(name, lambda content: content.update(entries))

    def change(self, name: str, how: Callable[[dict], Any]) -> dict:
        """Change a JSON mapping of the folder as it is at that moment: no other process changes it meanwhile.

        Raises:
            UserError: the file is damaged, or the folder cannot be written to.
        """
        lock = self.path / LOCK
        refuse_link(lock)
        try:
            with FileLock(lock, timeout=LOCK_SECONDS):
                content = self.read(name, {})
                how(content)
                self.write(name, content)
        except Timeout as error:
            raise UserError(
                f"{self.path / name} was not changed: another process holds {lock} for {LOCK_SECONDS} s now; wait for it"
            ) from error
        except OSError as error:
            raise UserError(f"{self.path / name} cannot be written: {reason_of(error)}; {ELSEWHERE}") from error
        return content

    def log(self, **entry: Any) -> None:
        """Append one line to metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        append_line(file, dumps(entry, str(file)))

    def metrics(self) -> list[dict]:
        """Every whole line of metrics.jsonl.

        Raises:
            UserError: a line that is not the last is damaged.
        """
        file = self.path / "metrics.jsonl"
        fix = "take the line out, or delete the file: curves are drawn from it, and nothing else is"
        return read_lines(file, STEP, fix=fix) if os.path.lexists(file) else []

    def forget_after(self, stage: int, step: float) -> None:
        """Drop the metrics of steps that a resumed run will take again."""
        kept = [line for line in self.metrics() if (line["stage_index"], line["step"]) <= (stage, step)]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def _unmarked(recipe: Recipe) -> Recipe:
    """The recipe without what its layout was selected by, which earlier versions did not write down."""
    return recipe.model_copy(update={"selected": None})


def _recipe_in(file: Path) -> Recipe:
    """A recipe's file, its stages checked too."""
    recipe = parse(read(file), str(file))
    check_stages(recipe, str(file))
    return recipe


@contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Keep a run folder for this process while the block runs; a process that dies lets go of it.

    Raises:
        UserError: another process has it, named by number and machine.
    """
    path = Path(path)
    owner = path.with_name(f".{path.name}.owner")
    place = path.with_name(f".{path.name}.lock")
    lock = FileLock(place)
    refuse_link(place)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:  # an OSError too
        raise UserError(f"{path} is in use by {_holder(owner)}; wait for it, or stop it first") from error
    except (OSError, ValueError) as error:  # a ValueError is of a name that no file can have
        raise UserError(f"{path.parent} cannot be written to: {reason_of(error)}; {ELSEWHERE}") from error
    try:
        sweep(path.parent)
        write_text(owner, f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _holder(owner: Path) -> str:
    """Who has a folder, in one line."""
    try:
        return " ".join(read_text(owner, most=200, fix="").split()) or "another process"
    except UserError:
        return "another process"


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    found = {"distill": __version__, "python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
