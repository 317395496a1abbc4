"""Cases, drawn by hypothesis: one strategy a kind of input. What they draw is plain data (`world.Case`)."""

import json
from pathlib import Path

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz import damage, gguf_raw
from tests.fuzz.values import CODE, ESCAPE, MARK, numbers, strings, structures, values
from tests.fuzz.world import Case

BATCH = 24  # cases a seed
FIRST = 2  # hypothesis begins with the simplest of all, which every seed would share
LINKS = ("outside/secret.txt", "outside/model.safetensors", "outside/folder", "outside/report.html", "nowhere", "self")
KINDS = {}
HEAVY = ("tokens", "trials", "documents", "steps")  # budgets: a large one is honest, and honestly slow

NAMES = [ESCAPE, MARK, "[bold]x[/bold]", "[/]", "a\nb", "..", "../x", "outside/x", "x" * 300, "\udcff", "-x", "", " ", "*", "nul\u202e"]
FINISHED = [
    ["run", "short.yaml"],
    ["report", "@short"],
    ["report", "@short", "@every", "--out", "compared.html"],
    ["eval", "@short"],
    ["export", "@short", "--out", "written"],
    ["generate", "@short", "a river", "--tokens", "3"],
]
EVERY = [["run", "every.yaml"], ["report", "@every"], ["select", "every.yaml"], ["eval", "@every", "--tasks", "tasks"]]
STOPPED = [["run", "half.yaml"], ["report", "@half"], ["run", "half.yaml"], ["eval", "@half"], ["run", "half.yaml"]]
STUDENT = [["generate", "out", "a river", "--tokens", "3"], ["eval", "out", "--teacher", "./teacher", "--heldout", "text/heldout.jsonl"]]
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


def cases_of(number: int, trees: Trees) -> list[Case]:
    """The cases of a seed: the same ones on every machine with the same hypothesis."""
    drawn: list[Case] = []
    table = [name for name, (_, weight) in KINDS.items() for _ in range(weight)]

    @seed(number)
    @settings(
        max_examples=BATCH + FIRST, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def draw(data) -> None:
        name = data.draw(st.sampled_from(table))
        drawn.append(KINDS[name][0](data.draw, trees))

    draw()
    unique = {case.text(): case for case in drawn[FIRST:]}
    return list(unique.values())


# pieces


def _raw(draw, file: str) -> dict:
    """Damage that any file can have."""
    name = draw(st.sampled_from(["cut", "empty", "delete", "folder", "link", "flip", "garbage", "append"]))
    if name == "cut":
        return {"do": "cut", "file": file, "at": draw(st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.99]))}
    if name == "empty":
        return {"do": "write", "file": file, "text": draw(st.sampled_from(["", "\n", " ", "null", "[]", "{}", "0", '"x"', "\0\0\0"]))}
    if name == "link":
        return {"do": "link", "file": file, "to": draw(st.sampled_from(LINKS))}
    if name == "flip":
        return {"do": "flip", "file": file, "at": draw(st.floats(0, 1)), "bit": draw(st.integers(0, 7))}
    if name == "garbage":
        return {"do": "write", "file": file, "hex": draw(st.binary(max_size=40)).hex()}
    if name == "append":
        return {"do": "append", "file": file, "text": draw(st.sampled_from(["}", "\n{", "\0", "garbage", "\n- a\n", "[" * 5000]))}
    return {"do": name, "file": file}


def _node(draw, trees: Trees, file: str) -> dict:
    """Damage to the structure of a JSON or YAML file."""
    at = draw(st.sampled_from(trees.nodes(file)))
    how = draw(st.sampled_from(["set", "set", "set", "set", "drop", "key"]))
    if how == "drop":
        return {"do": "drop", "file": file, "at": at}
    if how == "key":
        at = [*at[:-1], draw(strings.filter(lambda text: isinstance(text, str)))]
    return {"do": "set", "file": file, "at": at, "value": draw(values)}


def _tensors(draw, trees: Trees, file: str) -> dict:
    """Damage to a safetensors file."""
    how = draw(st.sampled_from(["header", "tensors", "length", "raw"]))
    if how == "header":
        return {"do": "header", "file": file, "at": draw(st.sampled_from(trees.header(file))), "value": draw(values)}
    if how == "tensors":
        change = draw(st.sampled_from(["nan", "inf", "zero", "huge", "drop", "shape", "empty", "type", "add"]))
        return {"do": "tensors", "file": file, "change": change, "index": draw(st.integers(0, 30))}
    if how == "length":
        return {"do": "header_length", "file": file, "value": draw(st.sampled_from([0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1]))}
    return _raw(draw, file)


def _array(draw, file: str) -> dict:
    if draw(st.booleans()):
        changes = ["object", "shape", "scalar", "text", "nan", "negative", "huge", "empty"]
        return {"do": "array", "file": file, "change": draw(st.sampled_from(changes))}
    if file.endswith(".npy") and draw(st.booleans()):
        return {"do": "claimed_shape", "file": file, "shape": draw(st.sampled_from([[2**40], [2**62], [-1], [0], [3, 3]]))}
    return _raw(draw, file)


def _any(draw, trees: Trees, file: str) -> dict:
    """Damage by what the file is."""
    if draw(st.integers(0, 3)) == 0:
        return _raw(draw, file)
    if file.endswith((".json", ".yaml")):
        return _node(draw, trees, file)
    if file.endswith(".jsonl"):
        return {"do": "line", "file": file, "number": draw(st.integers(0, 3)), "text": draw(_lines)}
    if file.endswith(".safetensors"):
        return _tensors(draw, trees, file)
    return _array(draw, file) if file.endswith((".npz", ".npy")) else _raw(draw, file)


_lines = st.sampled_from(
    ["", "{", "null", "[]", "{}", "1", '"x"', "nan", '{"loss": NaN}', '{"stage": 1}', '{"step": "a"}', '{"text": 3}', '{"text": null}']
    + ['{"stage": [], "step": {}, "loss": "x", "stage_index": null}', '{"ctx": 1}', '{"ctx": "a", "choices": "b", "label": 0}', "\0"]
    + ['{"stage": "align", "stage_index": 1, "step": 1e400, "loss": 1e400}', '{"label": 1e3, "ctx": "", "choices": ["", ""]}']
    + [MARK, ESCAPE, "[" * 3000, {"$value": "surrogate"}, '{"text": "\\ud800"}', '{"text": ["a"]}', '{"text": {"a": 1}}', '{"txt": "a"}']
)


# kinds


@kind(5)
def finished_run(draw, trees) -> Case:
    names = ["metrics.jsonl", "matrices.npz", "recipe.yaml", "report.html", "report.md", "student", "checkpoints", "student/tokenizer.json"]
    names += ["student/model.safetensors", "checkpoints/1-align-end/student.safetensors", *JSON_FILES["finished run"]]
    file = f"@short/{draw(st.sampled_from(names))}"
    return Case("finished run", [draw(st.sampled_from(FINISHED))], [_any(draw, trees, file)])


@kind(5)
def stopped_run(draw, trees) -> Case:
    newest = "checkpoints/1-align-0000002"
    names = ["metrics.jsonl", "recipe.yaml", "checkpoints", newest, f"{newest}/rng.safetensors", f"{newest}/optimizer.safetensors"]
    names += [f"{newest}/student.safetensors", f"{newest}/stage.safetensors", *JSON_FILES["stopped run"] * 2]
    file = f"@half/{draw(st.sampled_from(names))}"
    return Case("stopped run", [draw(st.sampled_from(STOPPED))], [_any(draw, trees, file)])


@kind(2)
def selected_run(draw, trees) -> Case:
    names = ["twin", "twin/student", "export", "metrics.jsonl", *JSON_FILES["selected run"]]
    steps = [_any(draw, trees, f"@every/{draw(st.sampled_from(names))}")]
    if draw(st.booleans()):  # as one that is not over yet
        steps.append({"do": "drop", "file": "@every/run.json", "at": ["finished"]})
    return Case("selected run", [draw(st.sampled_from(EVERY))], steps)


@kind(2)
def links(draw, trees) -> Case:
    """Links where files are written."""
    run = draw(st.sampled_from(["short", "half"]))
    names = [".student", "student", "matrices.npz", "report.html", "report.md", "metrics.jsonl", "run.json", "evaluations.json", "export"]
    names += ["samples.json", "transfer.json", "checkpoints", "checkpoints/.writing-1-align-0000003", "twin"]
    file = f"@{run}/{draw(st.sampled_from(names))}"
    steps = [{"do": "link", "file": file, "to": draw(st.sampled_from(LINKS))}]
    commands = [["run", f"{run}.yaml"], ["report", f"@{run}"]]
    if draw(st.booleans()):
        steps.append({"do": "delete", "file": f"@{run}/student"})
        steps.append({"do": "drop", "file": f"@{run}/run.json", "at": ["finished"]})
    if draw(st.booleans()):
        commands = [["report", f"@{run}", "--out", draw(st.sampled_from(["outside/secret.txt", "short.yaml", "text/train.jsonl", "outside"]))]]
    if draw(st.integers(0, 4)) == 0:
        commands = [["run", f"{run}.yaml", "--fresh"]]
    return Case("links", commands, steps)


@kind(4)
def teacher(draw, trees) -> Case:
    files = ["config.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    file = f"teacher/{draw(st.sampled_from(files))}"
    return Case("teacher", [draw(st.sampled_from(TEACHER))], [_any(draw, trees, file)])


@kind(2)
def shards(draw, trees) -> Case:
    """A teacher in several files, and what its index names."""
    index = "sharded/model.safetensors.index.json"
    hostile = st.sampled_from(["../outside/model.safetensors", "/etc/passwd", "pytorch_model.bin", "model-00001-of-00002.safetensors", ""])
    file = draw(st.sampled_from([index, index, "sharded/model-00001-of-00002.safetensors"]))
    if file == index and draw(st.booleans()):
        at = draw(st.sampled_from(trees.nodes(index)[3:]))
        steps = [{"do": "set", "file": file, "at": at, "value": draw(hostile)}]
        steps.append({"do": "pickled", "file": "sharded/pytorch_model.bin", "form": draw(st.sampled_from(["plain", "torch"]))})
    else:
        steps = [_any(draw, trees, file)]
    return Case("shards", [["plan", "sharded.yaml", "--check"]] + draw(st.sampled_from([[], [["run", "sharded.yaml"]]])), steps)


@kind(3)
def student(draw, trees) -> Case:
    files = ["config.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    file = f"out/{draw(st.sampled_from(files))}"
    return Case("student", [draw(st.sampled_from(STUDENT))], [_any(draw, trees, file)])


@kind(3)
def tokenizer(draw, trees) -> Case:
    place = draw(st.sampled_from(["teacher", "out", "@short/student"]))
    commands = {"teacher": [["run", "text.yaml"], ["plan", "text.yaml", "--check"]], "out": STUDENT, "@short/student": FINISHED[3:]}
    patterns = ["(", "(?<=a", "[", "(a+)+$", "\\p{Xx}", "(?P<x>a)(?P<x>b)", "a{1000000}", "", "\0", "(?i", "*", "\\"]
    if draw(st.booleans()):
        return Case("tokenizer", [draw(st.sampled_from(commands[place]))], [_any(draw, trees, f"{place}/tokenizer.json")])
    splits = {"type": "Split", "pattern": {"Regex": draw(st.sampled_from(patterns))}, "behavior": "Isolated", "invert": False}
    where = draw(st.sampled_from(["pre_tokenizer", "normalizer", "added_tokens"]))
    value = {
        "pre_tokenizer": splits,
        "normalizer": {"type": "Replace", "pattern": splits["pattern"], "content": draw(strings)},
        "added_tokens": [{"id": draw(numbers), "content": draw(strings), "special": True}],
    }[where]
    step = {"do": "set", "file": f"{place}/tokenizer.json", "at": [where], "value": value}
    return Case("tokenizer", [draw(st.sampled_from(commands[place]))], [step])


@kind(2)
def chat(draw, trees) -> Case:
    templates = [
        *("{{", "{% if %}", "{% for x in range(10**9) %}a{% endfor %}", "{{ messages[5].content }}", "{{ x.y.z }}", "", "{{ 1/0 }}"),
        *("{{ raise_exception('no') }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include 'a' %}", "{{ 'a' * 10**10 }}"),
        *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages | tojson }}", "\0", ESCAPE, "{{ undefined_thing }}", "{" * 3000),
    ]
    file = draw(st.sampled_from(["out/chat_template.jinja", "@short/student/chat_template.jinja"]))
    text = draw(st.sampled_from(templates) | st.text(alphabet="{}%# am|()'.[]", max_size=12))
    options = ["--tokens", "2", "--chat"]
    return Case("chat", [["generate", file.rpartition("/")[0].removesuffix("/student"), "hello", *options]], [{"do": "write", "file": file, "text": text}])


@kind(5)
def gguf(draw, trees) -> Case:
    steps = []
    for _ in range(draw(st.integers(1, 2))):
        how = draw(st.sampled_from(["entry", "entry", "entry", "array", "counts", "tensor", "raw", "take"]))
        known = draw(st.sampled_from(trees.entries()))
        step = {"do": "entry", "file": "tiny.gguf", "name": known[0]}
        if how == "entry":
            type_ = draw(st.sampled_from([known[1], known[1], 4, 5, 6, 8, 10, 12, 7]))
            step |= {"kind": type_, "value": draw(strings if type_ == 8 else numbers)}
        elif how == "array":
            inner = draw(st.sampled_from([4, 5, 6, 8, 9, 10, 99]))
            value = draw(st.lists(strings if inner == 8 else numbers, max_size=3))
            step |= {"kind": 9, "inner": inner, "value": [[4, None, [1]]] if inner == 9 else value}
            step |= {"length": draw(st.sampled_from([None, 2**60, 2**31, 0]))}
        elif how == "take":
            step |= {"kind": -1, "value": 0}
        elif how == "counts":
            step = {"do": "counts", "file": "tiny.gguf"}
            step[draw(st.sampled_from(["version", "tensors", "entries"]))] = draw(st.sampled_from([0, 1, 2, 4, 2**31, 2**60, 2**64 - 1]))
        elif how == "tensor":
            change = draw(st.sampled_from(["name", "sizes", "kind", "offset", "drop"]))
            value = {"name": strings, "sizes": st.lists(st.sampled_from([0, 1, 3, 32, 2**31, 2**60]), max_size=5)}.get(change, st.sampled_from([0, 1, 3, 31, 999, 2**31, 2**60]))
            step = {"do": "tensor", "file": "tiny.gguf", "index": draw(st.integers(0, 20)), "change": change, "value": draw(value)}
        else:
            step = _raw(draw, "tiny.gguf")
        steps.append(step)
        if step["do"] not in ("entry", "tensor"):
            break
    plans = [["plan", "gguf.yaml"]], [["plan", "gguf.yaml", "--check"]], [["run", "gguf.yaml"]]
    return Case("gguf", draw(st.sampled_from(plans)), steps)


@kind(6)
def recipe(draw, trees) -> Case:
    commands = [["plan", "text.yaml"], ["run", "text.yaml", "--stop-after", "0.05"]]
    texts = [
        *("a: &a [*a]", "a: &a {b: *a}", "<<: {name: x}", "name: !!python/object/apply:os.system [touch outside/executed]", "- a", "a", "1"),
        *("name: 010", "? [a, b]\n: c", "a: b: c", "\t", "%YAML 3.0\n---\na: 1", "--- a\n--- b", "name: x\nname: y", "{" * 3000, "[" * 3000),
        *("a: &a [1,1,1,1,1,1,1,1]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else '*a'] * 9)}]" for n in range(9)), "a: *b"),
    ]
    how = draw(st.integers(0, 9))
    if how == 0:
        steps = [{"do": "write", "file": "text.yaml", "text": draw(st.sampled_from(texts) | st.text(max_size=30))}]
    elif how == 1:
        steps = [_raw(draw, "text.yaml")]
    elif how == 2:
        steps = [{"do": "append", "file": "text.yaml", "text": "\n" + draw(st.sampled_from(texts))}]
    else:
        steps = [_light(_node(draw, trees, "text.yaml"))]
    return Case("recipe", commands, steps, compare=True)


def _light(step: dict) -> dict:
    """A step whose budget a test can afford."""
    heavy = step["do"] == "set" and step["at"] and str(step["at"][-1]).endswith(HEAVY)
    return {**step, "value": 2048} if heavy and isinstance(step["value"], int | float) and step["value"] > 4096 else step


@kind(6)
def override(draw, trees) -> Case:
    keys = [".".join(map(str, at)) for at in trees.nodes("text.yaml") if at]
    keys += ["meta_tokens", "seed", "twin", "precision", "export", "trackers", "data.limit", "data.micro_batch", "data.separator", "selected"]
    keys += ["evaluation.final_tokens", "evaluation.seq_len", "mixers.M.d_state", "mixers.M.conv", "mixers.M.rope", "mixers.M.window.size"]
    keys += ["mixers.M.window.own", "mixers.M.chunk", "stages.align.lr.new", "stages.align.warmup", "stages.align.batch", "stages.align.betas"]
    keys += ["stages.align.weight_decay", "stages.align.clip", "stages.1.align.lr", "stages.9.lr", "checkpoints.minutes", "checkpoints.keep"]
    keys += ["pattern.by", "pattern.keep", "mixers.M.mixer", "data.train.0.weight", "data.train.0.documents", "data.train.0.column"]
    key = draw(st.sampled_from(keys))
    written = draw(st.sampled_from(["010", "1:30", "0x10", "1_000", "~", ".nan", "-.inf", "[1", "{a: b", "&a [*a]", "*a", "!!python/name:os", "1e3"]) | values)
    value = written if isinstance(written, str) else json.dumps(written) if not isinstance(written, dict | list) else None
    if value is None:
        value = {"float": lambda: f".{written['of']}".replace(".-", "-.")}.get(written.get("$value") if isinstance(written, dict) else "", lambda: json.dumps(written))()
    if key.endswith(HEAVY) and value.isdigit() and int(value[:9]) > 4096:
        value = "4096"
    given = f"{key}={value[:3000]}"
    commands = [["plan", "text.yaml", given], ["run", "text.yaml", given, "--stop-after", "0.05"]]
    return Case("override", commands, compare=True)


@kind(3)
def text(draw, trees) -> Case:
    form = draw(st.sampled_from(["", "gz", "xz", "zst"]))
    file = draw(st.sampled_from(["train.jsonl", "train.json", "train.csv", "train.txt"]))
    contents = [
        *('{"text": "a b"}\n{"text": 3}\n', '{"text": null}\n', '{"text": "a"}\n{', "null\n", "[]", "{}", "[1, 2]", '[{"text": "a"}, 3]', '"x"'),
        *("text,source\n\"a", "text\n" + "a,b,c\n", "text;source\n", "\0\0", "\ufefftext\na\n", "text\n\n\n", "a\r\rb", MARK, " ", "\n"),
        *('{"text": "\\ud800"}\n', '{"text": "a", "text": "b"}\n', '{"text": {"a": 1}}\n', '{"text": ["a"]}\n', '{"other": "a"}\n', "[" * 3000),
        *('{"text": "a", "source": null}\n{"text": "b", "source": {"x": 1}}\n', '{"text": NaN}\n', '{"text": 1e999}\n', '{"text": true}\n'),
    ]
    name = f"text/{file}" + (f".{form}" if form else "")
    times = draw(st.sampled_from([1, 1, 1, 1, 200_000]))
    step = {"do": "packed", "file": name, "text": draw(st.sampled_from(contents)), "form": form, "times": times}
    step |= {"damage": draw(st.sampled_from(["", "", "cut", "tail"]))}
    which = draw(st.sampled_from(["train", "train", "heldout"]))
    commands = [["run", "text.yaml", f"data.{which}.0.path={name}"]]
    if draw(st.integers(0, 3)) == 0:
        name = "text/table.parquet"
        cells = st.sampled_from(["text", "null", "int", "list", "struct", "bytes", "none"])
        step = {"do": "table", "file": name, "column": draw(st.sampled_from(["text", "other"])), "kind": draw(cells)}
        commands = [["run", "text.yaml", f"data.{which}.0.path={name}"]]
    elif draw(st.integers(0, 5)) == 0:
        commands = [["eval", "@short", "--heldout", name]]
    elif draw(st.integers(0, 5)) == 0:
        commands, step = [["run", "text.yaml", "data.train=[{hub: ./set}]"]], _set(draw)
    return Case("text", commands, [step])


def _set(draw) -> dict:
    """A data set's folder whose card or files are hostile."""
    files = ["../outside/secret.txt", "/etc/passwd", "**", "nothing.jsonl", "", "http://localhost/x.jsonl", "~/x", "train.jsonl::zip"]
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(draw(st.sampled_from(files)))}\n---\n"
    if draw(st.booleans()):
        return {"do": "write", "file": "set/README.md", "text": card}
    return draw(st.sampled_from([{"do": "write", "file": "set/set.py", "text": CODE}, _raw(draw, "set/README.md"), _raw(draw, "set/train.jsonl")]))


@kind(2)
def tasks(draw, trees) -> Case:
    task = draw(st.sampled_from(["piqa", "hellaswag", "winogrande", "lambada", "arc_easy", "mmlu"]))
    item = {"ctx": draw(strings | structures), "choices": draw(st.lists(strings, max_size=3) | structures), "label": draw(numbers | strings | structures)}
    if draw(st.booleans()):
        item = {"ctx": "a", "choices": ["b", "c"], "label": 0} | {draw(st.sampled_from(["ctx", "choices", "label", "contexts"])): draw(values)}
    steps = [{"do": "set", "file": f"tasks/{task}.json", "at": [], "value": item}, {"do": "rename", "file": f"tasks/{task}.json", "to": f"{task}.jsonl"}]
    if draw(st.integers(0, 2)) == 0:
        steps = [_any(draw, trees, "tasks/piqa.jsonl")]
    commands = ["eval", "@short", "--tasks", "tasks"], ["select", "text.yaml", "--by", "task", "--tasks", "tasks", "--keep", "1"]
    return Case("tasks", [draw(st.sampled_from(commands))], steps)


@kind(2)
def cache(draw, trees) -> Case:
    file = f"@cache/{draw(st.sampled_from(['tokens.npy', 'starts.npy', 'labels.npy', 'meta.json', 'meta.json']))}"
    steps = [_any(draw, trees, file)]
    if file.endswith(".npy") and draw(st.booleans()):  # with the hash that belongs to it
        steps.append({"do": "rehash", "file": "@cache/meta.json"})
    return Case("cache", [draw(st.sampled_from([["run", "text.yaml"], ["run", "half.yaml"], ["eval", "@short"]]))], steps)


def _stays(name) -> bool:
    """Whether a folder of this name lies in the place: one elsewhere would be made there, as asked."""
    return isinstance(name, str) and not name.startswith(("/", "~", "-")) and ".." not in name


@kind(4)
def command_line(draw, trees) -> Case:
    number = st.sampled_from(["nan", "inf", "-inf", "-0", "0", "-1", "1e12", "1e400", "0.5", "1000000000000", "", "x", "1e-300", "999999999"])
    small = st.sampled_from(["nan", "inf", "-1", "0", "", "x", "1e400", "99999999999999999999", "3"])
    name = st.sampled_from(NAMES) | strings
    commands = [
        ["generate", "@short", draw(strings), "--tokens", draw(small)],
        ["generate", "@short", "hello", "--tokens", "2", "--temperature", draw(number)],
        ["generate", "@short", draw(st.sampled_from(["a " * 3000, "\udcff", "\udc80abc", "", "\n", ESCAPE]) | strings), "--tokens", "2"],
        ["run", "text.yaml", "--stop-after", draw(number)],
        ["run", "text.yaml", "--runs", draw(name.filter(_stays))],
        ["select", "text.yaml", "--keep", draw(number)],
        ["select", "text.yaml", "--by", draw(name)],
        ["select", "text.yaml", "--keep", "1", "--write", draw(st.sampled_from(["outside/secret.txt", "text.yaml", "", "outside", "no/where.yaml", "x\n.yaml"]))],
        ["eval", "@short", "--suite", draw(name)],
        ["eval", "@short", "--tasks", draw(name)],
        ["eval", "@short", "--teacher", draw(name)],
        ["eval", "@short", "--heldout", draw(name)],
        ["eval", draw(name)],
        ["export", "@short", "--out", draw(st.sampled_from(["outside", "out", "outside/secret.txt", "", "/dev/null/x", "@short", "runs", "teacher"])), "--to", draw(name | st.just("portable"))],
        ["report", "@short", "--out", draw(st.sampled_from(["outside/secret.txt", "outside", "teacher/model.safetensors", "", "short.yaml", "no/where.html"]))],
        ["report", draw(name)],
        ["report", "@short", draw(name)],
        ["plan", draw(name)],
        ["run", draw(name)],
        ["plan", "text.yaml", "--json", draw(st.sampled_from(["outside", "", "no/where.json", "outside/secret.txt/x"]))],
        ["recipes", "show", draw(st.sampled_from(["/etc/passwd", "outside/secret.txt", "./outside/secret.txt", "../README"]) | name)],
        ["recipes", "cp", "quickstart", draw(st.sampled_from(["outside/secret.txt", "", "no/where/x.yaml", "short.yaml"]))],
        ["recipes", "cp", draw(name), "copied"],
        ["bench", draw(st.sampled_from(["ops", "layouts", "steps"])), draw(name)],
        ["plan", "text.yaml", draw(strings)],
    ]
    return Case("command line", [draw(st.sampled_from(commands))])


@kind(2)
def names(draw, trees) -> Case:
    """Names of runs, files and folders that are markup, escape bytes or paths."""
    name = draw(st.sampled_from(NAMES) | strings.filter(lambda text: isinstance(text, str) and len(text) < 300))
    how = draw(st.sampled_from(["recipe", "text", "teacher", "run", "label", "mixer", "stage"]))
    recipe = {"do": "set", "file": "text.yaml"}
    if how == "recipe":
        return Case("names", [["run", "text.yaml"]], [recipe | {"at": ["name"], "value": name}])
    if how == "teacher":
        return Case("names", [["plan", "text.yaml"]], [recipe | {"at": ["teacher"], "value": name}])
    if how == "label":
        return Case("names", [["run", "text.yaml"]], [recipe | {"at": ["data", "heldout", 0, "label"], "value": name}])
    if how == "mixer":
        return Case("names", [["plan", "text.yaml"]], [recipe | {"at": ["mixers", "M", "mixer"], "value": name}])
    if how == "stage":
        return Case("names", [["plan", "text.yaml"]], [recipe | {"at": ["stages", 0], "value": {name: {"tokens": 64}}}])
    safe = name.replace("/", "_").replace("\0", "_")[:100] or "_"
    if how == "text":
        steps = [{"do": "rename", "file": "text/train.jsonl", "to": f"{safe}.jsonl"}, recipe | {"at": ["data", "train", 0, "path"], "value": f"text/{safe}.jsonl"}]
        return Case("names", [["run", "text.yaml"]], steps)
    if safe in (".", ".."):
        safe = "..."
    return Case("names", [["report", f"runs/{safe}"]], [{"do": "rename", "file": "@short", "to": safe}])


@kind(2)
def code(draw, trees) -> Case:
    """Code that comes with what is read: remote code, pickles, scripts."""
    where = draw(st.sampled_from(["out", "@short/student", "teacher"]))
    commands = {"out": STUDENT, "@short/student": FINISHED[3:], "teacher": TEACHER}[where]
    steps = draw(
        st.sampled_from(
            [
                [{"do": "program", "file": f"{where}/modeling_distill.py", "keep": where == "out"}],
                [
                    {"do": "program", "file": f"{where}/evil.py"},
                    {"do": "set", "file": f"{where}/config.json", "at": ["auto_map"], "value": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
                    {"do": "set", "file": f"{where}/config.json", "at": ["model_type"], "value": "evil"},
                ],
                [
                    {"do": "program", "file": f"{where}/evil.py"},
                    {"do": "set", "file": f"{where}/config.json", "at": ["auto_map"], "value": {draw(strings.filter(lambda s: isinstance(s, str))): "evil.C"}},
                ],
                [
                    {"do": "program", "file": f"{where}/evil.py"},
                    {"do": "set", "file": f"{where}/tokenizer_config.json", "at": ["auto_map"], "value": {"AutoTokenizer": ["evil.T", None]}},
                    {"do": "set", "file": f"{where}/tokenizer_config.json", "at": ["tokenizer_class"], "value": "EvilTokenizer"},
                ],
                [{"do": "delete", "file": f"{where}/model.safetensors"}, {"do": "pickled", "file": f"{where}/pytorch_model.bin", "form": "torch"}],
                [
                    {"do": "program", "file": f"{where}/custom_generate/generate.py"},
                    {"do": "set", "file": f"{where}/generation_config.json", "at": ["custom_generate"], "value": f"./{where}"},
                ],
            ]
        )
    )
    return Case("code", [draw(st.sampled_from(commands))], steps, answers=draw(st.sampled_from(["", "y\ny\ny\n"])))
