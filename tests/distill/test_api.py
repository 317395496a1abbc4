"""The Python API: every verb is a function with its signature and its command's options, before and after a call."""

import inspect
import io

import pytest
import typer
import yaml
from typer.testing import CliRunner

import distill
from distill.cli import app
from distill.errors import UserError

VERBS = (
    "plan",
    "prepare",
    "questions",
    "answers",
    "run",
    "cache",
    "select",
    "evaluate",
    "report",
    "export",
    "generate",
    "doctor",
    "bench",
)
ONLY_PRINTED = {"json"}  # where a result is written is the command line's business


def assert_functions():
    for name in (*VERBS, "recipes", "recipe_text", "copy_recipe", "recipe_schema"):
        verb = getattr(distill, name)
        assert inspect.isfunction(verb), f"distill.{name} is a {type(verb).__name__}"
        assert verb.__doc__ and name in dir(distill) and name in distill.__all__
        kinds = {parameter.kind for parameter in inspect.signature(verb).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, f"distill.{name} swallows what it does not know"


def test_every_verb_stays_a_function(tiny_recipe, tmp_path, monkeypatch):
    """Importing a module of a verb's name would put the module in the function's place."""
    monkeypatch.chdir(tmp_path)
    tiny_recipe["stages"] = [tiny_recipe["stages"][0], {"align": {"tokens": 128, "lr": 1e-3}}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe))
    assert_functions()
    assert distill.plan("tiny.yaml", overrides=["seed=3"]).tokens["align"] == 128
    folder = distill.run("tiny.yaml", overrides=["seed=3"])
    assert folder.read("run.json")["finished"] and not distill.run(folder.recipe()).path.samefile(tmp_path)
    small = ["length=64", "trials=1", "tokens=64", "families=[passkey]"]
    options = {"by": "kl", "keep": 2, "overrides": [f"pattern.{one}" for one in small]}
    assert len(distill.select("tiny.yaml", **options)["layers"]) == 2
    monkeypatch.setattr("distill.evaluation.judging.EVALUATIONS", {"fidelity": ""})
    assert distill.evaluate(folder)["target"] == str(folder.path)  # what `run` returns goes into the other verbs
    assert distill.report(folder).exists()
    assert (distill.export(folder, out="out") / "config.json").exists()
    said = io.StringIO()
    assert distill.generate(folder, "The river", tokens=3, stream=said) in said.getvalue()
    assert distill.doctor()["distill"] == distill.__version__
    assert distill.bench("steps", recipe="tiny.yaml", overrides=["data.batch=2"])["rows"][0]["stage"] == "align"
    assert "quickstart" in {row["recipe"] for row in distill.recipes()}
    assert distill.copy_recipe("quickstart", tmp_path).read_text() == distill.recipe_text("quickstart")
    assert distill.recipe_schema()["properties"]["teacher"]
    assert_functions()


def commands() -> list[tuple[str, object, object]]:
    """Each verb of the command line: its name, its function, and the function of the API."""
    group = typer.main.get_group(app)
    found = []
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            below = {"recipes": {"ls": "recipes", "show": "recipe_text", "cp": "copy_recipe"}}.get(name, {})
            found += [(f"{name} {n}", c, getattr(distill, below.get(n, name))) for n, c in command.commands.items()]
        else:
            found.append((name, command, getattr(distill, {"eval": "evaluate", "schema": "recipe_schema"}.get(name, name))))
    return found


@pytest.mark.parametrize(("name", "command", "function"), commands(), ids=[entry[0] for entry in commands()])
def test_what_a_command_can_the_api_can(name, command, function):
    wanted = {parameter.name for parameter in command.params} - ONLY_PRINTED
    assert wanted <= set(inspect.signature(function).parameters), name


def test_an_option_of_another_benchmark_is_refused():
    with pytest.raises(UserError, match=r"bench steps has no option .configs.; it takes recipe, .*references"):
        distill.bench("steps", configs=True)
    with pytest.raises(UserError, match="bench ops has no option 'recipe'"):
        distill.bench("ops", recipe="quickstart")
    with pytest.raises(UserError, match="there is no benchmark 'opps'; did you mean 'ops'"):
        distill.bench("opps")
    for words in ("steps --configs", "ops --recipe quickstart", "layouts --no-peers", "opps"):
        assert CliRunner().invoke(app, ["bench", *words.split()]).exit_code == 2, words
