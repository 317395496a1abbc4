"""From a reference to files: a hub id, a local folder, a GGUF file, or a GGUF file inside an installed package."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "package:"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


@dataclass(frozen=True)
class Source:
    """Where a teacher is: `kind` is "hub", "folder" or "gguf"; `location` a hub id or a path."""

    kind: str
    location: str
    reference: str


def resolve(reference: str, allow_pickle: bool = False) -> Source:
    """Find what a reference names, without loading it.

    Raises:
        FileNotFoundError: no such package, file or folder.
        ValueError: a folder without a model, one with pickled weights only, or a malformed reference.
    """
    if reference.startswith(PACKAGE):
        return Source("gguf", str(_in_package(reference)), reference)
    path = Path(reference).expanduser()
    if reference.endswith(".gguf"):
        if not path.is_file():
            raise FileNotFoundError(f"there is no GGUF file at {path}")
        return Source("gguf", str(path), reference)
    if path.is_dir():
        _check_folder(path, allow_pickle)
        return Source("folder", str(path), reference)
    if reference.startswith((".", "/", "~")) or not HUB_ID.match(reference):
        raise FileNotFoundError(
            f"teacher {reference!r} is no folder here; give a hub id, a folder, a GGUF file or {PACKAGE}NAME/FILE"
        )
    return Source("hub", reference, reference)


def _in_package(reference: str) -> Path:
    name, _, file = reference.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier() or not file:
        raise ValueError(f"{reference!r} should read {PACKAGE}NAME/FILE.gguf, NAME being an importable package")
    spec = importlib.util.find_spec(name)  # finds the folder; a top-level name is not imported
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    if not folders:
        raise FileNotFoundError(
            f"{reference}: no package {name!r} is installed here; try pip install --no-deps {name.replace('_', '-')}"
        )
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    raise FileNotFoundError(f"{reference}: the package {name!r} has no file {file!r} (looked in {folders[0]})")


def _check_folder(path: Path, allow_pickle: bool) -> None:
    if not (path / "config.json").is_file():
        found = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; it holds {found[0]}, which you can name directly" if found else ""
        raise ValueError(f"{path} has no config.json, so it is no model folder{hint}")
    if any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")) and not allow_pickle:
        raise ValueError(
            f"{path} has only pickled weights (*.bin), and unpickling runs code: convert them to safetensors, "
            "or set teacher_pickle: true if you trust them"
        )
    if not any(path.glob("*.bin")):
        raise ValueError(f"{path} has a config.json but no weights (*.safetensors)")
