"""Teachers, students, their tokenizers and chat templates, GGUF files, and code that comes with them."""

from hypothesis import strategies as st

from tests.fuzz.pieces import FINISHED, STUDENT, TEACHER, damaged, kind, raw
from tests.fuzz.values import ESCAPE, numbers, strings
from tests.fuzz.world import Case

# Of a model's folder; its config twice, as most is read from it.
FILES = [
    "config.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


@kind(4)
def teacher(draw, trees) -> Case:
    file = f"teacher/{draw(st.sampled_from(FILES))}"
    return Case("teacher", [draw(st.sampled_from(TEACHER))], [damaged(draw, trees, file)])


@kind(2)
def shards(draw, trees) -> Case:
    """A teacher in several files, and what its index names."""
    index = "sharded/model.safetensors.index.json"
    hostile = st.sampled_from(
        ["../outside/model.safetensors", "/etc/passwd", "pytorch_model.bin", "model-00001-of-00002.safetensors", ""]
    )
    file = draw(st.sampled_from([index, index, "sharded/model-00001-of-00002.safetensors"]))
    if file == index and draw(st.booleans()):
        at = draw(st.sampled_from(trees.nodes(index)[3:]))
        steps = [{"do": "set", "file": file, "at": at, "value": draw(hostile)}]
        steps.append(
            {"do": "pickled", "file": "sharded/pytorch_model.bin", "form": draw(st.sampled_from(["plain", "torch"]))}
        )
    else:
        steps = [damaged(draw, trees, file)]
    return Case(
        "shards", [["plan", "sharded.yaml", "--check"], *draw(st.sampled_from([[], [["run", "sharded.yaml"]]]))], steps
    )


@kind(3)
def student(draw, trees) -> Case:
    file = f"out/{draw(st.sampled_from(FILES))}"
    return Case("student", [draw(st.sampled_from(STUDENT))], [damaged(draw, trees, file)])


@kind(3)
def tokenizer(draw, trees) -> Case:
    place = draw(st.sampled_from(["teacher", "out", "@short/student"]))
    commands = {
        "teacher": [["run", "text.yaml"], ["plan", "text.yaml", "--check"]],
        "out": STUDENT,
        "@short/student": FINISHED[3:],
    }
    patterns = ["(", "(?<=a", "[", "(a+)+$", "\\p{Xx}", "(?P<x>a)(?P<x>b)", "a{1000000}", "", "\0", "(?i", "*", "\\"]
    if draw(st.booleans()):
        return Case("tokenizer", [draw(st.sampled_from(commands[place]))], [damaged(draw, trees, f"{place}/tokenizer.json")])
    splits = {
        "type": "Split",
        "pattern": {"Regex": draw(st.sampled_from(patterns))},
        "behavior": "Isolated",
        "invert": False,
    }
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
        *(
            "{{",
            "{% if %}",
            "{% for x in range(10**9) %}a{% endfor %}",
            "{{ messages[5].content }}",
            "{{ x.y.z }}",
            "",
            "{{ 1/0 }}",
        ),
        *(
            "{{ raise_exception('no') }}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{% include 'a' %}",
            "{{ 'a' * 10**10 }}",
        ),
        *(
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "{{ messages | tojson }}",
            "\0",
            ESCAPE,
            "{{ undefined_thing }}",
            "{" * 3000,
        ),
    ]
    file = draw(st.sampled_from(["out/chat_template.jinja", "@short/student/chat_template.jinja"]))
    text = draw(st.sampled_from(templates) | st.text(alphabet="{}%# am|()'.[]", max_size=12))
    options = ["--tokens", "2", "--chat"]
    return Case(
        "chat",
        [["generate", file.rpartition("/")[0].removesuffix("/student"), "hello", *options]],
        [{"do": "write", "file": file, "text": text}],
    )


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
            step[draw(st.sampled_from(["version", "tensors", "entries"]))] = draw(
                st.sampled_from([0, 1, 2, 4, 2**31, 2**60, 2**64 - 1])
            )
        elif how == "tensor":
            change = draw(st.sampled_from(["name", "sizes", "kind", "offset", "drop"]))
            value = {"name": strings, "sizes": st.lists(st.sampled_from([0, 1, 3, 32, 2**31, 2**60]), max_size=5)}.get(
                change, st.sampled_from([0, 1, 3, 31, 999, 2**31, 2**60])
            )
            step = {
                "do": "tensor",
                "file": "tiny.gguf",
                "index": draw(st.integers(0, 20)),
                "change": change,
                "value": draw(value),
            }
        else:
            step = raw(draw, "tiny.gguf")
        steps.append(step)
        if step["do"] not in ("entry", "tensor") or how == "array":  # what lies about its length cannot be read again
            break
    plans = [["plan", "gguf.yaml"]], [["plan", "gguf.yaml", "--check"]], [["run", "gguf.yaml"]]
    return Case("gguf", draw(st.sampled_from(plans)), steps)


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
                    {
                        "do": "set",
                        "file": f"{where}/config.json",
                        "at": ["auto_map"],
                        "value": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
                    },
                    {"do": "set", "file": f"{where}/config.json", "at": ["model_type"], "value": "evil"},
                ],
                [
                    {"do": "program", "file": f"{where}/evil.py"},
                    {
                        "do": "set",
                        "file": f"{where}/config.json",
                        "at": ["auto_map"],
                        "value": {draw(strings.filter(lambda s: isinstance(s, str))): "evil.C"},
                    },
                ],
                [
                    {"do": "program", "file": f"{where}/evil.py"},
                    {
                        "do": "set",
                        "file": f"{where}/tokenizer_config.json",
                        "at": ["auto_map"],
                        "value": {"AutoTokenizer": ["evil.T", None]},
                    },
                    {
                        "do": "set",
                        "file": f"{where}/tokenizer_config.json",
                        "at": ["tokenizer_class"],
                        "value": "EvilTokenizer",
                    },
                ],
                [
                    {"do": "delete", "file": f"{where}/model.safetensors"},
                    {"do": "pickled", "file": f"{where}/pytorch_model.bin", "form": "torch"},
                ],
                [
                    {"do": "program", "file": f"{where}/custom_generate/generate.py"},
                    {
                        "do": "set",
                        "file": f"{where}/generation_config.json",
                        "at": ["custom_generate"],
                        "value": f"./{where}",
                    },
                ],
            ]
        )
    )
    return Case("code", [draw(st.sampled_from(commands))], steps, answers=draw(st.sampled_from(["", "y\ny\ny\n"])))
