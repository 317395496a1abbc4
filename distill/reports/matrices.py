"""Pictures of attention and mixer matrices: positive entries are blue, negative red, and zeros transparent."""

import base64
import html
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from distill.errors import UserError
from distill.reading import read_arrays
from distill.reports.page import figures, note

OTHER = {"attention": "mixer", "mixer": "attention"}
MOST_SIDE = 1024  # the most tokens of a picture
FIX = "delete it, and the same `distill run` makes it again"
BLUE, RED = (37, 99, 201), (214, 69, 40)


def matrices_html(file: Path) -> str:
    """Figures of every head in a run's matrices.npz, with its attention and mixer matrix; empty without the file."""
    if not os.path.lexists(file):
        return ""
    arrays = read_arrays(file, fix=FIX)
    for name, array in arrays.items():
        kind = name.rpartition(" ")[2]
        other = arrays.get(name.removesuffix(kind) + OTHER.get(kind, ""))
        if array.dtype.kind != "f" or array.ndim != 2 or len(set(array.shape)) > 1 or not 0 < len(array) <= MOST_SIDE:
            raise UserError(
                f"{file} is damaged ({name!r} is {array.dtype} of shape {array.shape}, not a square matrix of floats with "
                f"at most {MOST_SIDE} tokens); {FIX}"
            )
        if other is None:
            raise UserError(f"{file} is damaged ({name!r} has no {OTHER.get(kind, 'attention')} matrix with it); {FIX}")
        if other.shape != array.shape:
            raise UserError(f"{file} is damaged ({name!r} and its {OTHER[kind]} have different shapes); {FIX}")
    return pairs_html(arrays) + note("The opacity is the square root of a weight, so that small weights are visible.")


def pairs_html(arrays: Mapping[str, Float[np.ndarray, "t t"]]) -> str:
    """Figures of arrays named `head attention` and `head mixer`, as `samples.matrices` names them."""
    names = [name.removesuffix(" attention") for name in arrays if name.endswith(" attention")]
    return figures(*(matrix_pair(name, arrays[f"{name} attention"], arrays[f"{name} mixer"]) for name in names))


def matrix_pair(name: str, attention: Float[np.ndarray, "t t"], mixer: Float[np.ndarray, "t t"]) -> str:
    """A figure of both matrices on one scale, with the mixer's relative error in Frobenius norm."""
    attention, mixer = (np.nan_to_num(np.asarray(matrix, np.float64)) for matrix in (attention, mixer))
    error = np.linalg.norm(attention - mixer) / max(float(np.linalg.norm(attention)), 1e-12)
    top = max(float(attention.max()), 1e-6)
    images = "".join(
        f"<img alt='{kind} matrix of {html.escape(name, quote=True)}' src='data:image/png;base64,{picture(matrix, top)}'>"
        for kind, matrix in (("attention", attention), ("mixer", mixer))
    )
    caption = f"{name}: attention, mixer (relative error {error:.2f})"
    return f"<figure><figcaption>{html.escape(caption)}</figcaption><div class='pair'>{images}</div></figure>"


def picture(matrix: Float[np.ndarray, "t t"], top: float) -> str:
    """A matrix as a PNG in base64, with one pixel for each entry; entries of magnitude `top` or more are opaque."""
    clean = np.nan_to_num(np.asarray(matrix, dtype=np.float64))
    pixels = np.where(clean[..., None] >= 0, np.array((*BLUE, 0)), np.array((*RED, 0))).astype(np.uint8)
    pixels[..., 3] = (255 * np.sqrt(np.clip(np.abs(clean) / top, 0, 1))).round().astype(np.uint8)
    return base64.b64encode(png(pixels)).decode()


def png(pixels: UInt8[np.ndarray, "h w 4"]) -> bytes:
    """A PNG file of red, green, blue and opacity (W3C PNG, third edition, section 11: IHDR, IDAT, IEND)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
