"""Checks of a GGUF file's header against the file's size, before gguf-py allocates arrays of the sizes in the header.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from math import prod
from pathlib import Path

ENTRIES, TENSORS = 2**16, 2**16  # largest numbers accepted
ITEMS = 2**22  # most values of all arrays together; the largest vocabularies have about 2 million with scores and merges
KEY, TEXT, NAME = 65_535, 2**26, 1024  # most bytes of an entry's name, of its text, and of a tensor's name
ALIGNMENTS = [2**power for power in range(17)]
DIMENSIONS = 4
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct codes by type
TRUTH, STRING, ARRAY = 7, 8, 9


def check_header(path: Path) -> None:
    """Check every entry of a file's header.

    Raises:
        ValueError: the file is not GGUF, ends early, states sizes larger than it can hold, or has a name twice.
    """
    size = path.stat().st_size
    if size < 24:
        raise ValueError(f"it has {size} bytes, and the shortest header has 24")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(data, size).check()


class _Walk:
    """A reader of the header: its position in the file, the byte order, and the number of array values read so far."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at, self.order, self.items = data, size, 0, "<", 0

    def check(self) -> None:
        if self.data[:4] != b"GGUF":
            raise ValueError(f"it begins with {self.data[:4]!r}, where the magic bytes GGUF belong")
        self.at = 4
        version = self.number("I", "its version")
        if version & 65535 == 0:  # written by a machine of the other byte order
            self.order, self.at = ">", 4
            version = self.number("I", "its version")
        if version not in (2, 3):
            raise ValueError(f"it is of version {version}; versions 2 and 3 are read")
        tensors, entries = self.number("Q", "the count of tensors"), self.number("Q", "the count of entries")
        for what, count, most in (("tensors", tensors, TENSORS), ("entries", entries, ENTRIES)):
            if count > most:
                raise ValueError(f"it promises {count:,} {what}; {most:,} are read at most")
        alignment = self.entries(entries)
        ends = self.tensors(tensors, alignment)
        begin = -(-self.at // alignment) * alignment
        for name, end in ends.items():
            if begin + end > self.size:
                raise ValueError(f"its tensor {name!r} would end at byte {begin + end:,}, and the file has {self.size:,}")

    def entries(self, count: int) -> int:
        """Check the entries; returns the alignment of the tensors."""
        names, alignment = set(), 32
        for index in range(count):
            name = self.text(f"the name of entry {index}", KEY)
            if name in names:
                raise ValueError(f"it has the entry {name!r} twice")
            names.add(name)
            kind, what = self.number("I", f"the type of {name!r}"), f"its entry {name!r}"
            if name == "general.alignment":
                if kind != 4 or (alignment := self.number("I", what)) not in ALIGNMENTS:
                    raise ValueError(
                        f"general.alignment is {alignment} of type {kind}; it should be a power of two (uint32)"
                    )
            else:
                self.value(kind, what)
        return alignment

    def value(self, kind: int, what: str) -> None:
        """Check a value and move past it."""
        if kind in SCALARS:
            self.scalars(kind, 1, what)
        elif kind == STRING:
            self.text(what, TEXT)
        elif kind == ARRAY:
            self.array(what)
        else:
            raise ValueError(f"{what} is of the type {kind}, which GGUF does not have")

    def array(self, what: str) -> None:
        kind, count = self.number("I", what), self.number("Q", what)
        self.items += count
        if self.items > ITEMS:
            raise ValueError(f"{what} has {count:,} values; all arrays together may have {ITEMS:,}")
        if kind in SCALARS:
            self.scalars(kind, count, what)
        elif kind == STRING:
            for _ in range(count):
                self.text(what, TEXT)
        else:
            nested = "arrays" if kind == ARRAY else f"the type {kind}"
            raise ValueError(f"{what} is an array of {nested}, which no model has")

    def scalars(self, kind: int, count: int, what: str) -> None:
        begin = self.at
        self.skip(struct.calcsize(f"={SCALARS[kind]}") * count, what)
        if kind == TRUTH and max(self.data[begin : self.at], default=0) > 1:
            raise ValueError(f"{what} is neither true nor false")

    def tensors(self, count: int, alignment: int) -> dict[str, int]:
        """Check the descriptions of the tensors; returns the end of each in bytes, counted from the start of the data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        ends = {}
        for index in range(count):
            name = self.text(f"the name of tensor {index}", NAME)
            if name in ends:
                raise ValueError(f"it has the tensor {name!r} twice")
            what = f"its tensor {name!r}"
            dimensions = self.number("I", what)
            if not 1 <= dimensions <= DIMENSIONS:
                raise ValueError(f"{what} has {dimensions:,} dimensions; 1 to {DIMENSIONS} are read")
            shape = [self.number("Q", what) for _ in range(dimensions)]
            kind, offset = self.number("I", what), self.number("Q", what)
            if kind not in GGMLQuantizationType.__members__.values():
                raise ValueError(f"{what} is of the type {kind}, which this version of gguf does not know")
            values, bytes_of = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            if min(shape) < 1 or shape[0] % values:
                raise ValueError(f"{what} has the shape {shape[::-1]}, which does not fit blocks of {values} values")
            if offset % alignment:
                raise ValueError(f"{what} begins at {offset:,}, which is no multiple of the alignment {alignment}")
            ends[name] = offset + prod(shape) // values * bytes_of
        return ends

    def text(self, what: str, most: int) -> str:
        length = self.number("Q", what)
        if length > most:
            raise ValueError(f"{what} would have {length:,} bytes; {most:,} are read at most")
        begin = self.at
        self.skip(length, what)
        try:
            return self.data[begin : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is no UTF-8: {error.reason} at byte {error.start}") from error

    def number(self, code: str, what: str) -> int:
        begin = self.at
        self.skip(struct.calcsize(f"={code}"), what)
        return struct.unpack_from(f"{self.order}{code}", self.data, begin)[0]

    def skip(self, length: int, what: str) -> None:
        if length > self.size - self.at:
            raise ValueError(f"it ends early: {what} needs {length:,} bytes at {self.at:,}, and the file has {self.size:,}")
        self.at += length
