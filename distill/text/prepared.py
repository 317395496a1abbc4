"""A prepared folder on disk: `tokens.npy` (all documents one after the other, each ended by the separator), `starts.npy`
(where each document begins), `labels.npy` (its source, an index of the names in `meta.json`) and `meta.json`."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill.errors import UserError

ARRAYS = ("tokens", "starts", "labels")


def write(folder: Path, tokens: np.ndarray, starts: np.ndarray, labels: np.ndarray, names: Sequence[str], **facts) -> dict:
    """Write the arrays and what `meta.json` says of them: counts, names of labels, `facts`, and the hashes of the tokens
    (`sha256`) and of the files."""
    types = {"tokens": tokens.dtype, "starts": np.int64, "labels": np.int32}
    for name, array in zip(ARRAYS, (tokens, starts, labels), strict=True):
        np.save(folder / f"{name}.npy", np.asarray(array, types[name]))
    meta = {
        "tokens": len(tokens),
        "documents": len(labels),
        "labels": list(names),
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "files": {f"{name}.npy": file_hash(folder / f"{name}.npy") for name in ARRAYS},
        **facts,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    return meta


def read_meta(folder: Path) -> dict:
    """What `meta.json` says, once the files are found to be what was written.

    Raises:
        UserError: one is missing, cut or altered.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        files = {name: file_hash(folder / name) for name in meta["files"]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"the prepared text in {folder} is damaged ({error}); {_mend(folder)}") from error
    if altered := [name for name, known in meta["files"].items() if files[name] != known]:
        raise UserError(
            f"{folder / altered[0]} is not what was written there: the disk, or somebody, altered it; {_mend(folder)}"
        )
    return meta


def file_hash(name: str | Path) -> str:
    """The SHA-256 of a file."""
    with open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mend(folder: Path) -> str:
    return f"delete {folder}, and the same command makes it again"
