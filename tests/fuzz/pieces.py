"""What the strategies are put together from: the kinds' table, the commands, and damage that several kinds share."""

import json
from pathlib import Path

import yaml
from hypothesis import strategies as st

from tests.fuzz import damage, gguf_raw
from tests.fuzz.values import ESCAPE, MARK, strings, values

KINDS = {}  # name: a strategy, and how often of all it is drawn
LINKS = ("outside/secret.txt", "outside/model.safetensors", "outside/folder", "outside/report.html", "nowhere", "self")
HEAVY = ("tokens", "trials", "documents", "steps")  # budgets: a large one is honest, and honestly slow

NAMES = [
    ESCAPE,
    MARK,
    "[bold]x[/bold]",
    "[/]",
    "a\nb",
    "..",
    "../x",
    "outside/x",
    "x" * 300,
    "\udcff",
    "-x",
    "",
    " ",
    "*",
    "nul\u202e",
]
FINISHED = [
    ["run", "short.yaml"],
    ["report", "@short"],
    ["report", "@short", "@every", "--out", "compared.html"],
    ["eval", "@short"],
    ["export", "@short", "--out", "written", "--no-verify"],
    ["export", "@short/student", "--out", "out", "--no-verify"],
    ["generate", "@short", "a river", "--tokens", "3"],
]
EVERY = [["run", "every.yaml"], ["report", "@every"], ["select", "every.yaml"], ["eval", "@every", "--tasks", "tasks"]]
STOPPED = [["run", "half.yaml"], ["report", "@half"], ["run", "half.yaml"], ["eval", "@half"], ["run", "half.yaml"]]
STUDENT = [
    ["generate", "out", "a river", "--tokens", "3"],
    ["eval", "out", "--teacher", "./teacher", "--heldout", "text/heldout.jsonl"],
]
TEACHER = [["plan", "short.yaml"], ["plan", "short.yaml", "--check"], ["run", "text.yaml"], ["run", "half.yaml"]]
JSON_FILES = {
    "finished run": ["run.json", "evaluations.json", "samples.json", "transfer.json", "student/config.json"],
    "stopped run": ["run.json", "evaluations.json", "transfer.json", "checkpoints/1-align-0000002/state.json"],
    "selected run": ["selection.json", "evaluations.json", "run.json", "resolved.yaml", "recipe.yaml", "twin/run.json"],
}


def kind(weight: int = 1):
    """Put a strategy into the table of kinds, so many times."""

    def add(function):
        KINDS[function.__name__.replace("_", " ")] = (function, weight)
        return function

    return add


class Trees:
    """The parsed files of a place, for nodes to be drawn from."""

    def __init__(self, pristine: Path) -> None:
        self.pristine, self.known = pristine, {}

    def nodes(self, file: str) -> list[list]:
        """Every node of a JSON or YAML file, as a path from its root."""
        if file not in self.known:
            path = self.pristine / damage.resolve(file, self.pristine)
            self.known[file] = list(_nodes(yaml.safe_load(path.read_text()) if path.exists() else {}))
        return self.known[file]

    def header(self, file: str) -> list[list]:
        """Every node of a safetensors file's header."""
        if file not in self.known:
            data = (self.pristine / damage.resolve(file, self.pristine)).read_bytes()
            self.known[file] = list(_nodes(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])))
        return self.known[file]

    def entries(self) -> list[list]:
        """The entries of the GGUF file."""
        return gguf_raw.read((self.pristine / "tiny.gguf").read_bytes()).entries


def _nodes(tree, at=()):
    yield list(at)
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, entry in list(inner)[:12]:
        yield from _nodes(entry, (*at, key))


def raw(draw, file: str) -> dict:
    """Damage that any file can have."""
    name = draw(st.sampled_from(["cut", "empty", "delete", "folder", "link", "flip", "garbage", "append"]))
    if name == "cut":
        return {"do": "cut", "file": file, "at": draw(st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.99]))}
    if name == "empty":
        return {
            "do": "write",
            "file": file,
            "text": draw(st.sampled_from(["", "\n", " ", "null", "[]", "{}", "0", '"x"', "\0\0\0"])),
        }
    if name == "link":
        return {"do": "link", "file": file, "to": draw(st.sampled_from(LINKS))}
    if name == "flip":
        return {"do": "flip", "file": file, "at": draw(st.floats(0, 1)), "bit": draw(st.integers(0, 7))}
    if name == "garbage":
        return {"do": "write", "file": file, "hex": draw(st.binary(max_size=40)).hex()}
    if name == "append":
        return {
            "do": "append",
            "file": file,
            "text": draw(st.sampled_from(["}", "\n{", "\0", "garbage", "\n- a\n", "[" * 5000])),
        }
    return {"do": name, "file": file}


def node(draw, trees: Trees, file: str) -> dict:
    """Damage to the structure of a JSON or YAML file."""
    at = draw(st.sampled_from(trees.nodes(file)))
    how = draw(st.sampled_from(["set", "set", "set", "set", "drop", "key"]))
    if how == "drop":
        return {"do": "drop", "file": file, "at": at}
    if how == "key":
        at = [*at[:-1], draw(strings.filter(lambda text: isinstance(text, str)))]
    return {"do": "set", "file": file, "at": at, "value": draw(values)}


def tensors(draw, trees: Trees, file: str) -> dict:
    """Damage to a safetensors file."""
    how = draw(st.sampled_from(["header", "tensors", "length", "raw"]))
    if how == "header":
        return {"do": "header", "file": file, "at": draw(st.sampled_from(trees.header(file))), "value": draw(values)}
    if how == "tensors":
        change = draw(st.sampled_from(["nan", "inf", "zero", "huge", "drop", "shape", "empty", "type", "add"]))
        return {"do": "tensors", "file": file, "change": change, "index": draw(st.integers(0, 30))}
    if how == "length":
        return {
            "do": "header_length",
            "file": file,
            "value": draw(st.sampled_from([0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1])),
        }
    return raw(draw, file)


def array(draw, file: str) -> dict:
    if draw(st.booleans()):
        changes = ["object", "shape", "scalar", "text", "nan", "negative", "huge", "empty"]
        return {"do": "array", "file": file, "change": draw(st.sampled_from(changes))}
    if file.endswith(".npy") and draw(st.booleans()):
        return {"do": "claimed_shape", "file": file, "shape": draw(st.sampled_from([[2**40], [2**62], [-1], [0], [3, 3]]))}
    return raw(draw, file)


def damaged(draw, trees: Trees, file: str) -> dict:
    """Damage by what the file is."""
    if draw(st.integers(0, 3)) == 0:
        return raw(draw, file)
    if file.endswith((".json", ".yaml")):
        return node(draw, trees, file)
    if file.endswith(".jsonl"):
        return {"do": "line", "file": file, "number": draw(st.integers(0, 3)), "text": draw(LINES)}
    if file.endswith(".safetensors"):
        return tensors(draw, trees, file)
    return array(draw, file) if file.endswith((".npz", ".npy")) else raw(draw, file)


LINES = st.sampled_from(
    [
        "",
        "{",
        "null",
        "[]",
        "{}",
        "1",
        '"x"',
        "nan",
        '{"loss": NaN}',
        '{"stage": 1}',
        '{"step": "a"}',
        '{"text": 3}',
        '{"text": null}',
        '{"stage": [], "step": {}, "loss": "x", "stage_index": null}',
        '{"ctx": 1}',
        '{"ctx": "a", "choices": "b", "label": 0}',
        "\0",
        '{"stage": "align", "stage_index": 1, "step": 1e400, "loss": 1e400}',
        '{"label": 1e3, "ctx": "", "choices": ["", ""]}',
        MARK,
        ESCAPE,
        "[" * 3000,
        {"$value": "surrogate"},
        '{"text": "\\ud800"}',
        '{"text": ["a"]}',
        '{"text": {"a": 1}}',
        '{"txt": "a"}',
    ]
)


def light(step: dict) -> dict:
    """A step whose budget a test can afford."""
    heavy = step["do"] == "set" and step["at"] and str(step["at"][-1]).endswith(HEAVY)
    return {**step, "value": 2048} if heavy and isinstance(step["value"], int | float) and step["value"] > 4096 else step
