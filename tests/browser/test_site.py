"""The documentation site in headless Chromium: pages fit a wide and a narrow screen, and ask nothing of another machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser.chromium import Chromium

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.browser


def test_pages_fit_and_ask_nobody(tmp_path):
    site = tmp_path / "site"
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)], cwd=ROOT, env=quiet, check=True)
    with Chromium(tmp_path / "profile") as browser:
        for page in sorted(site.glob("*.html")):
            for width, dark in ((1440, False), (390, True)):
                opened = browser.open(page, width, 900, dark)
                assert all(request.startswith(("file:", "data:", "blob:")) for request in opened.requests), page.name
                assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{page.name} at {width}"
