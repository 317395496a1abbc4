"""Stages after `imitate`, chats and pairs, answers of a model, cached logits, and runs that start from a student."""

from hypothesis import strategies as st

from tests.fuzz.pieces import LINES, damaged, kind, light, node, raw
from tests.fuzz.place import ANSWERS
from tests.fuzz.values import strings, values
from tests.fuzz.world import Case

ASK = ["answers", "text.yaml", "--out", "asked", "--limit", "2", "--tokens", "4"]
TURNS = st.sampled_from(["user", "assistant", "system", "tool", "", None, 3, "USER"])


@kind(4)
def later_stages(draw, trees) -> Case:
    """A recipe with `replace`, `tune` and `prefer`, which `plan` and `run` should judge alike."""
    return Case(
        "later stages", [["plan", "chat.yaml"], ["run", "chat.yaml"]], [light(node(draw, trees, "chat.yaml"))], compare=True
    )


@kind(3)
def chats(draw, trees) -> Case:
    """Chats and pairs of answers."""
    file = draw(st.sampled_from(["text/chats.jsonl", "text/pairs.jsonl"]))
    turn = st.fixed_dictionaries({"role": TURNS, "content": strings | values})
    row = draw(
        st.fixed_dictionaries({"messages": st.lists(turn, max_size=3) | values})
        | st.fixed_dictionaries({"prompt": strings | values, "completion": strings | values})
        | st.fixed_dictionaries({"prompt": strings | values, "chosen": strings | values, "rejected": strings | values})
    )
    steps = [{"do": "row", "file": file, "number": draw(st.integers(0, 3)), "value": row}]
    if draw(st.integers(0, 2)) == 0:
        steps = [{"do": "line", "file": file, "number": draw(st.integers(0, 3)), "text": draw(LINES)}]
    if draw(st.integers(0, 4)) == 0:
        steps = [raw(draw, file)]
    commands = [
        ["run", "chat.yaml"],
        ["prepare", "chat.yaml", "--show", "1"],
        [*ASK, "--data", file],
        [*ASK, "--data", file, "--pairs"],
        [*ASK, "--data", file, "--student", "@short"],
    ]
    return Case("chats", [draw(st.sampled_from(commands))], steps)


@kind(1)
def questions(draw, trees) -> Case:
    """Sets of questions with reference answers."""
    file = "text/questions.jsonl"
    row = {"id": draw(strings | values), "question": draw(strings | values), "answer": draw(strings | values)}
    steps = [{"do": "row", "file": file, "number": draw(st.integers(0, 3)), "value": row}]
    if draw(st.booleans()):
        steps = [damaged(draw, trees, file)]
    command = ["questions", file, "--out", draw(st.sampled_from(["made.jsonl", "outside", "no/where.jsonl", ""]))]
    return Case("questions", [command], steps)


@kind(2)
def answers(draw, trees) -> Case:
    """The folder of answers that `distill answers` goes on with, and that a run reads."""
    file = f"said/{draw(st.sampled_from(['answers.json', 'answers-00000.json', 'answers-00000.jsonl']))}"
    commands = [ANSWERS, ["run", "text.yaml", "data.train=[{path: 'said/*.jsonl'}]"]]
    return Case("answers", [draw(st.sampled_from(commands))], [damaged(draw, trees, file)])


@kind(2)
def cached_logits(draw, trees) -> Case:
    """The folder of cached logits that `distill cache` goes on with, and that a run reads."""
    file = f"logits/{draw(st.sampled_from(['cache.json', 'shard-00000.json', 'shard-00000.safetensors']))}"
    commands = [["run", "cached.yaml"], ["cache", "cached.yaml", "--out", "logits", "--top-k", "8"]]
    return Case("cached logits", [draw(st.sampled_from(commands))], [damaged(draw, trees, file)])


@kind(2)
def beginning(draw, trees) -> Case:
    """A run that starts from a finished student."""
    commands = [["plan", "begun.yaml"], ["run", "begun.yaml"]]
    if draw(st.booleans()):
        return Case("beginning", commands, [light(node(draw, trees, "begun.yaml"))], compare=True)
    file = f"out/{draw(st.sampled_from(['config.json', 'model.safetensors', 'tokenizer.json']))}"
    return Case("beginning", commands, [damaged(draw, trees, file)])
