"""Rows of text on disk, written one after the other and read in any order, so that memory does not grow with the text."""

import json
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from teachers.cache import writing

HELD = 1 << 16  # rows whose table entries are held in memory before they are written
ENTRY = 16  # bytes of a row's table entry
CHAT = 1 << 40  # added to the label's number where the row is a chat
WHOLE = "rows.json"  # the file that is written once all rows are


class Chat(str):
    """A row that is a chat, or a prompt and its completion, as JSON (described in `chats.py`)."""


class Rows:
    """Label and text of each row, in a folder."""

    def __init__(self, folder: Path) -> None:
        """folder: made here, removed by the caller; what an earlier attempt left in it is deleted."""
        self._folder = folder
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._texts, self._table = (folder / "texts").open("wb"), (folder / "table").open("wb")
        self._held, self._size, self.count = array("q"), 0, 0

    @classmethod
    def left(cls, folder: Path) -> "Rows | None":
        """The rows of an earlier attempt that read all of them; None where there are none."""
        try:
            known = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
            sizes = [(folder / name).stat().st_size for name in ("texts", "table")]
            if sizes != [known["size"], ENTRY * known["count"]]:
                return None
        except (OSError, ValueError, LookupError, TypeError):
            return None
        rows = cls.__new__(cls)
        rows._folder, rows._names, rows._numbers, rows._held = folder, known["names"], {}, array("q")
        rows._size, rows.count = known["size"], known["count"]
        return rows

    @property
    def size(self) -> int:
        """Bytes of all texts."""
        return self._size

    def begin(self, label: str, mark: int = 0) -> None:
        """Begin a row, whose text `extend` adds. mark: added to the number of its label."""
        number = self._numbers.setdefault(label, len(self._names))
        if number == len(self._names):
            self._names.append(label)
        self._held.extend((self._size, number + mark))
        self.count += 1
        if len(self._held) > 2 * HELD:
            self._flush()

    def extend(self, text: str) -> None:
        """Add text to the row that was begun last."""
        with writing(self._folder):
            self._size += self._texts.write(text.encode())

    def add(self, label: str, text: str) -> None:
        """Add a whole row."""
        self.begin(label, CHAT if isinstance(text, Chat) else 0)
        self.extend(text)

    def _flush(self) -> None:
        with writing(self._folder):
            self._table.write(self._held.tobytes())
        self._held = array("q")

    def close(self, whole: bool = False) -> None:
        """End writing, so that rows can be read. whole: all rows are written, and a later attempt may use them."""
        with writing(self._folder):
            try:
                self._flush()
            finally:
                self._texts.close()
                self._table.close()
            if whole:
                scratch = self._folder / f"{WHOLE}~"
                scratch.write_text(json.dumps({"size": self._size, "count": self.count, "names": self._names}))
                scratch.replace(self._folder / WHOLE)

    def __getstate__(self) -> dict:
        """What a copy needs for reading; `datasets` makes copies."""
        return {name: value for name, value in vars(self).items() if name not in ("_texts", "_table")}

    def shuffled(self, seed: int, first: int = 0) -> Iterator[tuple[str, str]]:
        """The rows from place `first` on, in an order that the seed fixes: the permutation that `datasets` would use."""
        yield from self.read(np.random.default_rng(seed).permutation(self.count)[first:])

    def read(self, order: Sequence[int] | np.ndarray) -> Iterator[tuple[str, str]]:
        """Rows by their numbers."""
        if not self.count:
            return
        table = np.memmap(self._folder / "table", np.int64, "r").reshape(self.count, 2)
        with (self._folder / "texts").open("rb") as texts:
            for row in order:
                start, number = map(int, table[row])
                end = int(table[row + 1, 0]) if row + 1 < self.count else self._size
                text = os.pread(texts.fileno(), end - start, start).decode()
                yield self._names[number % CHAT], Chat(text) if number >= CHAT else text
