"""GGUF files as plain data and back, with nothing checked on the way: what no writer would write can be written here."""

import math
import struct
from dataclasses import dataclass

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32


@dataclass
class Raw:
    """A file: its version, the counts that it claims (None: the true ones), entries, tensors and their bytes. An entry is
    [name, type, value], of an array [name, 9, [type of elements, claimed length or None, values]]; a tensor is
    [name, dimensions, type, offset]."""

    version: int
    entries: list
    tensors: list
    data: bytes
    tensor_count: int | None = None
    entry_count: int | None = None


def read(data: bytes) -> Raw:
    """A file that is whole."""
    version, tensors, entries = struct.unpack_from("<IQQ", data, 4)
    at, raw = 24, Raw(version, [], [], b"")
    for _ in range(entries):
        name, at = _string(data, at)
        (kind,), at = struct.unpack_from("<I", data, at), at + 4
        value, at = _value(data, at, kind)
        raw.entries.append([name, kind, value])
    for _ in range(tensors):
        name, at = _string(data, at)
        (rank,), at = struct.unpack_from("<I", data, at), at + 4
        sizes = list(struct.unpack_from(f"<{rank}Q", data, at))
        kind, offset = struct.unpack_from("<IQ", data, at + 8 * rank)
        at += 8 * rank + 12
        raw.tensors.append([name, sizes, kind, offset])
    raw.data = data[-(-at // ALIGNMENT) * ALIGNMENT :]
    return raw


def write(raw: Raw) -> bytes:
    """The file's bytes; numbers are cut to what their fields hold."""
    tensors = len(raw.tensors) if raw.tensor_count is None else raw.tensor_count
    entries = len(raw.entries) if raw.entry_count is None else raw.entry_count
    out = b"GGUF" + _packed("I", raw.version) + _packed("Q", tensors) + _packed("Q", entries)
    for name, kind, value in raw.entries:
        out += _text(name) + _packed("I", kind) + _written(kind, value)
    for name, sizes, kind, offset in raw.tensors:
        out += _text(name) + _packed("I", len(sizes)) + b"".join(_packed("Q", size) for size in sizes)
        out += _packed("I", kind) + _packed("Q", offset)
    return out + bytes(-len(out) % ALIGNMENT) + raw.data


def _string(data: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length].decode("utf-8", "surrogateescape"), at + 8 + length


def _value(data: bytes, at: int, kind: int):
    if kind == STRING:
        return _string(data, at)
    if kind == ARRAY:
        inner, length = struct.unpack_from("<IQ", data, at)
        values, at = [], at + 12
        for _ in range(length):
            value, at = _value(data, at, inner)
            values.append(value)
        return [inner, None, values], at
    (value,) = struct.unpack_from(f"<{SCALARS[kind]}", data, at)
    return value, at + struct.calcsize(f"<{SCALARS[kind]}")


def _written(kind: int, value) -> bytes:
    if kind == STRING:
        return _text(str(value))
    if kind == ARRAY:
        inner, length, values = value
        head = _packed("I", inner) + _packed("Q", len(values) if length is None else length)
        return head + b"".join(_written(inner, one) for one in values)
    return _packed(SCALARS.get(kind, "Q"), value)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass" if any("\ud800" <= c < "\udc80" for c in text) else "surrogateescape")
    return _packed("Q", len(data)) + data


def _packed(form: str, value) -> bytes:
    if form in "fd":
        try:
            return struct.pack(f"<{form}", float(value))
        except (OverflowError, TypeError, ValueError):
            return struct.pack(f"<{form}", float("inf"))
    if form == "?":
        return struct.pack("<?", bool(value))
    size = struct.calcsize(f"<{form}")
    number = int(value) if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)) else 0
    return (number & (2 ** (8 * size) - 1)).to_bytes(size, "little")
