"""Numbers: every one of a recipe and of the command line has a range, which the message names with value and place."""

import inspect
import math
import sys
import typing
from typing import Annotated

import pytest
import typer
from pydantic.fields import FieldInfo

import distill
from distill import cli
from distill.errors import UserError
from distill.ranges import KEPT, Range, whole
from distill.recipe import Recipe
from distill.recipe_file import check, load
from distill.schema import Schema
from distill.selection import SCORERS, scorer_class
from distill.stages import STAGES, stage_class, stages_of
from students.mixers import MIXERS, mixer_class, range_of
from tests.conftest import tiny_entries

NUMBERS = (int, float)


def bare_numbers(annotation, bounds=()):
    """The numeric types in an annotation that no range stands beside."""
    if typing.get_origin(annotation) is Annotated:
        kind, *more = typing.get_args(annotation)
        return bare_numbers(kind, (*bounds, *more))
    if annotation in NUMBERS:
        return [] if any(isinstance(bound, Range) for bound in bounds) else [annotation]
    if isinstance(annotation, type) and issubclass(annotation, Schema):
        return [f"{annotation.__name__}.{name}" for name in bare_fields(annotation)]
    return [found for part in typing.get_args(annotation) for found in bare_numbers(part)]


def bare_fields(schema):
    """The fields of a schema, those of schemas in it too, that take a number without a range."""
    return [name for name, field in schema.model_fields.items() if bare_numbers(field.annotation, tuple(field.metadata))]


def schemas():
    """Everything that a recipe's keys are checked by."""
    yield Recipe
    yield from (stage_class(name).Options for name in STAGES)
    yield from (scorer_class(name).Options for name in SCORERS)


def commands(app):
    """Every function behind the command line, with the name that is typed."""
    for command in app.registered_commands:
        yield command.name or command.callback.__name__, command.callback
    for group in app.registered_groups:
        yield from commands(group.typer_instance)


def test_every_number_of_a_recipe_has_a_range():
    assert {schema.__qualname__: bare_fields(schema) for schema in schemas()} == {s.__qualname__: [] for s in schemas()}


def test_every_numeric_option_of_the_command_line_has_a_range():
    found = {}
    for verb, function in commands(cli.app):
        for name, hint in typing.get_type_hints(function, include_extras=True).items():
            kind = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
            if {kind, *typing.get_args(kind)} & set(NUMBERS):
                info = next(part for part in hint.__metadata__ if isinstance(part, typer.models.ParameterInfo))
                found[verb, name] = getattr(info.callback, "range", None)
    assert len(found) >= 4 and all(isinstance(range_, Range) for range_ in found.values()), found


def test_a_bare_number_is_seen():
    class Odd(Schema):
        one: int = 1
        two: Annotated[float, whole(1, 2)] = 1.0
        three: list[Annotated[int, whole(0, 1)]] | dict[str, float] = []

    assert bare_fields(Odd) == ["one", "three"]
    assert isinstance(Odd.model_fields["one"], FieldInfo)


@pytest.mark.parametrize("name", MIXERS)
def test_every_number_of_a_mixer_has_a_range(name):
    """Whatever its options are: those counted in tokens may be longer than those that are widths."""
    kinds = inspect.signature(mixer_class(name)).parameters.values()
    for each in kinds:
        if each.kind is each.KEYWORD_ONLY and int in (each.annotation, *typing.get_args(each.annotation)):
            low, high = range_of(each.name, mixer_class(name))
            assert 0 <= low <= 1 and 1 < high <= 2**20


# a key of tiny.yaml, values that it refuses, and what they should be
KEYS = {
    "data.batch": ([0, -1, 10**12, 2.5, math.nan, True], "batch is"),
    "data.micro_batch": ([0, 10**9], "whole number from 1 to 65,536"),
    "data.seq_len": ([7, 10**8, -(2**63)], "whole number from 8 to 1,048,576"),
    "data.limit": ([0, 10**14, 2**64, -5], "whole number from 1 to 10,000,000,000,000"),
    "data.train.0.weight": ([0.0, -0.0, 1e-300, 1e300, math.inf, math.nan], "number from 1e-06 to 1,000,000"),
    "evaluation.tokens": ([0, 2**64], "whole number from 1 to 10,000,000,000,000"),
    "evaluation.probe_tokens": ([0, 10**12], "whole number from 1 to 1,048,576"),
    "evaluation.documents": ([0, 10**12], "whole number from 1 to 1,000,000"),
    "evaluation.passkey.0": ([63, 10**8, -1], "whole number from 64 to 1,048,576"),
    "evaluation.passkey_trials": ([0, 10**9], "whole number from 1 to 1,000,000"),
    "meta_tokens": ([-1, 10**6, 2**64], "whole number from 0 to 65,536"),
    "seed": ([-1, 2**32, 2**64, 10**400], "whole number from 0 to 4,294,967,295"),
    "checkpoints.minutes": ([0.0, -0.0, math.nan, math.inf, 1e9], "number above 0 up to 100,000"),
    "checkpoints.steps": ([0, 2**64], "whole number from 1 to 1,000,000,000"),
    "checkpoints.keep": ([0, 2**64], "whole number from 1 to 1,000,000"),
    "stages.1.orient.lr": ([0.0, -0.0, -1.0, 1e9, math.nan, math.inf, -math.inf, 10**400], "number above 0 up to 100"),
    "stages.2.align.lr.new": ([0.0, math.nan, 1e9], "number above 0 up to 100"),
    "stages.1.orient.betas.1": ([1.0, -0.1, math.nan, math.inf], "number from 0 and below 1"),
    "stages.1.orient.warmup": ([-0.1, 1.1, math.nan], "number from 0 to 1"),
    "stages.1.orient.weight_decay": ([-1.0, 1e9, math.inf], "number from 0 to 100"),
    "stages.1.orient.clip": ([0.0, -1.0, math.nan, math.inf], "number above 0 up to 1,000,000,000"),
    "stages.1.orient.batch": ([0, 10**12], "whole number from 1 to 65,536"),
    "stages.1.orient.calibration_tokens": ([0, 2**64], "whole number from 1 to 10,000,000,000,000"),
    "stages.3.imitate.temperature": ([0.0, -0.0, 1e-9, 1e9, math.nan], "number from 0.001 to 1,000"),
    "stages.3.imitate.ce": ([-0.5, 1.5, math.nan], "number from 0 to 1"),
    "stages.3.imitate.hidden": ([-1.0, math.inf, 1e30], "number from 0 to 1,000,000"),
    "stages.3.imitate.layer_decay": ([0.0, 1.5, -1.0, math.nan], "number above 0 up to 1"),
    "stages.3.imitate.scale": ([0.0, math.nan, 1e30], "number above 0 up to 1,000,000,000"),
    "stages.3.imitate.lora.rank": ([0, 10**6], "whole number from 1 to 65,536"),
    "stages.3.imitate.lora.alpha": ([0.0, math.nan, 1e9], "number above 0 up to 1,000,000"),
}
PATTERN = {"keep": 1, "by": "kl"}
SELECTIONS = {
    "keep": ([0, -1, 10**9, 0.0, 1.0, 1.5, math.nan, math.inf], "number above 0 and below 1"),
    "window": ([0, 10**8], "whole number from 1 to 1,048,576"),
    "sinks": ([-1, 10**8], "whole number from 0 to 1,048,576"),
    "length": ([63, 10**8], "whole number from 64 to 1,048,576"),
    "trials": ([0, 10**9], "whole number from 1 to 1,000,000"),
    "protect": ([[-1], [10**12]], "whole number from 0 to 1,000,000"),
    "tokens": ([0, 2**64], "whole number from 1 to"),
}


def put(entries, key, value):
    *path, last = key.split(".")
    for part in path:
        part = int(part) if isinstance(entries, list) else part
        if isinstance(entries, dict):
            entries.setdefault(part, {})
        entries = entries[part]
    if isinstance(entries, tuple | list):
        entries[int(last)] = value
    else:
        entries[last] = value


@pytest.mark.parametrize("key", KEYS)
def test_keys(tiny_teacher, text_files, key):
    values, should = KEYS[key]
    for value in values:
        entries = tiny_entries(tiny_teacher, text_files)
        entries["stages"][1]["orient"]["betas"] = [0.9, 0.95]
        entries["stages"][3]["imitate"] |= {"train": "lora", "lora": {"rank": 2}}
        put(entries, key, value)
        with pytest.raises(UserError) as refused:
            check(entries, "tiny.yaml")
        said = str(refused.value)
        last = key.rpartition(".")[2] if not key.endswith(("0", "1")) else key.split(".")[-2]
        assert said.startswith("tiny.yaml: ") and last in said and should in said and len(said) < 300, said


@pytest.mark.parametrize("key", SELECTIONS)
def test_keys_of_a_selection(tiny_teacher, text_files, key):
    values, should = SELECTIONS[key]
    for value in values:
        entries = tiny_entries(tiny_teacher, text_files) | {"pattern": PATTERN | {key: value}}
        with pytest.raises(UserError) as refused:
            check(entries, "tiny.yaml")
        assert f"tiny.yaml: pattern: {key}" in str(refused.value) and should in str(refused.value)


def test_what_is_in_use_is_in_the_ranges(tiny_teacher, text_files):
    """The ends themselves, and a 0 that was written as -0."""
    entries = tiny_entries(tiny_teacher, text_files)
    entries["data"] |= {"seq_len": 2**10, "batch": 65_536, "limit": "10000B"}
    entries["stages"][1]["orient"] |= {"lr": 100, "final": -0.0, "clip": 1e-12, "betas": [0.0, 0.999999]}
    recipe = check(entries | {"seed": 2**32 - 1}, "tiny.yaml")
    assert recipe.data.limit == 10**13 and recipe.data.batch == 65_536
    entries["data"] |= {"seq_len": 2**20, "batch": 64}
    assert check(entries, "tiny.yaml").data.seq_len == 2**20
    entries["stages"][2]["align"]["batch"] = 65
    with pytest.raises(UserError, match=r"stages\.2: an optimizer step of align would read 68,157,440 tokens"):
        check(entries, "tiny.yaml")
    plain = tiny_entries(tiny_teacher, text_files)
    plain["stages"][1]["orient"]["final"] = 0.0
    signed = tiny_entries(tiny_teacher, text_files)
    signed["stages"][1]["orient"]["final"] = -0.0
    options = [stages_of(check(given, "tiny.yaml"))[1].options for given in (plain, signed)]
    assert math.copysign(1, options[1].final) == 1 and options[0] == options[1]


@pytest.mark.parametrize(
    ("given", "tokens"), [("24k", 24_000), ("2.8B", 2_800_000_000), ("1_000", 1000), (7, 7), ("0.5k", 500), (1e6, 10**6)]
)
def test_counts(tiny_recipe, given, tokens):
    tiny_recipe["data"]["limit"] = given
    assert check(tiny_recipe, "tiny.yaml").data.limit == tokens


@pytest.mark.parametrize("given", ["9" * 400, "0.4", 2.5, "1.2345k", "-3k", "1e3000", "٣", "k", math.nan, True, "1 000"])
def test_what_is_no_count(tiny_recipe, given):
    tiny_recipe["data"]["limit"] = given
    with pytest.raises(UserError, match=r"data\.limit is .*: .* is not a count; write it like 24000, 24k, 80M or 2\.8B"):
        check(tiny_recipe, "tiny.yaml")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "tiny.yaml", "--stop-after", "nan"], ["--stop-after is nan", "a number above 0 up to 1,000,000"]),
        (["run", "tiny.yaml", "--stop-after", "inf"], ["--stop-after is inf", "a number above 0 up to 1,000,000"]),
        (["run", "tiny.yaml", "--stop-after", "-0.0"], ["--stop-after is -0.0", "a number above 0"]),
        (["select", "tiny.yaml", "--keep", "nan"], ["--keep is nan", "a number above 0 up to 1,000,000"]),
        (["select", "tiny.yaml", "--keep", "1e300"], ["--keep is 1e+300", "a number above 0"]),
        (["select", "tiny.yaml", "--keep", "-2"], ["--keep is -2.0", "a number above 0"]),
        (["select", "tiny.yaml", "--keep", "5"], ["pattern.keep is 5, which leaves none of 4 layers to convert"]),
        (["generate", "runs/finished", "x", "--tokens", "0"], ["--tokens is 0", "a whole number from 1 to 1,048,576"]),
        (["generate", "runs/finished", "x", "--tokens", str(10**12)], [f"--tokens is {10**12}", "a whole number from 1"]),
        (
            ["generate", "runs/finished", "x", "--temperature", "nan"],
            ["--temperature is nan", "0 or a number from"],
        ),
        (
            ["generate", "runs/finished", "x", "--temperature", "-1"],
            ["--temperature is -1.0", "0 or a number from"],
        ),
        (
            ["generate", "runs/finished", "x", "--temperature", "inf"],
            ["--temperature is inf", "from 0.001 to 1,000"],
        ),
        (["generate", "runs/finished", "x", "--temperature", "1e-300"], ["--temperature is 1e-300", "0 or a number from"]),
        (["plan", "tiny.yaml", "mixers.M.d_state=1000000"], ["d_state is 1000000", "it should be from 1 to 16,384"]),
        (["run", "tiny.yaml", "mixers.M.window.size=100000000"], ["size is 100000000", "from 1 to 1,048,576"]),
    ],
    ids=lambda value: " ".join(value[2:]) if value[0].islower() else None,
)
def test_options(place, refuse, arguments, parts):
    refuse(place, arguments, parts)


def test_the_python_api_says_the_same(place):
    with pytest.raises(UserError, match="--tokens is 0; it takes a whole number from 1"):
        distill.generate("runs/finished", "x", tokens=0)
    with pytest.raises(UserError, match="--temperature is nan"):
        distill.generate("runs/finished", "x", temperature=math.nan)
    with pytest.raises(UserError, match="--keep is True"):
        distill.select("tiny.yaml", keep=True)
    with pytest.raises(UserError, match="--stop-after is nan"):
        distill.run("tiny.yaml", runs="runs", stop_after=math.nan)


def test_a_range_in_words():
    assert str(whole(1, 65_536)) == "a whole number from 1 to 65,536"
    assert str(Range(0, 1, above=True, below=True)) == "a number above 0 and below 1"
    assert KEPT.check(None, "--keep") is None and KEPT.check(3, "--keep") == 3
    assert math.nan not in Range(-math.inf, math.inf)
    assert math.copysign(1, Range(0, 1).check(-0.0, "x")) == 1


def test_a_number_of_thousands_of_digits(place):
    with pytest.raises(UserError, match="seed is a number of thousands of digits: it should be a whole number from 0"):
        load("tiny.yaml", change=lambda entries, where: entries.update(seed=16**5000))
    assert sys.get_int_max_str_digits() == 4300
