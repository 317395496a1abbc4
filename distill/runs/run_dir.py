"""The run folder: the paths of its files, and atomic reading and writing of them.

recipe.yaml          as given, with overrides              run.json        versions, data and teacher hashes, progress
metrics.jsonl        one line for each logged step         transfer.json   the source of every weight of the student
evaluations.json     every evaluation so far               checkpoints/    <stage>-<step>, the last ones
student/             the finished student                  report.html, report.md, twin/
selection.json       measurements of a selection           resolved.yaml   the recipe with the selected layout
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

FORMAT = 1  # of a run folder; raise it when folders of earlier versions can no longer be read or resumed
VERSIONED = ("torch", "transformers", "accelerate", "peft", "datasets", "triton", "tokenizers", "safetensors")
ELSEWHERE = "correct this, or choose another folder with --runs"
LOCK, LOCK_SECONDS = ".changing", 30  # the lock file during a change, which takes milliseconds, and the longest wait for it


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
        """Open the folder of a recipe, or make it. fresh: empty it first.

        Raises:
            UserError: the folder's recipe.yaml was edited, or belongs to another recipe.
        """
        return cls.at(cls.path_of(recipe, runs), recipe, fresh)

    @staticmethod
    def path_of(recipe: Recipe, runs: Path) -> Path:
        """The path of a recipe's folder, which need not exist. A name that is not UTF-8 raises a UserError."""
        check_name(runs)
        return runs / f"{recipe.name}-{recipe.fingerprint}"

    @classmethod
    def at(cls, path: Path, recipe: Recipe, fresh: bool) -> "RunDir":
        """As `open`, for a folder of this path."""
        folder = cls(path)
        try:
            if path.is_symlink() and not (path / "recipe.yaml").is_file():  # a link to a moved run is allowed
                refuse_link(path)
            if fresh and path.exists():
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
            for place in (path, path / "checkpoints"):
                for entry in place.iterdir() if place.is_dir() else ():
                    refuse_link(entry)
            sweep(path)
        except (OSError, ValueError) as error:  # ValueError: an invalid file name
            raise UserError(f"the run folder {path} cannot be made: {reason_of(error)}; {ELSEWHERE}") from error
        folder.check_format()
        file = path / "recipe.yaml"
        if file.exists() and folder.recipe().fingerprint != recipe.fingerprint:
            raise UserError(
                f"{file} is not the recipe this run was started with (it was edited, or the folder is another run's); "
                "change the original recipe and run that one, or start again with --fresh"
            )
        if not file.exists():
            write_text(file, recipe.yaml())
        return folder

    @classmethod
    def finished(cls, recipe: Recipe, runs: Path) -> "RunDir | None":
        """The folder of a recipe whose run is finished, with report and exports; None if there is none.

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
        """Open the folder of an existing run.

        Raises:
            UserError: the folder holds no run.
        """
        path = Path(reference)
        if not os.path.isfile(path / "recipe.yaml"):
            raise UserError(f"{path} is no run folder: it has no recipe.yaml")
        folder = cls(path)
        folder.check_format()
        return folder

    def check_format(self) -> None:
        """Refuse a folder that another version of distill wrote in another format.

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
        """Write resolved.yaml: the recipe with its layout written out.

        Raises:
            UserError: resolved.yaml exists with other content.
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
        """The recipe with its layout written out: resolved.yaml if a selection chose the layout, else recipe.yaml.

        Raises:
            UserError: a file is damaged.
        """
        file = self.path / "resolved.yaml"
        return _recipe_in(file) if file.exists() else self.recipe()

    @property
    def why_unfinished(self) -> str:
        """The reason why the run cannot go on, or the command that continues it."""
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
        """Read a JSON file of the folder; the default if it does not exist.

        Raises:
            UserError: the file is damaged.
        """
        file = self.path / name
        schema, fix = schema_of(name)
        return read_json(file, schema, fix=fix) if os.path.lexists(file) else default

    def write(self, name: str, content: Any) -> None:
        """Replace a JSON file of the folder atomically."""
        write_text(self.path / name, dumps(content, str(self.path / name), indent=1))

    def update(self, name: str, **entries: Any) -> dict:
        """Add entries to a JSON mapping of the folder."""
        return self.change(name, lambda content: content.update(entries))

    def change(self, name: str, how: Callable[[dict], Any]) -> dict:
        """Read, change and write a JSON mapping of the folder under a lock, so that no other process interferes.

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
                f"{self.path / name} was not changed: another process has held {lock} for {LOCK_SECONDS} s; wait for it"
            ) from error
        except OSError as error:
            raise UserError(f"{self.path / name} cannot be written: {reason_of(error)}; {ELSEWHERE}") from error
        return content

    def log(self, **entry: Any) -> None:
        """Append one line to metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        append_line(file, dumps(entry, str(file)))

    def metrics(self) -> list[dict]:
        """Every complete line of metrics.jsonl.

        Raises:
            UserError: a line that is not the last is damaged.
        """
        file = self.path / "metrics.jsonl"
        fix = "delete the line, or delete the file: only curves are drawn from it"
        return read_lines(file, STEP, fix=fix) if os.path.lexists(file) else []

    def forget_after(self, stage: int, step: float) -> None:
        """Drop the metrics of steps that a resumed run will take again."""
        kept = [line for line in self.metrics() if (line["stage_index"], line["step"]) <= (stage, step)]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))


def _unmarked(recipe: Recipe) -> Recipe:
    """The recipe without `selected`, which earlier versions did not write."""
    return recipe.model_copy(update={"selected": None})


def _recipe_in(file: Path) -> Recipe:
    """Read a recipe's file and check its stages."""
    recipe = parse(read(file), str(file))
    check_stages(recipe, str(file))
    return recipe


@contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Lock a run folder for this process while the block runs. The lock ends when the process dies.

    Raises:
        UserError: another process holds it; the message names its number and machine.
    """
    path = Path(path)
    owner = path.with_name(f".{path.name}.owner")
    place = path.with_name(f".{path.name}.lock")
    lock = FileLock(place)
    refuse_link(place)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:  # before OSError, which is its base class
        raise UserError(f"{path} is in use by {_holder(owner)}; wait for it, or stop it first") from error
    except (OSError, ValueError) as error:  # ValueError: an invalid file name
        raise UserError(f"{path.parent} cannot be written to: {reason_of(error)}; {ELSEWHERE}") from error
    try:
        sweep(path.parent)
        write_text(owner, f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _holder(owner: Path) -> str:
    """The owner of a folder's lock, in one line."""
    try:
        return " ".join(read_text(owner, most=200, fix="").split()) or "another process"
    except UserError:
        return "another process"


def versions() -> dict[str, str]:
    """The versions of packages that a run's results depend on."""
    found = {"distill": __version__, "python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
