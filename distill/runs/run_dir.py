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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from distill.disk import FIX, writing
from distill.errors import UserError
from distill.recipe import Recipe, parse
from distill.stages import check_stages
from distill.strict_json import dumps
from distill.version import __version__
from distill.yaml_file import read

FORMAT = 1  # of a run folder: raise it where one of an earlier version can no longer be read or gone on with
VERSIONED = ("torch", "transformers", "accelerate", "peft", "datasets", "triton", "tokenizers", "safetensors")
ELSEWHERE = "free it, or make runs elsewhere with --runs"


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
        """Where a recipe's folder is, whether it exists or not."""
        return runs / f"{recipe.name}-{recipe.fingerprint}"

    @classmethod
    def at(cls, path: Path, recipe: Recipe, fresh: bool) -> "RunDir":
        """As `open`, for a folder of this path."""
        folder = cls(path)
        try:
            if fresh and path.exists():
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run folder {path} cannot be made: {error.strerror}; {ELSEWHERE}") from error
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
        if not (path / "recipe.yaml").exists():
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
        if not (path / "recipe.yaml").is_file():
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
        if not file.exists():
            return default
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); delete it to have it made again") from error

    def write(self, name: str, content: Any) -> None:
        """Replace a JSON file of the folder, never leaving half of one."""
        write_text(self.path / name, dumps(content, str(self.path / name), indent=1))

    def update(self, name: str, **entries: Any) -> dict:
        """Add entries to a JSON mapping of the folder."""
        content = {**self.read(name, {}), **entries}
        self.write(name, content)
        return content

    def log(self, **entry: Any) -> None:
        """Append one line to metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        line = dumps(entry, str(file))
        with writing(file), file.open("a") as lines:
            lines.write(line + "\n")

    def metrics(self) -> list[dict]:
        """Every whole line of metrics.jsonl."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        whole = []
        for line in lines:
            try:
                whole.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the end of a line that a kill cut short
        return whole

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
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:  # an OSError too
        holder = owner.read_text() if owner.exists() else "another process"
        raise UserError(f"{path} is in use by {holder}; wait for it, or stop it first") from error
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written to: {error.strerror}; {ELSEWHERE}") from error
    try:
        write_text(owner, f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: the folder cannot be written to.
    """
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        scratch.write_text(text)
        scratch.replace(file)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written: {error.strerror}; {FIX}") from error


def versions() -> dict[str, str]:
    """The versions that a run's numbers depend on."""
    found = {"distill": __version__, "python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
