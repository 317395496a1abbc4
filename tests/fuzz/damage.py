"""What is done to the place before a command: steps as plain data, so that a found input can be kept and read.

A step is {"do": name, "file": path, ...}. Paths begin with @short, @half or @every for the run folders of these recipes,
and with @cache for the prepared training text. A step whose file is not there does nothing: an earlier one may have taken it
away. Steps of weights, GGUF files and code are in `damage_models.py`.
"""

import gzip
import json
import lzma
import os
import shutil
from pathlib import Path

import yaml

from tests.fuzz.values import as_json, real

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
        made = sorted(
            (folder / "cache" / "prepared").glob("[!.]*"), key=lambda one: -(one / "00000" / "tokens.npy").stat().st_size
        )
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
    store(path, placed(parsed(path), at, value))


@step
def drop(path: Path, at: list) -> None:
    """Take a node out."""
    tree = parsed(path)
    node = _node(tree, at[:-1])
    if at and isinstance(node, dict):
        node.pop(at[-1], None)
    elif at and isinstance(node, list) and isinstance(at[-1], int) and at[-1] < len(node):
        del node[at[-1]]
    store(path, tree)


@step
def line(path: Path, number: int, text: str | dict) -> None:
    """Replace a line of a text file."""
    lines = path.read_text().splitlines() or [""]
    lines[number % len(lines)] = real(text)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


@step
def row(path: Path, number: int, value) -> None:
    """Replace a line of a text file by a value as JSON."""
    lines = path.read_text().splitlines() or [""]
    lines[number % len(lines)] = as_json(value)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))


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


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def parsed(path: Path):
    try:
        return yaml.safe_load(path.read_text()) if path.suffix == ".yaml" else json.loads(path.read_text())
    except (ValueError, yaml.YAMLError, RecursionError):
        return {}


def store(path: Path, tree) -> None:
    path.write_text(as_json(tree, yaml=path.suffix == ".yaml"))


def _node(tree, at: list):
    for part in at:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def placed(tree, at: list, value):
    """The tree with a node set."""
    if not at:
        return value
    first, rest = at[0], at[1:]
    if isinstance(tree, list) and isinstance(first, int):
        index = min(first, len(tree))
        inner = tree[index] if index < len(tree) else {}
        return [*tree[:index], placed(inner, rest, value), *tree[index + 1 :]]
    content = dict(tree) if isinstance(tree, dict) and "$value" not in tree else {}
    return {**content, first: placed(content.get(first, {}), rest, value)}
