"""Task files: JSON lines in a folder, one file a task, as `<task>.jsonl`, `.jsonl.xz` or `.jsonl.gz`.

A line is {"ctx": text, "choices": [text ...], "label": index of the right one, from 0}; of WinoGrande {"contexts": [the
sentence up to and with each option], "target": the rest, "label"}; of LAMBADA, SWDE, FDA and SQuAD, {"ctx", "choices": [the
answer]}.
"""

import random
from pathlib import Path

from distill.errors import UserError, brief, named
from distill.evaluation.questions import SEED, TASKS, FormError, Question
from distill.text.json_file import loads
from distill.text.unpacked import Place, lines

ENDINGS = (".jsonl", ".jsonl.xz", ".jsonl.gz")
LONGEST = 16 * 10**6  # bytes of a line


def find_file(folder: Path, name: str) -> Path | None:
    """Return the file of a task, or None.

    Raises:
        UserError: the folder cannot be read, or a folder has the file's name.
    """
    try:
        for file in (folder / (name + ending) for ending in ENDINGS):
            if file.is_dir():
                raise UserError(f"{named(file)} is a folder; a task's file holds JSON lines")
            if file.is_file():
                return file
    except OSError as error:
        raise UserError(f"--tasks: {named(folder)} cannot be read: {error.strerror}") from error
    return None


def read_items(file: Path, limit: int | None) -> list[dict]:
    """Return a file's lines, or `limit` of them: always the same ones, in the file's order.

    Raises:
        UserError: the file is damaged or empty.
    """
    return _some([item for _, item in _lines(file)], limit)


def _lines(file: Path) -> list[tuple[int, dict]]:
    """Return the lines that are not blank, with their numbers."""
    place, found = Place(), []
    for line in lines(file, "task files", LONGEST, place, "cut it, or leave it out"):
        if not line.strip():
            continue
        try:
            item = loads(line)
            if not isinstance(item, dict):
                raise ValueError(f"{brief(item)} is not an object")
        except ValueError as error:
            raise UserError(
                f"the task file {named(file)} cannot be read: {place}: {error}; it should be JSON lines"
            ) from error
        found.append((place.number, item))
    if not found:
        raise UserError(f"the task file {named(file)} holds no line; remove it, or fetch it again")
    return found


def _some(items: list, limit: int | None) -> list:
    if limit is None or limit >= len(items):
        return items
    return [items[index] for index in sorted(random.Random(SEED).sample(range(len(items)), limit))]


def check_folder(folder: str | Path) -> Path:
    """Check a folder of task files that a user named.

    Raises:
        UserError: the folder does not exist, cannot be read, or holds no task's file.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(
            f"--tasks is {named(folder)}, but there is no such folder; name one with files like hellaswag.jsonl.xz"
        )
    if not any(find_file(path, name) for name in TASKS):
        wanted = ", ".join(f"{name}.jsonl" for name in TASKS)
        raise UserError(f"--tasks is {named(folder)}, but it holds no task's file; it should hold one of {wanted}")
    return path


def read_questions(name: str, file: Path, items: int | None) -> list[Question]:
    """Return a task's questions, or `items` of them: always the same ones.

    Raises:
        UserError: the file is damaged, or one of its lines is not in the task's form.
    """
    questions = []
    for number, item in _lines(file):  # all lines, so that a mistake is found whichever are drawn
        try:
            questions.append(TASKS[name].question(item))
        except KeyError as error:
            said = f"{error.args[0]} is missing; there are {', '.join(named(key, 40) for key in item) or 'none'}"
            raise UserError(_misformed(file, number, name, said)) from error
        except FormError as error:
            raise UserError(_misformed(file, number, name, str(error))) from error
    return _some(questions, items)


def _misformed(file: Path, number: int, name: str, said: str) -> str:
    return f"{named(file)}, line {number}, is not in the form of {name}: {said}; see distill/evaluation/task_files.py"
