"""What is done to the place before a command: steps as plain data, so that a found input can be kept and read.

A step is {"do": name, "file": path, ...}. Paths begin with @short, @half or @every for the run folders of these recipes, and with
@cache for the prepared training text. A step whose file is not there does nothing: an earlier one may have taken it away.
"""

import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import struct
from pathlib import Path

import yaml

from tests.fuzz import gguf_raw
from tests.fuzz.values import CODE, as_json, real

STEPS = {}


def step(function):
    """Put a function into the table of steps, by its name."""
    STEPS[function.__name__.rstrip("_")] = function
    return function


def apply(steps: list[dict], folder: Path) -> list[Path]:
    """Take the steps; the files that they touched."""
    touched = []
    for entry in steps:
        path = folder / resolve(entry["file"], folder)
        touched.append(path)
        options = {key: value for key, value in entry.items() if key not in ("do", "file")}
        try:
            STEPS[entry["do"]](path, **options)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            continue
    return touched


def resolve(path: str, folder: Path) -> str:
    """A path with the run folders' and the prepared text's real names."""
    if not path.startswith("@"):
        return path
    name, _, rest = path[1:].partition("/")
    if name == "cache":
        made = sorted((folder / "cache" / "prepared").glob("[!.]*"), key=lambda one: -(one / "tokens.npy").stat().st_size)
        found = made[0] if made else folder / "cache"
    else:
        found = next(iter(sorted((folder / "runs").glob(f"{name}-*"))), folder / "runs" / name)
    return str(found.relative_to(folder) / rest)


# any file


@step
def write(path: Path, text: str | dict = "", hex: str | None = None) -> None:
    """Replace the file, or make it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path)
    path.write_bytes(bytes.fromhex(hex) if hex is not None else real(text).encode("utf-8", "surrogatepass"))


@step
def cut(path: Path, at: float) -> None:
    """Keep the first part, a share of all."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * at)])


@step
def delete(path: Path) -> None:
    _clear(path)


@step
def folder(path: Path) -> None:
    """Put a folder where the file was."""
    _clear(path)
    path.mkdir(parents=True)


@step
def link(path: Path, to: str) -> None:
    """Put a link in the file's place; `to` is relative to the place, or "self"."""
    _clear(path)
    place = next(parent for parent in path.parents if (parent / "outside").is_dir())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(path.name if to == "self" else os.path.relpath(place / to, path.parent))


@step
def flip(path: Path, at: float, bit: int) -> None:
    """Turn one bit over."""
    data = bytearray(path.read_bytes())
    if data:
        data[min(int(len(data) * at), len(data) - 1)] ^= 1 << bit
    path.write_bytes(data)


@step
def append(path: Path, text: str | dict) -> None:
    with path.open("ab") as file:
        file.write(real(text).encode("utf-8", "surrogatepass"))


@step
def rename(path: Path, to: str) -> None:
    """Give the file another name in its folder."""
    try:
        path.rename(path.with_name(to))
    except (OSError, ValueError):
        return


# JSON and YAML


@step
def set_(path: Path, at: list, value) -> None:
    """Set a node of a JSON or YAML file; places that are not there are made."""
    _store(path, _with(_parsed(path), at, value))


@step
def drop(path: Path, at: list) -> None:
    """Take a node out."""
    tree = _parsed(path)
    node = _node(tree, at[:-1])
    if at and isinstance(node, dict):
        node.pop(at[-1], None)
    elif at and isinstance(node, list) and isinstance(at[-1], int) and at[-1] < len(node):
        del node[at[-1]]
    _store(path, tree)


@step
def line(path: Path, number: int, text: str | dict) -> None:
    """Replace a line of a text file."""
    lines = path.read_text().splitlines() or [""]
    lines[number % len(lines)] = real(text)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


# weights and arrays


@step
def header(path: Path, at: list, value) -> None:
    """Set a node of the header of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    tree = _with(json.loads(data[8 : 8 + length]), at, value)
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

    meta = _parsed(path)
    for name in meta.get("files", {}):
        if (path.parent / name).is_file():
            meta["files"][name] = hashlib.sha256((path.parent / name).read_bytes()).hexdigest()
    _store(path, meta)


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


# text, compressed


@step
def packed(path: Path, text: str | dict, form: str, damage: str = "", times: int = 1) -> None:
    """A text file in a compressed form, whole, cut short, with garbage behind it, or many times itself."""
    import zstandard

    data = real(text).encode("utf-8", "surrogatepass") * times
    squeeze = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress, "": bytes}[form]
    data = squeeze(data)
    path.write_bytes({"cut": data[: len(data) // 2], "tail": data + b"garbage"}.get(damage, data))


@step
def long_line(path: Path, size: int, form: str, word: str = "abcdefgh") -> None:
    """A JSON line with one text of so many characters."""
    squeeze = {"gz": gzip.compress, "": bytes}[form]
    path.write_bytes(squeeze(json.dumps({"text": word * (size // len(word))}).encode() + b"\n"))


@step
def table(path: Path, column: str, kind: str) -> None:
    """A parquet file with one column of a kind."""
    import pyarrow
    import pyarrow.parquet

    cells = {
        "text": ["a b c", "d e f"],
        "null": pyarrow.array([None, None], pyarrow.string()),
        "int": [1, 2],
        "list": [["a"], ["b"]],
        "struct": [{"a": 1}, {"a": 2}],
        "bytes": [b"\xff\xfe", b"a"],
        "none": [],
    }[kind]
    pyarrow.parquet.write_table(pyarrow.table({column: cells}), path)


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


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _parsed(path: Path):
    try:
        return yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}


def _store(path: Path, tree) -> None:
    path.write_text(as_json(tree, yaml=path.suffix == ".yaml"))


def _node(tree, at: list):
    for part in at:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _with(tree, at: list, value):
    """The tree with a node set."""
    if not at:
        return value
    first, rest = at[0], at[1:]
    if isinstance(tree, list) and isinstance(first, int):
        index = min(first, len(tree))
        inner = tree[index] if index < len(tree) else {}
        return [*tree[:index], _with(inner, rest, value), *tree[index + 1 :]]
    content = dict(tree) if isinstance(tree, dict) and "$value" not in tree else {}
    return {**content, first: _with(content.get(first, {}), rest, value)}
