"""Options of a stage with 8-bit moments, and the mark of tests that need torchao."""

from importlib.util import find_spec

import pytest

installed = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed (extra int8)")
EIGHT = {"optimizer": "adamw_8bit"}
