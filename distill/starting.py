"""Runs that start from a finished student (`student: FOLDER`): the student's folder, layout and hash of the weights."""

import hashlib
import os
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter

from distill.errors import UserError, reason_of
from distill.reading import read_json
from teachers.folder import CONFIG
from teachers.foreign import ADAPTER_FILES

ANY = TypeAdapter(dict[str, Any])
KEYS = ("pattern", "mixers", "meta_tokens")
FIX = "name a run folder with a finished student, or a student's own folder"


def place_of(reference: str, where: str = "student") -> Path:
    """The folder of a student: the given folder, or `student/` in it if it is a run folder.

    Raises:
        UserError: there is no student, or it has unmerged adapters.
    """
    path = Path(reference)
    place = path / "student" if (path / "recipe.yaml").is_file() else path
    if not (place / CONFIG).is_file():
        raise UserError(f"{where} is {reference!r}, but there is no student in {place} (no {CONFIG}); {FIX}")
    if found := next((name for name in ADAPTER_FILES if os.path.lexists(place / name)), None):
        raise UserError(
            f"{where} is {reference!r}, whose student has unmerged adapters ({found}); merge them with `distill "
            "export RUN --to portable --out FOLDER`, and name that FOLDER"
        )
    return place


def fill_layout(entries: dict, where: str) -> None:
    """Set a recipe's layout to that of the student from which it starts.

    Raises:
        UserError: there is no student, or the recipe's layout differs from the student's.
    """
    reference = entries.get("student")
    if not isinstance(reference, str):
        return
    if isinstance(entries.get("pattern"), dict):
        raise UserError(
            f"{where}: pattern selects a layout, but the student {reference} has one already; leave out pattern or student"
        )
    place = place_of(reference, f"{where}: student")
    config = read_json(place / CONFIG, ANY, fix=FIX)
    made = config.get("distill")
    layout = made.get("layout") if isinstance(made, dict) else None
    if not isinstance(layout, dict) or not isinstance(layout.get("pattern"), str):
        raise UserError(f"{where}: student is {reference!r}, but {place / CONFIG} is not of a student of distill; {FIX}")
    for key in KEYS:
        theirs, said = layout.get(key), entries.get(key)
        if said is not None and key != "mixers" and not _agrees(said, theirs):
            raise UserError(f"{where}: {key} is {said!r}, but the student {reference} has {theirs!r}; leave {key} out")
        if key == "mixers" and said is not None and said != theirs:
            given, there = cast(dict, said), cast(dict, theirs)
            letters = sorted(set(given) | set(there)) if isinstance(said, dict) else []
            letter = next((one for one in letters if given.get(one) != there.get(one)), "")
            raise UserError(
                f"{where}: mixers.{letter} is {said.get(letter) if isinstance(said, dict) else said!r}, but the student "
                f"{reference} has {there.get(letter)!r}; leave mixers out"
            )
        if theirs or key != "meta_tokens":
            entries[key] = theirs
    if entries.get("selected") is None and isinstance(made.get("selected"), dict):
        entries["selected"] = made["selected"]


def _agrees(said: Any, theirs: Any) -> bool:
    """Whether a pattern or a number equals the student's. A shorter pattern is repeated first."""
    if isinstance(said, str) and isinstance(theirs, str) and said:
        return (said * len(theirs))[: len(theirs)] == theirs
    return said == theirs


def weights_hash(place: Path) -> str:
    """The SHA-256 of all weight files of a student's folder.

    Raises:
        UserError: there are no weight files, or one cannot be read.
    """
    digest, files = hashlib.sha256(), sorted(place.glob("*.safetensors"))
    try:
        for file in files:
            digest.update(file.name.encode())
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    except OSError as error:
        raise UserError(f"{place}: its weights cannot be read: {reason_of(error)}") from error
    if not files:
        raise UserError(f"{place} has no weights in safetensors; {FIX}")
    return digest.hexdigest()
