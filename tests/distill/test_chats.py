"""Chats as tokens: the answers that each family's template marks, and refusals that name file, row and fix."""

import json

import pytest

from distill.errors import UserError
from distill.text.chat_tokens import chat_documents
from distill.text.chats import columns_of, row_of
from tests.distill import chat_templates as templates
from tests.distill.chat_templates import assistant, shown, tokenizer_with, user

TWO = [user("hi"), assistant("hello world"), user("more?"), assistant("the end")]
SYSTEM = {"role": "system", "content": "be kind"}


def row(record, column="text", train_on=None):
    return row_of(record, train_on, "data.train.0: 'f.jsonl', line 7", 7, columns_of(column, record), record)


def written(record, tokenizer, **options):
    """The documents of one row, what is trained on marked."""
    (documents,) = chat_documents([row(record, **options)], tokenizer)
    return [shown(document, tokenizer) for document in documents]


ONE = {
    "CHATML": [
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        "⟦hello world<|im_end|>⟧\n<|im_start|>user\nmore?<|im_end|>\n<|im_start|>assistant\n⟦the end<|im_end|>⟧\n"
    ],
    "LLAMA3": [
        "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "⟦hello world<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nmore?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦the end<|eot_id|>⟧"
    ],
    "MISTRAL": ["<s>[INST] hi [/INST]⟦ hello world</s>⟧[INST] more? [/INST]⟦ the end</s>⟧"],
    "GEMMA": [
        "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n⟦hello world<end_of_turn>⟧\n"
        "<start_of_turn>user\nmore?<end_of_turn>\n<start_of_turn>model\n⟦the end<end_of_turn>⟧\n"
    ],
    "PHI3": [
        "<|user|>\nhi<|end|>\n<|assistant|>\n⟦hello world<|end|>⟧\n<|user|>\nmore?<|end|>\n<|assistant|>\n"
        "⟦the end<|end|>\n</s>⟧"
    ],
    "PLAIN": ["### user:\nhi\n\n### assistant:\n⟦hello world\n\n⟧### user:\nmore?\n\n### assistant:\n⟦the end\n\n⟧"],
    "MARKED": [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦hello world<|im_end|>⟧\n<|im_start|>user\nmore?<|im_end|>\n"
        "<|im_start|>assistant\n⟦the end<|im_end|>⟧\n"
    ],
    "QWEN3": [  # the last answer in the whole chat, the one before behind what it saw
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello world<|im_end|>\n<|im_start|>user\nmore?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nthe end<|im_end|>⟧\n",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nhello world<|im_end|>⟧\n",
    ],
}


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("trims", [False, True])
def test_two_answers(name, trims):
    assert written({"messages": TWO}, tokenizer_with(getattr(templates, name), trims=trims)) == ONE[name]


def test_markers_around_the_end_of_a_turn():
    """The end that a marked span holds is the assistant's, the space behind it is not; nor are turns before `completion`."""
    inside = "{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    template = templates.MARKED.replace("{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}", inside)
    assert template != templates.MARKED
    assert written({"messages": TWO}, tokenizer_with(template)) == ONE["MARKED"]
    unended = templates.MARKED.replace("{{ '<|im_end|>\n' }}", "")  # what follows begins the next turn
    (said,) = written({"messages": TWO}, tokenizer_with(unended))
    assert "⟦hello world⟧<|im_start|>user" in said and said.endswith("⟦the end⟧")
    (said,) = written({"prompt": TWO[:3], "completion": TWO[3:]}, tokenizer_with(template))
    assert said == ONE["MARKED"][0].replace("⟦hello world<|im_end|>⟧", "hello world<|im_end|>")


def test_signs_of_words_and_mixed_letters():
    """SentencePiece's signs, letters of several tokens, space at the borders, and a token across the border of an answer."""
    tokenizer = tokenizer_with(templates.MISTRAL, metaspace=True)
    (said,) = written({"messages": TWO}, tokenizer)  # decoded run by run, a run's first sign is no space
    assert said == "<s>[INST] hi [/INST]⟦hello world</s>⟧[INST] more? [/INST]⟦the end</s>⟧"
    bare = "{% for message in messages %}{{ message['role'] + ':' + message['content'] }}{% endfor %}"
    tokenizer = tokenizer_with(bare + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    assert written({"messages": [user("x"), assistant(") on")]}, tokenizer) == ["user:xassistant⟦:) on⟧"]
    tokenizer = tokenizer_with(templates.CHATML, trims=True)
    (said,) = written({"messages": [SYSTEM, user("é€"), assistant("\n\n  é€ 漢  said ")]}, tokenizer)
    assert said.endswith("<|im_start|>assistant\n⟦\n\n  é€ 漢  said <|im_end|>⟧\n") and said.startswith(
        "<|im_start|>system\nbe kind"
    )
    (said,) = written({"messages": [user("hi"), assistant("\nhello")]}, tokenizer_with(templates.LLAMA3))
    assert said.endswith("assistant<|end_header_id|>\n\n⟦hello<|eot_id|>⟧")


def test_tools():
    """Schemas stand before the chat; calls are said by the assistant, results are not; nulls of columns say nothing."""
    schema = {"type": "function", "function": {"name": "look", "parameters": {"where": None, "what": "sea"}}}
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "the \\"sea\\""}'}}
    messages = [
        user("hi") | {"tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "stones", "name": "look"},
        assistant("the river") | {"tool_calls": []},
    ]
    wanted = (
        '<|im_start|>system\n# Tools\n{"type": "function", "function": {"name": "look", "parameters": {"what": "sea"}}}'
        "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        '⟦\n<tool_call>\n{"name": "look", "arguments": {"at": "the \\"sea\\""}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\nstones\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "⟦the river<|im_end|>⟧\n"
    )
    tokenizer = tokenizer_with(templates.QWEN2)
    for tools in ([schema], json.dumps([schema]).replace(' "where": null,', "")):
        assert written({"messages": messages, "tools": tools}, tokenizer) == [wanted]


def test_thoughts():
    """Those of the last answer are said; an earlier answer has its own where it was said, in a document of its own."""
    thought = [
        user("hi"),
        assistant("<think>\nso\n</think>\n\nhello"),
        user("on"),
        assistant("end", reasoning_content="why"),
    ]
    last, first = written({"messages": thought}, tokenizer_with(templates.QWEN3))
    assert last.endswith(
        "assistant\nhello<|im_end|>\n<|im_start|>user\non<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nwhy\n</think>\n\nend<|im_end|>⟧\n"
    )
    assert first == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦<think>\nso\n</think>\n\nhello<|im_end|>⟧\n"
    marked = tokenizer_with(
        templates.QWEN3.replace("{{ said +", "{% generation %}{{ said +").replace(
            "'<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m",
            "'<|im_end|>\n' }}{% endgeneration %}{% else %}{{ '<|im_start|>' + m",
        )
    )
    assert written({"messages": thought}, marked) == [last, first]  # its markers leave thoughts out


def test_prompts_and_completions():
    plain = {"prompt": "hi there", "completion": " hello  world"}
    assert written(plain, tokenizer_with(None)) == ["hi there⟦ hello  world⟧"]
    assert written(plain, tokenizer_with(None, bos=True)) == ["<s>hi there⟦ hello  world⟧"]
    assert written(plain | {"text": "x"}, tokenizer_with(None), column="prompt+completion") == ["hi there⟦ hello  world⟧"]
    (document,) = chat_documents([row(plain)], tokenizer_with(None))[0]
    assert document.unended and document.row == 7  # what ends the document ends the completion
    tokenizer = tokenizer_with(templates.CHATML)
    (document,) = chat_documents([row({"messages": TWO})], tokenizer)[0]
    assert not document.unended
    (said,) = written({"prompt": TWO[:3], "completion": TWO[3:]}, tokenizer)
    assert said.count("⟦") == 1 and said.endswith(
        "hello world<|im_end|>\n<|im_start|>user\nmore?<|im_end|>\n<|im_start|>assistant\n⟦the end<|im_end|>⟧\n"
    )
    whole = chat_documents([row({"messages": TWO}, train_on="all")], tokenizer)[0][0]
    assert tokenizer.decode(whole) == ONE["CHATML"][0].replace("⟦", "").replace("⟧", "")


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        (
            {"messages": [{"from": "human", "value": "hi"}]},
            "CHATML",
            'message 1 of messages has no role, but from, value; write {"role"',
        ),
        (
            {"messages": [{"role": "human", "content": "hi"}]},
            "CHATML",
            "message 1 of messages has the unknown role 'human'; write 'user'",
        ),
        ({"messages": [{"role": "asistant", "content": "hi"}]}, "CHATML", "did you mean 'assistant'"),
        ({"messages": []}, "CHATML", "messages holds no message; leave the row out"),
        ({"messages": ["hi"]}, "CHATML", "message 1 of messages is 'hi', not a message"),
        ({"messages": "hi"}, "CHATML", "messages is text that is not JSON"),
        (
            {"messages": [user("hi")]},
            "CHATML",
            "no turn of messages is the assistant's; leave the row out, or set train_on: all",
        ),
        (
            {"messages": [user("hi"), assistant(" \n")]},
            "CHATML",
            "message 2 of messages is the assistant's, and empty; leave the row out",
        ),
        (
            {"messages": [user("hi"), assistant(None)]},
            "CHATML",
            "message 2 of messages has the content None, which is not text",
        ),
        (
            {"messages": [user([{"type": "image", "url": "x"}]), assistant("a")]},
            "CHATML",
            "message 1 of messages holds 'image', which is not text",
        ),
        (
            {"messages": [user("hi"), assistant("", tool_calls=[{"name": 1}])]},
            "QWEN2",
            "message 2 of messages has the tool call",
        ),
        ({"messages": TWO, "tools": ["x"]}, "QWEN2", "tools is ['x']; it should be a list of JSON schemas"),
        (
            {"messages": TWO, "chat_template_kwargs": {"tokenize": True}},
            "QWEN2",
            "chat_template_kwargs is {'tokenize': True}",
        ),
        ({"prompt": "hi", "completion": " "}, "CHATML", "completion is empty; leave the row out"),
        ({"prompt": "hi", "completion": TWO[1:2]}, "CHATML", "both should be text, or both lists of messages"),
        ({"prompt": TWO[:1], "completion": TWO[2:3]}, "CHATML", "no turn of completion is the assistant's"),
        ({"messages": TWO}, None, "has no chat template to write messages with; name a teacher that has one"),
        ({"messages": [SYSTEM, *TWO]}, "GEMMA", "refuses it: System role not supported; change the row's turns"),
        ({"messages": [user("a"), *TWO]}, "MISTRAL", "refuses it: Conversation roles must alternate"),
        ({"messages": TWO[1:]}, "CHATML", "cannot open the assistant's turn with nothing before it; begin with the user's"),
        ({"messages": TWO}, "THINKS", "does not begin the assistant's turn (message 2) with its generation prompt"),
        (
            {"messages": [user("hi"), assistant("hello", reasoning_content="so")]},
            "CHATML",
            "does not write all of the assistant's turn (message 2): 'so'",
        ),
        (
            {"messages": [user("hi"), assistant("", tool_calls=[{"name": "look"}])]},
            "CHATML",
            "message 2): 'look' is missing",
        ),
    ],
)
def test_what_is_refused(record, template, message):
    tokenizer = tokenizer_with(template and getattr(templates, template))
    with pytest.raises(UserError) as error:
        written(record, tokenizer)
    assert str(error.value).startswith("data.train.0: 'f.jsonl', line 7") and message in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_a_template_that_never_ends_names_the_row(monkeypatch):
    monkeypatch.setattr("distill.chat.SECONDS", 1)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    bad = "{% if messages[0]['content'] == 'bad' %}" + endless + "{% endif %}" + templates.CHATML
    good, wrong = row({"messages": TWO}), row({"messages": [user("bad"), assistant("x")]})
    with pytest.raises(
        UserError, match="line 7: the chat template of the teacher's tokenizer did not end within 1 seconds; leave the row"
    ):
        chat_documents([good, wrong], tokenizer_with(bad))


def test_other_text_stays_text():
    """A text column wins; what holds lists is not text unless its entries are messages."""
    assert type(row({"text": "hi", "messages": TWO})) is str
    assert row({"text": None}) is None
    assert columns_of("text", {"body": 1}) == [] and columns_of("prompt+completion", {"prompt": 1}) == []
    assert columns_of("text", {"prompt": 1, "completion": 2, "tools": 3}) == ["prompt", "completion", "tools"]
    with pytest.raises(UserError, match="the column 'text' holds list, not text"):
        row({"text": ["a"]})
    with pytest.raises(UserError, match=r"train_on is completions, but .* holds text, which has no completions"):
        row({"text": "a"}, train_on="completions")
    assert written({"talk": TWO}, tokenizer_with(templates.GEMMA), column="talk") == ONE["GEMMA"]
