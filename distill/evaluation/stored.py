"""The reading of evaluations.json, with every entry checked by its schema."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from distill.errors import UserError
from distill.evaluation.fidelity_records import Fidelity
from distill.evaluation.records import After, Judgement
from distill.reading import Unreadable, checked
from distill.runs.records import SCHEMAS
from distill.runs.run_dir import RunDir

FILE = "evaluations.json"
JUDGEMENT = {"suite", "device", "precision", "pattern", "rows", "against_teacher", "chance", "layers", "not_run"}
JUDGED, FIDELITY, AFTER = TypeAdapter(Judgement), TypeAdapter(Fidelity), TypeAdapter(After)
STAGE = re.compile(r"\d{1,6}-\w+")


def evaluations_of(folder: RunDir) -> dict:
    """Return every evaluation of a run so far, each checked by its schema.

    Raises:
        UserError: the file is damaged, or another version wrote it.
    """
    content = folder.read(FILE, {})
    try:
        _check(content, folder.path)
    except Unreadable as error:
        raise UserError(f"{folder.path / FILE} is damaged ({error}); {SCHEMAS[FILE][1]}") from error
    return content


def _check(content: Mapping, folder: Path) -> None:
    if content.get("untrained") is not None:
        _of("untrained", content["untrained"], FIDELITY)
    for stage, measured in content.get("after", {}).items():
        if not STAGE.fullmatch(stage):
            raise Unreadable(f"after.{stage} is not the name of a stage")
        _of(f"after.{stage}", measured, AFTER)
        if "kl" in measured:
            _of(f"after.{stage}", measured, FIDELITY)
    for name, judged in {"final": content.get("final"), **content.get("suites", {})}.items():
        if judged is None:
            continue
        if missing := sorted(JUDGEMENT - set(judged)):
            raise UserError(
                f"{folder / FILE}: {name} lacks {', '.join(missing)}: another version of distill wrote it; use that one, "
                "or run again with --fresh"
            )
        _of(name, judged, JUDGED)


def _of(place: str, content: Any, schema: TypeAdapter) -> None:
    try:
        checked(content, schema)
    except Unreadable as error:
        raise Unreadable(f"{place}.{error}") from error
