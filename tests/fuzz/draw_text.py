"""Text, data sets, task files and prepared text."""

import json

from hypothesis import strategies as st

from tests.fuzz.pieces import damaged, kind, raw
from tests.fuzz.values import CODE, MARK, numbers, strings, structures, values
from tests.fuzz.world import Case


@kind(3)
def text(draw, trees) -> Case:
    form = draw(st.sampled_from(["", "gz", "xz", "zst"]))
    file = draw(st.sampled_from(["train.jsonl", "train.json", "train.csv", "train.txt"]))
    contents = [
        *(
            '{"text": "a b"}\n{"text": 3}\n',
            '{"text": null}\n',
            '{"text": "a"}\n{',
            "null\n",
            "[]",
            "{}",
            "[1, 2]",
            '[{"text": "a"}, 3]',
            '"x"',
        ),
        *(
            'text,source\n"a',
            "text\n" + "a,b,c\n",
            "text;source\n",
            "\0\0",
            "\ufefftext\na\n",
            "text\n\n\n",
            "a\r\rb",
            MARK,
            " ",
            "\n",
        ),
        *(
            '{"text": "\\ud800"}\n',
            '{"text": "a", "text": "b"}\n',
            '{"text": {"a": 1}}\n',
            '{"text": ["a"]}\n',
            '{"other": "a"}\n',
            "[" * 3000,
        ),
        *(
            '{"text": "a", "source": null}\n{"text": "b", "source": {"x": 1}}\n',
            '{"text": NaN}\n',
            '{"text": 1e999}\n',
            '{"text": true}\n',
        ),
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
    files = [
        "../outside/secret.txt",
        "/etc/passwd",
        "**",
        "nothing.jsonl",
        "",
        "http://localhost/x.jsonl",
        "~/x",
        "train.jsonl::zip",
    ]
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(draw(st.sampled_from(files)))}\n---\n"
    if draw(st.booleans()):
        return {"do": "write", "file": "set/README.md", "text": card}
    return draw(
        st.sampled_from(
            [{"do": "write", "file": "set/set.py", "text": CODE}, raw(draw, "set/README.md"), raw(draw, "set/train.jsonl")]
        )
    )


@kind(2)
def tasks(draw, trees) -> Case:
    task = draw(st.sampled_from(["piqa", "hellaswag", "winogrande", "lambada", "arc_easy", "mmlu"]))
    item = {
        "ctx": draw(strings | structures),
        "choices": draw(st.lists(strings, max_size=3) | structures),
        "label": draw(numbers | strings | structures),
    }
    if draw(st.booleans()):
        item = {"ctx": "a", "choices": ["b", "c"], "label": 0} | {
            draw(st.sampled_from(["ctx", "choices", "label", "contexts"])): draw(values)
        }
    steps = [
        {"do": "set", "file": f"tasks/{task}.json", "at": [], "value": item},
        {"do": "rename", "file": f"tasks/{task}.json", "to": f"{task}.jsonl"},
    ]
    if draw(st.integers(0, 2)) == 0:
        steps = [damaged(draw, trees, "tasks/piqa.jsonl")]
    commands = (
        ["eval", "@short", "--tasks", "tasks"],
        ["select", "text.yaml", "--by", "task", "--tasks", "tasks", "--keep", "1"],
    )
    return Case("tasks", [draw(st.sampled_from(commands))], steps)


@kind(2)
def cache(draw, trees) -> Case:
    names = ["tokens.npy", "starts.npy", "labels.npy", "hashes.npy", "meta.json", "../meta.json", "../meta.json"]
    file = f"@cache/00000/{draw(st.sampled_from(names))}"
    steps = [damaged(draw, trees, file)]
    if file.endswith(".npy") and draw(st.booleans()):  # with the hash that belongs to it
        steps.append({"do": "rehash", "file": "@cache/00000/meta.json"})
    return Case("cache", [draw(st.sampled_from([["run", "text.yaml"], ["run", "half.yaml"], ["eval", "@short"]]))], steps)
