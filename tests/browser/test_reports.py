"""Reports in a real browser: no error, no request, nothing wider than the screen, legible; and screenshots.

DISTILL_SCREENSHOTS names their folder (make test-browser: docs), DISTILL_REPORT the report that they show.
"""

import os
import shutil
from pathlib import Path

import pytest

import distill
from tests.browser.chromium import Chromium

pytestmark = pytest.mark.browser

SCREENS = {  # width and height in CSS pixels, dark mode, medium
    "desktop": (1200, 900, False, "screen"),
    "desktop dark": (1200, 900, True, "screen"),
    "phone": (390, 844, False, "screen"),
    "phone dark": (390, 844, True, "screen"),
    "paper": (718, 1000, True, "print"),  # A4 within its margins, asked for from a dark desktop
}
SHOTS = {"report": ("desktop", 1300), "report-dark": ("desktop dark", 1300), "report-phone": ("phone", 1500)}
CONTRAST = 4.5  # of text, WCAG 2.2, success criterion 1.4.3
LEGIBLE = 9  # pixels that the letters of a chart are high at least, on any screen

MEASURE = """(() => {
  const width = document.documentElement.clientWidth;
  const contained = e => e.closest('.scroll') && e.closest('.scroll') !== e;
  const wide = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > width + 1)
    .filter(e => matchMedia('print').matches || !contained(e)).map(e => e.tagName + ' ' + e.textContent.slice(0, 60));
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const back = light(getComputedStyle(document.body).backgroundColor);
  const ratio = v => (Math.max(v, back) + .05) / (Math.min(v, back) + .05);
  const texts = [...document.querySelectorAll('h1, .note, td, figcaption, .legend b')]
    .map(e => light(getComputedStyle(e).color));
  const charts = [...document.querySelectorAll('svg text')];
  return { width, scroll: document.documentElement.scrollWidth, wide, back,
    contrast: Math.min(...texts.map(ratio), ...charts.map(e => ratio(light(getComputedStyle(e).fill)))),
    letters: Math.min(99, ...charts.filter(e => !e.hasAttribute('transform')).map(e => e.getBoundingClientRect().height)) };
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(judged_run, tmp_path_factory):
    """A whole run's report, one of a run that has only begun, and one that compares both."""
    place = tmp_path_factory.mktemp("pages")
    (place / "begun").mkdir()
    shutil.copy(judged_run / "recipe.yaml", place / "begun" / "recipe.yaml")
    return {
        "whole": distill.report(judged_run, out=place / "whole.html"),
        "begun": distill.report(place / "begun"),
        "compared": distill.report(judged_run, place / "begun", judged_run, out=place / "compared.html"),
    }


def faults(browser, page, screen):
    """What is wrong with a page on a screen."""
    width, height, dark, medium = SCREENS[screen]
    opened = browser.open(page, width, height, dark, medium)
    found, wrong = browser.evaluate(MEASURE), list(opened.errors)
    wrong += [
        f"asked for {url}" for url in opened.requests if url != page.resolve().as_uri() and not url.startswith("data:")
    ]
    if found["scroll"] > width or found["wide"]:
        wrong.append(f"wider than {width}: {found['scroll']}, {found['wide'][:3]}")
    if found["contrast"] < CONTRAST:
        wrong.append(f"contrast of text {found['contrast']:.1f}")
    if found["letters"] < LEGIBLE:
        wrong.append(f"letters in charts {found['letters']:.1f} pixels high")
    if (found["back"] < 0.1) != (dark and medium == "screen"):
        wrong.append(f"luminance of the background {found['back']:.2f}")
    return wrong


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", ["whole", "begun", "compared"])
def test_reports(browser, pages, name, screen):
    assert faults(browser, pages[name], screen) == []


def test_it_is_printed(browser, pages):
    browser.open(pages["whole"], 1200, 900)
    printed = browser.pdf()
    assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") >= 2


def test_faults_are_seen(browser, tmp_path):
    """The same check on a page that has them all."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<meta name='viewport' content='width=device-width'><body style='background:#fff'>"
        "<p class='note' style='color:#ccc'>pale<div style='width:800px'>wide</div><img src='gone.png'>"
        "<svg viewBox='0 0 900 30' width='300'><text y='9' font-size='9'>x</text></svg>"
        "<script>console.error('said'); missing()</script>"
    )
    said = " | ".join(faults(browser, page, "phone"))
    for part in (
        "said",
        "Uncaught",
        "gone.png",
        "a request failed",
        "wider than 390",
        "contrast of text",
        "letters in charts",
    ):
        assert part in said, part
    assert "luminance" in " | ".join(faults(browser, page, "phone dark"))


@pytest.mark.skipif("DISTILL_SCREENSHOTS" not in os.environ, reason="DISTILL_SCREENSHOTS names no folder for them")
@pytest.mark.parametrize("name", SHOTS)
def test_screenshots(browser, pages, name):
    screen, height = SHOTS[name]
    page = Path(os.environ.get("DISTILL_REPORT") or pages["whole"])
    assert faults(browser, page, screen) == []
    file = Path(os.environ["DISTILL_SCREENSHOTS"]) / f"{name}.png"
    browser.screenshot(file, SCREENS[screen][0], height)
    assert file.read_bytes().startswith(b"\x89PNG")
