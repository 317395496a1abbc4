"""Checks of a model's folder before a library reads it: links that leave it, JSON sizes, config entries, pickled weights.

`config_bounds.py` has the ranges of config.json. Every check raises ValueError naming the file and the value.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import cached_file

from teachers.checks import loading
from teachers.config_bounds import check_config, check_generation, shown
from teachers.files import INDEX, WHOLE, folder_of

CONFIG, SETTINGS = "config.json", "generation_config.json"
SMALL, LARGE = (
    64 * 2**20,
    512 * 2**20,
)  # most bytes of a JSON file; most bytes of tokenizer.json, vocab.json and an index, which name every token or tensor
HEADER = 100 * 2**20  # most bytes of the header of a safetensors file; safetensors has the same limit
# Endings of the files that transformers may read in a folder by itself.
READ = (".json", ".jinja", ".safetensors", ".bin", ".model", ".txt", ".py", ".tiktoken")
TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "vocab.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".h5", ".msgpack", ".ot")
PICKLED_INDEX = "pytorch_model.bin.index.json"


def teacher_config(reference: str, location: str, trust_remote_code: bool) -> PretrainedConfig:
    """Load the config of a folder or a hub id; its entries are checked before transformers uses them.

    Raises:
        ValueError: naming the teacher and the fault of its config.
    """
    with loading(reference, "config"):
        if Path(location).is_dir():
            check_files(Path(location))
        if (folder := _fetched(location, CONFIG)) is not None:
            read_config(folder / CONFIG)
        return AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)


def check_folder(reference: str, location: str, allow_pickle: bool) -> None:
    """Refuse damaged generation settings, weights and tokenizer files, by checks that read no tensors.

    Raises:
        ValueError: naming the teacher and the file.
    """
    consent = "teacher_pickle: true"
    with loading(reference, "generation settings"):
        if Path(location).is_dir():
            check_settings(Path(location))
    with loading(reference, "weights"):
        if Path(location).is_dir():
            check_weight_files(Path(location), allow_pickle, consent)
        elif not allow_pickle and (folder := _fetched(location, INDEX)) is not None:
            index_of(folder, INDEX, (".safetensors",), consent)
    with loading(reference, "tokenizer"):
        if Path(location).is_dir():
            check_tokenizer_files(Path(location))


def _fetched(location: str, name: str) -> Path | None:
    """Returns the folder that holds the file `name` of a folder or hub id, downloaded if necessary; None without it."""
    if not Path(location).is_dir():
        try:
            cached_file(location, name)
        except (OSError, ValueError):  # transformers raises the error when it loads the file
            return None
    folder = folder_of(location)
    return folder if folder is not None and (folder / name).is_file() else None


def check_own(file: Path) -> None:
    """Refuse a path that is not a plain file, and a link that leaves the file's folder.

    In the hub's cache, files are links to the folder `blobs` next to `snapshots`; these are accepted.

    Raises:
        ValueError: naming the file and the target of the link.
    """
    try:
        root, end = file.parent.resolve(strict=True), file.resolve(strict=True)
        plain = end.is_file()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{file.name!r} cannot be read: {_reason(error)}; it may be a link that leads nowhere") from error
    homes = (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)
    if not any(end.is_relative_to(home) for home in homes):
        raise ValueError(f"{file.name!r} is a link that leaves the folder, to {str(end)!r}: copy that file into the folder")
    if not plain:
        raise ValueError(f"{file.name!r} is no plain file: put the file itself there")


def read_json(file: Path, most: int = SMALL) -> dict[str, Any]:
    """Read a JSON file that holds one object. NaN and infinity are refused, as in the JSON standard.

    Args:
        most: largest size in bytes.

    Raises:
        ValueError: the file is too large, not JSON, nested too deeply, or does not hold an object.
    """
    check_own(file)
    if (size := file.stat().st_size) > most:
        raise ValueError(f"{file.name} has {size:,} bytes, more than the {most:,} that such a file may have")
    try:
        content = json.loads(file.read_text("utf-8"), parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError(f"{file.name} is not a valid JSON file: it is nested too deeply") from error
    except UnicodeDecodeError as error:
        said = f"it is not UTF-8: {error.reason} at byte {error.start}"
        raise ValueError(f"{file.name!r} is not a valid JSON file: {said}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name!r} is not a valid JSON file: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds a {type(content).__name__}, where an object ({{...}}) belongs")
    return content


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {text}, and JSON has finite numbers only")
    return value


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def check_files(folder: Path) -> None:
    """Refuse links that leave the folder, and paths that are not plain files, among the files that transformers reads."""
    for file in sorted(folder.iterdir()):
        if file.suffix in READ and (file.is_symlink() or not file.is_dir()):
            check_own(file)


def check_settings(folder: Path) -> None:
    """Refuse generation settings that are damaged; a folder may have none."""
    if (folder / SETTINGS).exists() or (folder / SETTINGS).is_symlink():
        check_generation(read_json(folder / SETTINGS), SETTINGS)


def read_config(file: Path) -> dict[str, Any]:
    """Read a config.json and check the types and ranges of its entries.

    Raises:
        ValueError: naming the first entry with a wrong type or range.
    """
    entries = read_json(file)
    check_code_map(entries, file.name)
    check_config(entries, file.name)
    return entries


def check_code_map(entries: Mapping[str, Any], file: str) -> None:
    """Refuse an auto_map (the classes of the folder's own code) with keys that transformers does not know.

    Raises:
        ValueError: naming the key or the class.
    """
    found = entries.get("auto_map")
    if found is None:
        return
    if isinstance(found, list):  # a slow and a fast tokenizer, in old files
        found = {"AutoTokenizer": found}
    if not isinstance(found, dict):
        raise ValueError(f"{file}: auto_map is {shown(found)}; it should map names of transformers' classes to classes")
    for key, value in found.items():
        if not (key.startswith("Auto") and hasattr(transformers, key)):
            raise ValueError(
                f"{file}: auto_map has the key {key!r}, and transformers has no such class, so it would never load this "
                "code; take the entry out"
            )
        for name in value if isinstance(value, list) else [value]:
            parts = name.rpartition("--")[2].split(".") if isinstance(name, str) else []
            if not (len(parts) > 1 and all(part.isidentifier() for part in parts)) and name is not None:
                raise ValueError(f"{file}: auto_map's {key} is {shown(value)}; it should read module.Class")


def check_weight_files(folder: Path, allow_pickle: bool, consent: str = "") -> None:
    """Refuse an index that names a missing file, one outside the folder or a pickle, and safetensors with a damaged header.

    Args:
        consent: the setting that allows pickles, for the message; "" if there is none.

    Raises:
        ValueError: naming the file.
    """
    endings = (".safetensors", ".bin") if allow_pickle else (".safetensors",)
    shards = [WHOLE] if (folder / WHOLE).exists() else index_of(folder, INDEX, endings, consent)
    if shards is None:
        if not allow_pickle:
            raise ValueError(f"there is no {WHOLE}, and no {INDEX} that lists the tensors of {_strays(folder)}")
        shards = index_of(folder, PICKLED_INDEX, endings, consent) or []
    for name in shards:
        file = folder / name
        if not file.exists() and not file.is_symlink():
            raise ValueError(f"its index names {name}, which is not in the folder")
        check_own(file)
        if file.suffix == ".safetensors":
            _check_header(file)


def index_of(folder: Path, name: str, endings: tuple[str, ...], consent: str = "") -> list[str] | None:
    """Returns the files that an index names; None if there is no index.

    Args:
        endings: endings that the files may have. consent: as in `check_weight_files`.

    Raises:
        ValueError: the index is damaged, or names a file outside the folder or with another ending.
    """
    if not (folder / name).exists():
        return None
    places = read_json(folder / name, LARGE).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{name}: weight_map is {shown(places)}; it should name the file of every tensor")
    for file in sorted(set(places.values())):
        if Path(file).name != file or "\0" in file or "\\" in file:
            raise ValueError(f"{name} names the file {file!r}; shards lie beside their index")
        if not file.endswith(endings):
            trust = f", or set {consent} if you trust it" if consent else ""
            reason = f"a pickle, and unpickling runs code: convert it to safetensors{trust}"
            said = reason if file.endswith(PICKLES) else f"no {endings[0]} file"
            raise ValueError(f"{name} names {file!r}, which is {said}")
    return sorted(set(places.values()))


def _check_header(file: Path) -> None:
    """Refuse a file that is too short for its header; safetensors checks the header's contents."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if length < 0:
        raise ValueError(f"{file.name} has {size} bytes: header too small")
    if length > HEADER:
        raise ValueError(f"{file.name}: header too large: it would have {length:,} bytes")
    if length + 8 > size:
        raise ValueError(f"{file.name} ends inside its header: it has {size:,} bytes, and the header alone {length + 8:,}")


def _strays(folder: Path) -> str:
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", *PICKLES))
    return ", ".join(repr(name) for name in found[:3]) or "weights"


def check_tokenizer_files(folder: Path) -> None:
    """Refuse tokenizer files that are too large, not JSON, or name code for classes that transformers does not have."""
    for name in TOKENIZER:
        if not (folder / name).exists():
            continue
        entries = read_json(folder / name, LARGE if name in ("tokenizer.json", "vocab.json") else SMALL)
        if name == "tokenizer_config.json":
            check_code_map(entries, name)
            check_templates(entries.get("chat_template"), name)
    for file in (*folder.glob("*.jinja"), *(folder / "additional_chat_templates").glob("*.jinja")):
        check_own(file)
        if (size := file.stat().st_size) > SMALL:
            raise ValueError(f"{file.name} has {size:,} bytes, too many for a chat template: {SMALL:,} are read at most")
        try:
            file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file.name} is not UTF-8: {error.reason} at byte {error.start}") from error


def check_templates(found: Any, file: str) -> None:
    """Refuse chat templates that are neither text nor named texts.

    Raises:
        ValueError: showing their value.
    """
    named = found if isinstance(found, list) else []
    entries = [entry if isinstance(entry, dict) else {} for entry in named]
    texts = [text for entry in entries for text in (entry.get("name"), entry.get("template"))]
    texts += list(found.values()) if isinstance(found, dict) else [] if isinstance(found, list) else [found]
    if found is not None and not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{file}: chat_template is {shown(found)}; it should be text, or several texts by name")
