"""Recipes: one YAML file each, read into a strict schema.

An unknown key, a wrong type or an impossible combination is an error that names the key, the file and the nearest valid
key. Overrides (`key.sub=value`) are applied before anything is checked; lists are indexed (`stages.1.lr=1e-3`) or named
(`stages.align.lr=1e-3`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from distill.errors import UserError, nearest
from distill.yaml_file import override, read

MULTIPLES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")  # accelerate's
ALTERNATIVE = re.compile(r"\[|^(constrained-)?(float|int|str)$")  # a part that pydantic adds to a key, naming no key
WORDS = {
    "Input should": "it should",
    "dictionary": "mapping",
    "a valid boolean": "true or false",
    " or instance of Text": "",
}
RESERVED = {"imitate.teacher", "imitate.offline_logits", "teacher_4bit"}  # names kept for features not built yet


def _count(value: Any) -> Any:
    """24000, "24k", "80M" or "2.8B" as a whole number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMB]?)", str(value).replace("_", ""))
    if isinstance(value, bool) or not match:
        raise ValueError(f"{value!r} is no count; write it like 24000, 24k, 80M or 2.8B")
    return round(float(match[1]) * MULTIPLES[match[2]])


Count = Annotated[int, BeforeValidator(_count), Field(ge=1)]


def _name(value: str) -> str:
    if not re.fullmatch(r"[^/\\\s.][^/\\\n]*", value):
        raise ValueError("it should be a name that a folder may have, without / and not beginning with a dot")
    return value


def _letter(value: str) -> str:
    if not re.fullmatch("[A-Z]", value):
        raise ValueError("a mixer is given for one capital letter of pattern")
    return value


Name, Letter = Annotated[str, AfterValidator(_name)], Annotated[str, AfterValidator(_letter)]


class Schema(BaseModel):
    """Base of everything in a recipe: no unknown keys, no guessed types, nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Text(Schema):
    """A source of text. `path`: local files (a glob; `shipped:NAME` for the project's own) or `hub`: a dataset id."""

    path: str | None = None
    hub: str | None = None
    name: str | None = None
    split: str = "train"
    column: str = "text"
    label: str | None = None
    weight: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_place(self):
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source of text needs either path or hub")
        return self


class Data(Schema):
    """What to read, and how it is cut: windows of `seq_len` tokens, `batch` windows an optimizer step."""

    train: Annotated[list[Text], Field(min_length=1)]
    heldout: Annotated[list[Text], Field(min_length=1)]
    seq_len: Annotated[int, Field(ge=8)]
    batch: Annotated[int, Field(ge=1)]
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    separator: str | None = None
    long_documents: Literal["shuffled", "in_order"] = "shuffled"
    limit: Count | None = None


class Evaluation(Schema):
    """Held-out tokens for the table after each stage and for the final one, windows of `seq_len`, and passkey lengths."""

    tokens: Count = 16_384
    final_tokens: Count | None = None
    seq_len: Annotated[int, Field(ge=8)] | None = None
    probe_tokens: Count = 1024
    passkey: list[Annotated[int, Field(ge=64)]] = [256, 512]
    passkey_trials: Annotated[int, Field(ge=1)] = 10


class Checkpoints(Schema):
    """How often a stage saves itself: after so many minutes, or steps."""

    minutes: Annotated[float, Field(gt=0)] = 5.0
    steps: Annotated[int, Field(ge=1)] | None = None
    keep: Annotated[int, Field(ge=1)] = 2


class Recipe(Schema):
    """A whole recipe. `pattern`, one entry a letter, and `meta_tokens` (learned ones in front of every document) make the
    student's layout; a mapping as `pattern` has the run select it (distill/select). `stages` run in order."""

    name: Name
    teacher: Annotated[str, Field(min_length=1)]
    teacher_trust_remote_code: bool = False
    teacher_pickle: bool = False
    pattern: str | dict[str, Any]
    mixers: dict[Letter, dict[str, Any]]
    meta_tokens: Annotated[int, Field(ge=0)] = 0
    data: Data
    stages: list[dict[str, dict[str, Any]]]
    evaluation: Evaluation = Evaluation()
    export: list[str] = []
    twin: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoints: Checkpoints = Checkpoints()
    trackers: list[str] = []
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def stage_options(self) -> list[tuple[str, Any]]:
        """The stages in order: name and validated options."""
        from distill.stages import options_class

        return [(name, options_class(name)(**options)) for stage in self.stages for name, options in stage.items()]

    @property
    def fingerprint(self) -> str:
        """Eight digits that change with anything in the recipe."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def shipped_folder() -> Path:
    """Where the recipes are that come with the package: beside it, in a clone and in an installed wheel alike."""
    return Path(__file__).parent.parent / "recipes"


def find(reference: str | Path) -> Path:
    """The file of a recipe given by path or by the name of a shipped one.

    Raises:
        UserError: there is none.
    """
    path = Path(reference)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in shipped_folder().glob("*.yaml")}
    name = path.name.removesuffix(".yaml")
    if name in shipped and path.parent in (Path("."), Path("recipes")):
        return shipped[name]
    raise UserError(f"there is no recipe {str(reference)!r}: no such file, and of the shipped ones {nearest(name, shipped)}")


def load(reference: str | Path, overrides: Sequence[str] = (), change: Callable[[dict, str], None] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        change: changes the entries as they were read, before the overrides; it is told the file too.

    Raises:
        UserError: no such recipe, YAML that does not parse, or anything the schema refuses.
    """
    path = find(reference)
    entries = read(path)
    entries.setdefault("name", path.stem)
    if isinstance(entries.get("stages"), list):  # `- align:` alone asks for the defaults
        entries["stages"] = [
            {name: options or {} for name, options in stage.items()} if isinstance(stage, dict) else stage
            for stage in entries["stages"]
        ]
    if change is not None:
        change(entries, str(path))
    for text in overrides:
        override(entries, text)
    return check(entries, str(path))


def check(entries: dict, where: str) -> Recipe:
    """Validate a recipe's entries, stages and layout letters included.

    Raises:
        UserError: with every complaint, each naming its key.
    """
    try:
        recipe = Recipe(**entries)
        for stage in recipe.stages:
            if len(stage) != 1:
                raise UserError(f"{where}: each entry of stages is one stage, not {', '.join(stage) or 'nothing'}")
    except ValidationError as error:
        raise UserError(explain(error, where, Recipe)) from error
    _check_stages(recipe, where)
    if isinstance(recipe.pattern, dict):
        from distill.select.options import options_of

        options_of(recipe, where)
    return recipe


def _check_stages(recipe: Recipe, where: str) -> None:
    from distill.export import EXPORTERS
    from distill.stages import STAGES, options_class

    for target in recipe.export:
        if target not in EXPORTERS:
            raise UserError(f"{where}: export: there is no target {target!r}; {nearest(target, EXPORTERS)}")
    for tracker in recipe.trackers:
        if tracker not in TRACKERS:
            raise UserError(f"{where}: trackers: there is no tracker {tracker!r}; {nearest(tracker, TRACKERS)}")
    if not recipe.mixers:
        raise UserError(f"{where}: mixers is empty, so no layer would be converted; give a mixer for a letter of pattern")
    for index, stage in enumerate(recipe.stages):
        name, options = next(iter(stage.items()))
        if name not in STAGES:
            raise UserError(f"{where}: stages.{index}: there is no stage {name!r}; {nearest(name, STAGES)}")
        if name == "initialise" and index:
            raise UserError(f"{where}: stages.{index}: initialise can only come first; it would undo the stages before")
        for key in options:
            if f"{name}.{key}" in RESERVED:
                raise UserError(f"{where}: stages.{name}.{key} is not built yet")
        try:
            options_class(name)(**options)
        except ValidationError as error:
            raise UserError(explain(error, f"{where}: stages.{name}", options_class(name))) from error
    if recipe.meta_tokens and not any("imitate" in stage for stage in recipe.stages):
        raise UserError(
            f"{where}: meta_tokens is {recipe.meta_tokens}, but only imitate trains them; add that stage, or leave them out"
        )
    if not recipe.stages or next(iter(recipe.stages[0])) != "initialise":
        raise UserError(f"{where}: stages must begin with initialise, which makes the mixers")


def explain(error: ValidationError, where: str, schema: type[BaseModel]) -> str:
    """What was refused, one line a key; of the alternatives that a key's value may be, those that it came nearest to."""
    found: dict[str, list[str]] = {}
    for problem in error.errors():
        place = [str(part) for part in problem["loc"] if not ALTERNATIVE.search(str(part))]
        key, reason = ".".join(place), _reason(problem, place, schema)
        found.setdefault(key, [f"{key}{reason}".lstrip(": ")]).append(reason.partition(": ")[2])
    innermost = [key for key in found if not any(other.startswith(f"{key}.") for other in found if key)]
    return "\n".join(f"{where}: {', or '.join([found[key][0], *found[key][2:]])}" for key in innermost)


def _reason(problem: dict, place: list[str], schema: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        reserved = ".".join(place) in RESERVED
        return " is not built yet" if reserved else f" is not a key here; {nearest(place[-1], _keys_at(schema, place[:-1]))}"
    if problem["type"] == "missing":
        return " is missing"
    said = problem["msg"].removeprefix("Value error, ")
    for pydantic, ours in WORDS.items():
        said = said.replace(pydantic, ours)
    whole_entry = isinstance(problem["input"], dict) and problem["type"] == "value_error"  # it would bury the message
    return f": {said}" if whole_entry else f" is {problem['input']!r}: {said}"


def _keys_at(schema: type[BaseModel], place: list[str]) -> list[str]:
    """The keys that the schema has at a place, list indexes skipped."""
    for part in place:
        if part.isdigit():
            continue
        annotation = schema.model_fields[part].annotation if part in schema.model_fields else None
        inner = [annotation, *getattr(annotation, "__args__", ())]
        schema = next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), schema)
    return list(schema.model_fields)
