"""Task files: JSON lines in a folder, one file a task, as `<task>.jsonl`, `.jsonl.xz` or `.jsonl.gz`.

A line is {"ctx": text, "choices": [text ...], "label": index of the right one, from 0}; of WinoGrande {"contexts": [the
sentence up to and with each option], "target": the rest, "label"}; of LAMBADA, SWDE, FDA and SQuAD, {"ctx", "choices": [the
answer]}.
"""

import gzip
import json
import lzma
import random
from pathlib import Path

from distill.errors import UserError
from distill.evaluation.questions import SEED, TASKS, FormError, Question

OPENERS = {".jsonl": open, ".jsonl.xz": lzma.open, ".jsonl.gz": gzip.open}


def find_file(folder: Path, name: str) -> Path | None:
    """The file of a task, or None."""
    return next((folder / (name + ending) for ending in OPENERS if (folder / (name + ending)).is_file()), None)


def read_items(file: Path, limit: int | None) -> list[dict]:
    """A file's lines, or so many of them, always the same ones and in the file's order.

    Raises:
        UserError: the file is damaged, or holds nothing.
    """
    return _some([item for _, item in _lines(file)], limit)


def _lines(file: Path) -> list[tuple[int, dict]]:
    """Lines that are not blank, and their numbers."""
    opener, number, found = OPENERS[file.name[file.name.index(".jsonl") :]], 0, []
    try:
        with opener(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found.append((number, json.loads(line)))
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise UserError(f"the task file {file} cannot be read: line {number}: {error}; it should be JSON lines") from error
    if not found:
        raise UserError(f"the task file {file} holds no line")
    return found


def _some(items: list, limit: int | None) -> list:
    if limit is None or limit >= len(items):
        return items
    return [items[index] for index in sorted(random.Random(SEED).sample(range(len(items)), limit))]


def check_folder(folder: str | Path) -> Path:
    """A folder of task files that a user named.

    Raises:
        UserError: there is no such folder, or no task's file in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"--tasks is {folder}, but there is no such folder; name one with files like hellaswag.jsonl.xz")
    if not any(find_file(path, name) for name in TASKS):
        raise UserError(f"--tasks is {folder}, but it holds no task's file: {', '.join(f'{name}.jsonl' for name in TASKS)}")
    return path


def read_questions(name: str, file: Path, items: int | None) -> list[Question]:
    """A task's questions, or so many of them, always the same ones.

    Raises:
        UserError: the file is damaged, or any of its lines is not in the task's form.
    """
    questions = []
    for number, item in _lines(file):  # all of them: a mistake shows whichever are drawn
        try:
            questions.append(TASKS[name].question(item))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            said = str(error) if isinstance(error, FormError) else f"{type(error).__name__} {error}"
            raise UserError(
                f"{file}, line {number}, is not in the form of {name}: {said}; see distill/evaluation/task_files.py"
            ) from error
    return _some(questions, items)
