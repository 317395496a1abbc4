"""A GGUF file taken apart into bytes and put together again, to write what no writer would."""

import struct
from dataclasses import dataclass
from pathlib import Path

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
U32, I32, F32, BOOL, STRING, ARRAY, U64, F64 = 4, 5, 6, 7, 8, 9, 10, 12


def u32(value):
    """A value as an entry's type and bytes; the others likewise."""
    return U32, struct.pack("<I", value)


def f32(value):
    return F32, struct.pack("<f", value)


def text(value):
    return STRING, _text(value)


def array(kind, count, payload=b""):
    """An array that promises so many values of a type, whatever follows."""
    return ARRAY, struct.pack("<IQ", kind, count) + payload


def texts(values):
    return array(STRING, len(values), b"".join(map(_text, values)))


def floats(values):
    return array(F32, len(values), struct.pack(f"<{len(values)}f", *values))


def _text(value):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


@dataclass
class Parts:
    """entries: (name, type, bytes). tensors: [name, shape, type, offset]. data: what follows the header."""

    entries: list
    tensors: list
    data: bytes
    alignment: int = 32

    def set(self, name, value):
        """Replace an entry, or add one; with None take it away."""
        kept = [entry for entry in self.entries if entry[0] != name]
        place = next((place for place, entry in enumerate(self.entries) if entry[0] == name), len(kept))
        self.entries = kept[:place] + ([] if value is None else [(name, *value)]) + kept[place:]

    def write(self, path):
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.entries))
        head += b"".join(_text(name) + struct.pack("<I", kind) + payload for name, kind, payload in self.entries)
        for name, shape, kind, offset in self.tensors:
            head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        Path(path).write_bytes(head + bytes(-len(head) % self.alignment) + self.data)
        return path


def apart(path):
    """The parts of a file that is right."""
    whole, at = Path(path).read_bytes(), 8
    (tensor_count, entry_count), at = struct.unpack_from("<QQ", whole, at), at + 16
    entries, tensors = [], []
    for _ in range(entry_count):
        name, at = _read_text(whole, at)
        (kind,), at = struct.unpack_from("<I", whole, at), at + 4
        end = _end(whole, at, kind)
        entries.append((name, kind, whole[at:end]))
        at = end
    for _ in range(tensor_count):
        name, at = _read_text(whole, at)
        (dimensions,), at = struct.unpack_from("<I", whole, at), at + 4
        *shape, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", whole, at)
        at += 8 * dimensions + 12
        tensors.append([name, shape, kind, offset])
    return Parts(entries, tensors, whole[at + -at % 32 :])


def _read_text(whole, at):
    (length,) = struct.unpack_from("<Q", whole, at)
    return whole[at + 8 : at + 8 + length].decode(), at + 8 + length


def _end(whole, at, kind):
    if kind == STRING:
        return at + 8 + struct.unpack_from("<Q", whole, at)[0]
    if kind != ARRAY:
        return at + SIZES[kind]
    (inner, count), at = struct.unpack_from("<IQ", whole, at), at + 12
    for _ in range(count):
        at = _end(whole, at, inner)
    return at
