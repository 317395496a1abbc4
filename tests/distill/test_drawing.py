"""Drawings of reports: axes, lines, averages and PNG files."""

import re
import struct
import zlib

import numpy as np
import pytest

from distill.reports import svg
from distill.reports.matrices import png


def test_axes_put_values_where_they_belong():
    axis = svg.Axis([1.0, 1000.0], 0, 300, log=True)
    assert axis.place(10.0) == pytest.approx(100) and axis.ticks() == [1, 10, 100, 1000]
    axis = svg.Axis([0.1, 0.93], 200, 0, zero=True)
    assert axis.place(0.0) == 200 and axis.place(0.93) == 0 and axis.ticks() == pytest.approx([0, 0.5])
    for values in ([3.0, 3.0], [0.0, 0.0], [1e-9, 2e-9], [5.0, 5.1]):
        axis = svg.Axis(values, 0, 100)
        assert len(axis.ticks()) >= 2 and all(-1e-6 <= axis.place(tick) <= 100 + 1e-6 for tick in axis.ticks())
    narrow = svg.Axis([0.92, 0.95], 0, 100, log=True)
    assert len(narrow.ticks()) >= 2


def test_lines_leave_out_what_is_no_number_and_never_grow():
    drawn = svg.line_chart("t", [svg.Series("a", [1, 2, 3, 4], [1.0, float("nan"), float("-inf"), 2.0])], "x", "y")
    assert len(re.search(r"points='([^']*)'", drawn)[1].split()) == 2
    assert "no finite values" in svg.line_chart("t", [svg.Series("a", [1.0], [float("inf")])], "x", "y")
    long = svg.line_chart("t", [svg.Series("a", range(1, 100_001), [1.0] * 100_000)], "x", "y")
    assert len(long) < 20_000


def test_averages_keep_the_mean():
    assert svg.averaged([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0] and svg.averaged([1.0, 2.0], 5) == [1.0, 2.0]


def test_a_png_is_what_the_standard_says():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4)).astype(np.uint8)
    data = png(pixels)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    place, chunks = 8, {}
    while place < len(data):
        (size,), kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + size]
        assert struct.unpack(">I", data[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind], place = body, place + 12 + size
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (5, 3)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(3, 21)
    assert (rows[:, 0] == 0).all() and (rows[:, 1:].reshape(3, 5, 4) == pixels).all()
