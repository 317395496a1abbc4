"""The parts of a release other than the code: its version in every place, its changelog, the workflows and the forms."""

import re
import tomllib
from datetime import date
from pathlib import Path

import pytest
import yaml

import distill

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert cited["version"] == distill.__version__
    assert cited["license"] == PROJECT["license"]
    assert cited["authors"] and cited["title"] and cited["message"]
    release = re.search(r"^## \[(.+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert release.groups() == (distill.__version__, str(cited["date-released"]))


def test_the_changelog_keeps_its_form():
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    releases = [line for line in lines if line.startswith("## ")]
    assert releases[0] == "## [Unreleased]"
    days = [date.fromisoformat(re.fullmatch(r"## \[\d+\.\d+\.\d+\] - (\S+)", line)[1]) for line in releases[1:]]
    assert days == sorted(days, reverse=True)
    kinds = {line for line in lines if line.startswith("### ")}
    assert kinds <= {f"### {kind}" for kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")}


def test_classifiers_name_pythons_that_are_supported():
    pythons = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    least = tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))
    assert pythons and all(tuple(map(int, one.split("."))) >= least for one in pythons)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_make_alone(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["name"] == path.stem
    assert workflow["permissions"] == {"contents": "read"}
    assert "group" in workflow["concurrency"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 360
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]), step["uses"]
                continue
            command = re.sub(r"\$\{\{.*?\}\}", "X", step["run"]).split()
            assert command[0] == "make", step["run"]
            targets = [word for word in command[1:] if "=" not in word]
            assert targets and TARGETS.issuperset(targets), f"{path.name}: {step['run']}"


def test_workflows_take_every_python_and_both_transformers():
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]
    for name, target in (("newest-transformers", "test"), ("oldest-transformers", "test-oldest")):
        assert jobs[name]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
        assert jobs[name]["steps"][-1]["run"].split()[-1] == target


def test_the_bug_form_asks_for_what_a_report_needs():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    assert form["name"] and form["description"]
    fields = {field["id"]: field for field in form["body"] if field["type"] != "markdown"}
    assert all(field["attributes"]["label"] for field in fields.values())
    needed = {name for name, field in fields.items() if field.get("validations", {}).get("required")}
    assert needed == {"doctor", "recipe", "command", "message"}
    assert "distill doctor --json -" in fields["doctor"]["attributes"]["description"]


def test_the_index_of_the_log_leads_to_every_entry():
    text = (ROOT / "LOG.md").read_text()
    titles = re.findall(r"^## (\d{4}-.+)$", text, re.MULTILINE)
    assert [title[:10] for title in titles] == sorted((title[:10] for title in titles), reverse=True)
    anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    index = text[: text.index(f"## {titles[0]}")]
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(r"\]\(#([^)]+)\)", index)) == set(anchors)
    assert not [anchor for anchor in anchors if "--" in anchor], "sites and GitHub spell such anchors in two ways"
