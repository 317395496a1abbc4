"""The JSON schema of recipes agrees with the loader, every key is described, and generated pages are current."""

import json
import logging
from copy import deepcopy
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from distill.benchmarks.layouts import LAYOUTS
from distill.build import layout_of
from distill.cli import app
from distill.errors import UserError
from distill.recipe_file import load
from distill.reference import blocks, pages
from distill.reference.json_schema import recipe_schema
from distill.shipped import FOR_EDITORS, SCHEMA, copy_shipped, list_recipes, shipped_folder
from distill.yaml_file import override, read
from students.mixers import MIXERS, defaults_of, mixer_class
from students.mixers.mixer import Shape
from students.mixers.windowed import Windowed

ROOT = Path(__file__).parents[2]
LAYOUT_PAGE = ROOT / "docs" / "students.md"
RECIPES = sorted(shipped_folder().glob("*.yaml"))
HEADS = "mixers={H: {mixer: split_heads, keep: {3: [0, 5], default: []}, ssm: {mixer: mamba2, d_conv: 3}}}"
SOURCE = "[{path: 'books/*.txt', documents: lines}]"


@pytest.fixture(scope="module")
def schema():
    made = recipe_schema()
    jsonschema.Draft7Validator.check_schema(made)
    return jsonschema.Draft7Validator(made)


def changed(overrides):
    """The quickstart's entries as a file would have them."""
    entries = read(shipped_folder() / "quickstart.yaml")
    for text in overrides:
        override(entries, text)
    return entries


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_schema_accepts_a_shipped_recipe(schema, path):
    schema.validate(read(path))
    assert path.read_text().splitlines()[0] == f"{FOR_EDITORS} $schema={SCHEMA}"


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.micro_batch=auto", "stages.align.lr=1e-3", "stages.align.tokens=1_000", "stages.imitate.tokens=1.5 M"],
        ["pattern={keep: 0.25, by: greedy, beam: 3, look_ahead: null}", "evaluation.final_tokens=null", "name=mine"],
        ["pattern={keep: 8, by: gates, families: [passkey], training_tokens: 1M}"],
        ["mixers.M.window.gate=select", "mixers.M.window.own=false", "mixers.M.norm=true", "mixers.M.d_state=null"],
        [HEADS, "pattern=H", "meta_tokens=4", "selected={by: recall, families: [passkey]}"],
        ["stages.imitate.train=lora", "stages.imitate.lora={rank: 8}", f"stages.imitate.data={SOURCE}"],
        [
            "stages.imitate.activation_checkpointing=selective",
            "stages.imitate.betas=[0.9, 0.98]",
            "stages.imitate.clip=null",
        ],
        ["stages.0={initialise: null}", "trackers=[tensorboard]", "export=[portable]", "data.train.0.weight=2"],
        ["stages.1={replace: {layers: [0, 4]}}"],
        ["stages.1={replace: {pattern: {keep: 2, by: even}, mixer: M}}"],
        ["stages.1={replace: {pattern: {keep: 0.1, by: recall, trials: 2}}}"],
        ["stages.3={prefer: {tokens: 4k, lr: 1e-6, data: [{path: pairs.jsonl}]}}"],
    ],
    ids=" ".join,
)
def test_schema_and_loader_accept(schema, overrides):
    entries = changed(overrides)
    schema.validate(entries)
    load(deepcopy(entries) | {"name": "tried"})


@pytest.mark.parametrize(
    "wrong",
    [
        "techer=gpt2",
        "teacher_4bit=true",
        "data.seqlen=3",
        "data.train.0.columns=text",
        "data.train.0.hub=some/text",
        "data.train=[]",
        "data.batch=0",
        "data.batch=true",
        "data.longest_document=3000000000",
        "stages.align.lrr=1",
        "stages.align.lr.all=1e-3",
        "stages.align.warmup=2",
        "stages.align.tokens=12q",
        "stages.align.layers=some",
        "stages.imitate.lora.ranks=3",
        "stages.imitate.betas=[0.9]",
        "stages.1={oriente: {tokens: 4k}}",
        "stages.1={orient: {lr: 1e-3}}",
        "stages.1={replace: {pattern: {keep: 2, by: retrieval-heads}}}",
        "stages.3={prefer: {tokens: 4k, lr: 1e-6}}",
        "mixers.M.mixer=mamba7",
        "mixers.M.d_stat=16",
        "mixers.M.window.length=64",
        "mixers.m={mixer: mamba2}",
        "mixers={}",
        "pattern={keep: 8, by: recal}",
        "pattern={keep: 8, by: recall, beam: 2}",
        "pattern={by: recall}",
        "pattern={keep: 8, by: recall, families: [passkeys]}",
        "evaluation.token=3",
        "evaluation.passkey=[8]",
        "checkpoints.minutes=0",
        "export=[nativ]",
        "trackers=[wandbb]",
        "precision=float16",
        "seed=-1",
    ],
)
def test_schema_and_loader_refuse(schema, wrong):
    entries = changed([wrong])
    assert not schema.is_valid(entries)
    with pytest.raises((UserError, ValueError)):  # ValueError: of a mixer, which a plan makes
        recipe = load(entries | {"name": "tried"})
        layout_of(recipe.pattern, recipe.mixers, 30, "tried").make(1, Shape(64, 4, 2, 16))


@pytest.mark.parametrize("key", ["teacher", "data", "stages", "pattern", "mixers"])
def test_the_schema_asks_for_what_a_recipe_needs(schema, key):
    entries = changed([])
    del entries[key]
    assert not schema.is_valid(entries)
    from_a_student = {"student": "runs/first-1a2b3c4d"} | {name: entries[name] for name in entries if name != "mixers"}
    assert schema.is_valid(from_a_student) == (key in ("pattern", "mixers"))


def without_meaning(node, place=""):
    """Keys of a JSON schema that say nothing of themselves, by their places."""
    found = []
    if isinstance(node, dict):
        for name, part in node.get("properties", {}).items() if isinstance(node.get("properties"), dict) else ():
            told = "description" in part or part.get("$ref") or name in ("by", "keep") or place.endswith("/items")
            found += [] if told and part.get("description", " ") else [f"{place}.{name}"]
        found += [line for name, part in node.items() for line in without_meaning(part, f"{place}/{name}")]
    return found


def test_every_key_says_what_it_means():
    made = recipe_schema()
    assert without_meaning(made) == []
    for name in MIXERS:
        assert set(mixer_class(name).meanings) == set(defaults_of(name)), name
        assert set(mixer_class(name).choices) <= set(defaults_of(name)), name
    assert set(Windowed.meanings) == set(Windowed.window_options)
    assert set(Windowed.window_defaults) == set(Windowed.window_options) - {"size"}


def test_what_is_generated_is_current(monkeypatch):
    """But for the sizes of layouts, which the next test has."""
    part = LAYOUT_PAGE.read_text().split("<!-- generated: layouts -->\n\n")[1].split("\n\n<!-- end -->")[0]
    assert [row.split(" | ")[0].strip("| ") for row in part.splitlines()[2:]] == list(LAYOUTS), f"run `{pages.COMMAND}`"
    monkeypatch.setitem(blocks.BLOCKS, "layouts", lambda: part)
    texts = pages.written(ROOT)
    assert texts.keys() >= {shipped_folder() / SCHEMA, ROOT / "docs" / "recipe-reference.md", ROOT / "recipes" / "README.md"}
    assert pages.stale(texts) == [], f"run `{pages.COMMAND}`"


@pytest.mark.matrix
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_sizes_of_a_layout_are_current(name):
    row = "| " + " | ".join(blocks.layout_row(name)) + " |"
    assert row in LAYOUT_PAGE.read_text(), f"run `{pages.COMMAND}`"


def test_a_marker_that_names_nothing_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- generated: mixer -->\n<!-- end -->\n")
    with pytest.raises(UserError, match=r"page.md: there is no generated part 'mixer'; did you mean 'mixers'"):
        pages.written(tmp_path)
    page.write_text("<!-- generated: mixers -->\n")
    with pytest.raises(UserError, match="has no line <!-- end --> after it"):
        pages.written(tmp_path)
    page.write_text("<!-- generated: mixers -->\n<!-- end -->\n<!-- generated: targets -->\na former part\n<!-- end -->\n")
    written = pages.written(tmp_path)[page]
    assert "a former part" not in written and "](docs/recipe-reference.md#mixer-mamba2)" in written
    page.write_text(written)
    assert pages.stale(pages.written(tmp_path)) == []


def test_links_of_the_page_lead_to_its_sections():
    text = (ROOT / "docs" / "recipe-reference.md").read_text()
    headings = {line.lstrip("# ").lower().replace("`", "").replace("'", "") for line in text.splitlines() if line[:1] == "#"}
    anchors = {heading.replace(" ", "-") for heading in headings}
    linked = {part.split(")")[0] for part in text.split("](#")[1:]}
    assert linked and linked <= anchors


def test_schema_is_printed_and_copied(tmp_path, caplog):
    printed = CliRunner().invoke(app, ["schema"])
    assert printed.exit_code == 0 and json.loads(printed.stdout) == json.loads((shipped_folder() / SCHEMA).read_text())
    with caplog.at_level(logging.WARNING):
        copy_shipped("quickstart", tmp_path)
        copy_shipped("quickstart", tmp_path / "mine.yaml")
    assert (tmp_path / SCHEMA).read_bytes() == (shipped_folder() / SCHEMA).read_bytes() and not caplog.records
    (tmp_path / SCHEMA).write_text("somebody's")
    with caplog.at_level(logging.WARNING):
        copy_shipped("quickstart", tmp_path / "again.yaml")
    assert (tmp_path / SCHEMA).read_text() == "somebody's" and "differs from this version's schema" in caplog.text
    assert load(tmp_path / "mine.yaml", ["name=quickstart"]).fingerprint == load("quickstart").fingerprint
    assert not [row for row in list_recipes() if "language-server" in row["what"] or not row["what"]]
