"""Damage to weights, arrays and GGUF files, and code that comes with them: further steps of `damage.py`."""

import io
import json
import pickle
import struct
from pathlib import Path

from tests.fuzz import gguf_raw
from tests.fuzz.damage import parsed, placed, step, store
from tests.fuzz.values import CODE, as_json, real

# weights and arrays


@step
def header(path: Path, at: list, value) -> None:
    """Set a node of the header of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    tree = placed(json.loads(data[8 : 8 + length]), at, value)
    text = as_json(tree).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@step
def header_length(path: Path, value: int) -> None:
    """Claim another length of the header."""
    data = path.read_bytes()
    path.write_bytes(struct.pack("<Q", value % 2**64) + data[8:])


@step
def tensors(path: Path, change: str, index: int = 0) -> None:
    """Change a tensor of a whole safetensors file: nan, inf, zero, drop, shape, type, add."""
    import torch
    from safetensors.torch import load_file, save_file

    found = load_file(path)
    if not found:
        return
    name = sorted(found)[index % len(found)]
    tensor = found[name]
    fill = {"nan": torch.nan, "inf": torch.inf, "zero": 0, "huge": 3e38}
    if change in fill and tensor.is_floating_point():
        found[name] = torch.full_like(tensor, fill[change])
    elif change == "drop":
        del found[name]
    elif change == "shape":
        found[name] = torch.zeros(*tensor.shape, 2)
    elif change == "empty":
        found[name] = torch.zeros(0)
    elif change == "type":
        found[name] = tensor.to(torch.int64)
    elif change == "add":
        found["foreign.weight"] = torch.zeros(3)
    save_file(found, path, metadata={"format": "pt"})


@step
def array(path: Path, change: str, member: str = "") -> None:
    """Change an array of an .npy file, or all arrays of an .npz file: object, shape, scalar, text, nan, negative, huge."""
    import numpy as np

    made = {
        "object": lambda old: np.array([_Bomb()], dtype=object),
        "shape": lambda old: np.zeros((3, *old.shape), old.dtype),
        "scalar": lambda old: np.array(3),
        "text": lambda old: np.array(["a", "b"]),
        "nan": lambda old: np.full(old.shape, np.nan, np.float32),
        "negative": lambda old: np.full(old.shape, -5, np.int64),
        "huge": lambda old: np.full(old.shape, 2**31 - 1, np.int64),
        "empty": lambda old: np.zeros(0, old.dtype),
    }[change]
    if path.suffix == ".npz":
        with np.load(path) as old:
            new = {name: made(old[name]) for name in old.files}
        with path.open("wb") as file:
            np.savez(file, **new)
    else:
        old = np.load(path)
        with path.open("wb") as file:
            np.save(file, made(old), allow_pickle=True)


@step
def claimed_shape(path: Path, shape: list) -> None:
    """An .npy file whose header claims another shape."""
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {tuple(shape)!r}, }}".encode()
    head += b" " * (63 - (10 + len(head)) % 64) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)


@step
def rehash(path: Path) -> None:
    """Make the hashes in a prepared folder's meta.json those of its files."""
    import hashlib

    meta = parsed(path)
    for name in meta.get("files", {}):
        if (path.parent / name).is_file():
            meta["files"][name] = hashlib.sha256((path.parent / name).read_bytes()).hexdigest()
    store(path, meta)


# GGUF


@step
def entry(path: Path, name: str, kind: int, value, inner: int | None = None, length: int | None = None) -> None:
    """Set an entry of a GGUF file, of any type; `inner` makes an array of it, whose length may be a lie. A kind of -1 takes
    the entry out."""
    raw = gguf_raw.read(path.read_bytes())
    raw.entries = [one for one in raw.entries if one[0] != name]
    if kind == gguf_raw.ARRAY:
        raw.entries.append([name, kind, [inner or 0, length, real(value) if isinstance(value, list) else [real(value)]]])
    elif kind >= 0:
        raw.entries.append([name, kind, real(value)])
    path.write_bytes(gguf_raw.write(raw))


@step
def counts(path: Path, version: int | None = None, tensors: int | None = None, entries: int | None = None) -> None:
    """Claim another version or other counts."""
    raw = gguf_raw.read(path.read_bytes())
    raw.version = raw.version if version is None else version
    raw.tensor_count, raw.entry_count = tensors, entries
    path.write_bytes(gguf_raw.write(raw))


@step
def tensor(path: Path, index: int, change: str, value) -> None:
    """Change what a GGUF file says of a tensor: name, sizes, kind, offset, or drop it."""
    raw = gguf_raw.read(path.read_bytes())
    index %= len(raw.tensors)
    if change == "drop":
        del raw.tensors[index]
    else:
        raw.tensors[index][["name", "sizes", "kind", "offset"].index(change)] = real(value)
    path.write_bytes(gguf_raw.write(raw))


# code that must never run


class _Bomb:
    """Its pickle runs code where it is read."""

    def __reduce__(self):
        return eval, (CODE,)


@step
def pickled(path: Path, form: str = "plain") -> None:
    """A pickle that runs code, as it is or as torch.save's archive."""
    data = io.BytesIO()
    if form == "torch":
        import torch

        torch.save({"weight": _Bomb()}, data)
    else:
        pickle.dump(_Bomb(), data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.getvalue())


@step
def program(path: Path, keep: bool = False) -> None:
    """A Python file that runs code where it is imported; before what stands there, or in its place."""
    path.write_text(f"{CODE}\n" + (path.read_text() if keep else ""))
