"""The output of verbs: tables for people, JSON for programs, and silenced libraries."""

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

ALONE = Path("-")  # the value of --json that prints only the JSON
OWN = ("recipe.yaml", "config.json")  # files that mark a folder as a run's or a model's


def quiet_libraries() -> None:
    """Silence the progress bars and warnings of libraries. Downloads still show progress bars on a terminal."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # read when `datasets` is imported, which may never be needed
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # it warns of every retry, twice
    if not sys.stderr.isatty():
        disable_progress_bars()


def table_console(path: Path | None) -> "Console":
    """The console of a verb's table; a silent one if only JSON is printed."""
    from distill.console import new_console

    return new_console(quiet=path == ALONE)


def say(what: object) -> None:
    """Print a line, such as a path, with control characters escaped."""
    from distill.errors import printable

    print(printable(what))


def check_json(path: Path | None) -> None:
    """Refuse a file that cannot be written, before the work begins.

    Raises:
        UserError: naming the file.
    """
    if path is not None and path != ALONE:
        from distill.disk import check_writable
        from distill.errors import UserError

        check_writable(path, "--json")
        if path.exists() and not _is_json(path):
            raise UserError(f"--json is {path}, which exists and is not JSON; name another file")
        if path.exists() and _of_a_folder(path):
            raise UserError(f"--json is {path}, which is a file of a run or a model; name another file")


def _is_json(path: Path) -> bool:
    """Whether a file is empty or holds one JSON object or list, as verbs write it."""
    from distill.errors import UserError
    from distill.reading import MOST_BYTES, Unreadable, parsed, read_text

    try:
        text = read_text(path, most=MOST_BYTES, fix="")
        return not text or isinstance(parsed(text), dict | list)
    except (UserError, Unreadable):
        return False


def _of_a_folder(path: Path) -> bool:
    """Whether a file is in the folder of a run or a model."""
    return any((folder / name).is_file() for folder in list(path.resolve().parents)[:3] for name in OWN)


def write_json(path: Path | None, content: dict | list) -> None:
    """Write a verb's result to a file, or to the standard output for `-`; nothing for None."""
    from distill.strict_json import dumps

    check_json(path)
    text = dumps(content, f"--json {path}", indent=1) if path is not None else ""
    if path == ALONE:
        print(text)
    elif path is not None:
        from distill.disk import write_text

        write_text(path, text)
