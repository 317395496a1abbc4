"""Reports: every section exists or says why not, nothing is fetched, names are escaped, and numbers are the JSON's."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

import distill
from distill.errors import UserError
from distill.evaluation.suites import EVALUATIONS, evaluation
from distill.reports.layout import kinds_of, strip
from distill.reports.run_page import SECTIONED
from distill.runs.run_dir import RunDir

VOID = {"meta", "link", "img", "line", "rect", "circle", "polyline", "br"}
SECTIONS = {
    "headline",
    "layout",
    "stages",
    "losses",
    "layers",
    "breakdown",
    "matrices",
    "recall",
    "tasks",
    "speed",
    "samples",
    "not-run",
    "facts",
} | {name for name in EVALUATIONS if name not in SECTIONED and "standard" in evaluation(name).suites}


class Page(HTMLParser):
    """A page's sections by anchor (text and tags), its attributes that load something, and whether its tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sections, self.loads, self.tags, self.current = [], {}, [], [], None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.loads += [value for name, value in given.items() if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name in given)
        if tag == "section":
            self.current = given["id"]
            self.sections[self.current] = {"text": "", "tags": []}
        if self.current:
            self.sections[self.current]["tags"].append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.current = None if tag == "section" else self.current

    def handle_data(self, data):
        if self.current:
            self.sections[self.current]["text"] += data + " "

    def missing(self):
        """The sections that say that they were not run."""
        return {name for name, section in self.sections.items() if "not run:" in section["text"] and name != "not-run"}


def check_alone(page, text):
    """Nothing that a browser would fetch, and nothing that runs."""
    assert all(value.startswith(("#", "data:")) for value in page.loads), page.loads
    assert not {"script", "iframe", "object", "embed", "form"} & set(page.tags)
    assert "@import" not in text and "url(" not in text


@pytest.fixture
def copied(judged_run, tmp_path):
    return RunDir(shutil.copytree(judged_run, tmp_path / "copy"))


def written(folder, *others, **options):
    text = distill.report(folder, *others, **options).read_text()
    page = Page(text)
    check_alone(page, text)
    return page, text


def test_a_judged_run_fills_every_section(copied):
    page, text = written(copied.path)
    assert set(page.sections) == SECTIONS and page.missing() == set()
    for name in ("headline", "stages", "losses", "layers", "breakdown", "recall", "speed"):
        assert "svg" in page.sections[name]["tags"], name
    assert page.sections["matrices"]["tags"].count("img") == 2 * 2 * 2  # heads of two layers, attention and mixer
    rows = copied.read("evaluations.json")["final"]["rows"]
    headline = page.sections["headline"]["text"]
    for part in ("teacher", "window-only control (twin)", "untrained windows of 64 + 4", "chance", "mean of 1 tasks"):
        assert part in headline
    for results in rows.values():
        assert f"{results['fidelity']['kl']:.3f}" in headline
    run = copied.read("run.json")
    for fact in (run["teacher"], run["train_text"], run["heldout_text"], "distill run tiny.yaml", "discrete_mamba2"):
        assert fact in page.sections["facts"]["text"]
    left_out = page.sections["not-run"]["text"]
    assert "positions for 512 tokens" in left_out and "winogrande.jsonl" in left_out and "is uniform" in left_out
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text


def test_judging_a_run_writes_its_report_again(judged_run):
    assert "Suite standard" in (judged_run / "report.html").read_text()


def test_a_run_that_has_just_begun(copied):
    for path in copied.path.iterdir():
        if path.name != "recipe.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page, _ = written(copied.path)
    assert page.missing() == SECTIONS - {"not-run", "facts"}
    assert "svg" not in page.tags and "not recorded yet" in page.sections["facts"]["text"]
    assert page.sections["not-run"]["text"].count("continues it") == 3


def test_a_twin_has_a_page_of_its_own(copied):
    page, _ = written(copied.path / "twin")
    assert {"headline", "matrices", "samples"} <= page.missing() and not {"stages", "losses"} & page.missing()
    assert "polyline" in page.sections["losses"]["tags"]


def test_a_run_without_a_suite(copied):
    evaluations = copied.read("evaluations.json")
    del evaluations["suites"]
    copied.write("evaluations.json", evaluations)
    page, _ = written(copied.path)
    assert page.missing() == {"tasks", "speed"}
    assert "--suite standard" in page.sections["not-run"]["text"] and "code" in page.sections["speed"]["tags"]
    assert "passkey" in page.sections["recall"]["text"] and "--suite standard" in page.sections["recall"]["text"]


def test_tasks_without_files_say_so(copied):
    evaluations = copied.read("evaluations.json")
    for results in evaluations["suites"]["standard"]["rows"].values():
        if "tasks" in results:
            results["tasks"] = {"piqa": {"not_run": "no task files: name their folder"}}
    copied.write("evaluations.json", evaluations)
    page, _ = written(copied.path)
    assert page.missing() == {"tasks"} and "no task files" in page.sections["tasks"]["text"]
    assert "mean of" not in page.sections["headline"]["text"]


def test_names_cannot_break_out(copied):
    """Whatever a recipe, a text's source or a model says ends up as text."""
    hostile = "<script>alert(1)</script>'\"><img src=//evil.example/x>"
    recipe = yaml.safe_load((copied.path / "recipe.yaml").read_text())
    recipe["name"] = "<b onclick='x'>&"
    recipe["teacher"] = hostile
    (copied.path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    copied.write("samples.json", {"prompt": hostile, "teacher": hostile, "student": hostile})
    text = (copied.path / "evaluations.json").read_text()
    evaluations = json.loads(text)
    for judged in (evaluations["final"], evaluations["suites"]["standard"]):
        judged["device"] = hostile
        judged["not_run"].append({"rows": ["student"], "evaluation": hostile, "part": hostile, "reason": hostile})
        for results in judged["rows"].values():
            results["fidelity"]["by_source"][0]["name"] = hostile
    copied.write("evaluations.json", evaluations)
    copied.write("run.json", {"teacher": hostile, "versions": {hostile: hostile}})
    lines = (copied.path / "metrics.jsonl").read_text().replace('"orient"', json.dumps(hostile))
    (copied.path / "metrics.jsonl").write_text(lines)
    page, text = written(copied.path)
    assert "<script" not in text and "<b onclick" not in text and page.missing() == set()
    assert page.sections["samples"]["text"].count("alert(1)") == 4
    written(copied.path, copied.path, out=copied.path / "both.html")


def test_runs_are_compared(judged_run, copied):
    metrics = [line | {"loss": 2 * line["loss"]} for line in copied.metrics()]
    (copied.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    evaluations = copied.read("evaluations.json")
    evaluations["final"]["rows"]["student"]["fidelity"] |= {"kl": 9.875, "tokens": 7}
    del evaluations["final"]["rows"]["twin"], evaluations["suites"]
    copied.write("evaluations.json", evaluations)
    copied.update("run.json", heldout_text="0" * 64)
    page, text = written(judged_run, copied.path, out=copied.path / "both.html")
    assert set(page.sections) == {"headline", "layout", "losses", "layers", "recall", "not-run", "facts"}
    first = RunDir(judged_run).read("evaluations.json")["final"]["rows"]["student"]["fidelity"]["kl"]
    headline = page.sections["headline"]["text"]
    assert f"{first:.3f}" in headline and "9.875" in headline and "not run" in headline
    assert judged_run.name in headline and "copy" in headline
    assert page.sections["layout"]["tags"].count("span") == 2 * 4
    assert page.sections["losses"]["tags"].count("polyline") == 2 * 3  # two runs, three stages
    assert "their held-out texts and numbers of held-out tokens differ" in text
    assert re.search(r"copy\s+recall", page.sections["not-run"]["text"])


def test_runs_of_one_name_are_told_apart(judged_run, tmp_path):
    page, _ = written(judged_run, judged_run, out=tmp_path / "both.html")
    assert f"{judged_run.name} (2)" in page.sections["headline"]["text"]


def test_results_of_another_version(copied):
    evaluations = copied.read("evaluations.json")
    del evaluations["final"]["not_run"], evaluations["final"]["suite"]
    copied.write("evaluations.json", evaluations)
    with pytest.raises(UserError, match=r"evaluations\.json: final lacks not_run, suite: another version .* --fresh"):
        distill.report(copied.path)


def test_mistakes(judged_run, tmp_path):
    with pytest.raises(UserError, match=r"is no run folder: it has no recipe\.yaml"):
        distill.report(judged_run, tmp_path)
    with pytest.raises(UserError, match="no run folder is named"):
        distill.report()
    with pytest.raises(UserError, match=r"--out is .*gone.x\.html, which is a folder or in no existing folder"):
        distill.report(judged_run, out=tmp_path / "gone" / "x.html")


# matrices and layouts


def test_matrices_are_shown_on_one_scale(copied):
    _, text = written(copied.path)
    images = re.findall(r"data:image/png;base64,([^']+)'", text)
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    with np.load(copied.path / "matrices.npz") as arrays:
        name = next(name for name in arrays if name.endswith(" mixer")).removesuffix(" mixer")
        attention, mixer = arrays[f"{name} attention"], arrays[f"{name} mixer"]
    error = np.linalg.norm(attention - mixer) / np.linalg.norm(attention)
    assert f"{name}: attention, mixer (relative error {error:.2f})" in text


def test_a_selection_is_shown_with_its_layout(copied):
    numbers = {"recalled": 0.5, "choice": -0.33, "kl": 0.0}
    ranking = [
        {"name": name, "score": score, "numbers": {"recall lost": score / 10}, "kept": score > 1}
        for name, score in (("2", 5.25), ("1", 0.5))
    ]
    chosen = {
        "by": "recall", "options": {"by": "recall"}, "pattern": "AM", "mixers": {"M": {"mixer": "mamba2"}}, "layers": [0],
        "cost": {"seconds": 6.0, "tokens": 10, "predicted_seconds": 5.0}, "heads": None, "note": "a note",
        "models": {"teacher": numbers, "chosen": numbers | {"kl": 0.156}, "even": numbers | {"recalled": 0.0}},
        "ranking": ranking,
    }  # fmt: skip
    copied.write("selection.json", {"chosen": chosen})
    section = written(copied.path)[0].sections["layout"]
    assert "Selected by recall, in 6 s" in section["text"] and "a note" in section["text"]
    assert "0.1560" in section["text"] and "5.25" in section["text"] and section["text"].count("kept") == 1


def test_a_layer_split_by_heads_names_those_that_stay():
    mixers = {"H": {"mixer": "split_heads", "keep": {1: [0, 5], "default": [2]}}}
    for given in (mixers, json.loads(json.dumps(mixers))):  # as a recipe says it, and as a run folder gives it back
        drawn = strip("AHH", given, kinds_of(mixers))
        assert "layer 1: split_heads, attention in heads 0, 5" in drawn
        assert "layer 2: split_heads, attention in heads 2" in drawn
