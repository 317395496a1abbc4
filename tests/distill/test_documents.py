"""Where documents begin and end: exactly one beginning of text, and a new document after every end of text."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import processors
from transformers import PretrainedConfig

from distill.evaluation.tasks import marked
from distill.generation import _encode
from distill.recipe import TextSource
from distill.text.encoding import Documents, opened, opening
from distill.text.preparation import prepare
from distill.text.windows import Windows
from teachers.teacher import Teacher

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
REFUSING = "{{ raise_exception('no roles but mine') }}"


@pytest.fixture
def make(tokenizer):
    """Makes a tokenizer that opens texts with <s>, if it shall, and ends them with `eos`."""

    def make(eos="</s>", begins=True, ends=False, template=None):
        made = copy.deepcopy(tokenizer)
        made.add_special_tokens({"bos_token": "<s>", "eos_token": eos})
        made.add_tokens(["<|im_start|>", "</s>", "<sep>"], special_tokens=True)
        around = [token for token, there in (("<s>", begins), (eos, ends)) if there]
        single = [*(["<s>"] if begins else []), "$A", *([eos] if ends else [])]
        if around:
            made.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=single, special_tokens=[(token, made.convert_tokens_to_ids(token)) for token in around]
            )
        made.chat_template = template
        return made

    return make


def documents(tokenizer, text, separator=None):
    end = tokenizer.convert_tokens_to_ids(separator or tokenizer.eos_token)
    found = Documents(tokenizer, [end, tokenizer.eos_token_id])(tokenizer(text)["input_ids"])
    return [tokenizer.decode(ids) for ids in found]


def test_opened():
    assert opened([1, 5], [1]) == [1, 5] == opened([5], [1]) == opened([1, 1, 5], [1])
    assert opened([5], []) == [5] and opened([], [1]) == [1]


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("river", ["river"]),
        ("<s>river", ["<s>river"]),
        ("river</s>", ["river</s>"]),
        ("river</s>lake", ["river</s>", "lake"]),
        ("<s>river</s><s>lake</s>", ["<s>river</s>", "<s>lake</s>"]),
        ("</s></s>river</s></s>lake", ["river</s>", "lake"]),
        ("</s>", []),
        ("<s></s>", []),
        ("a<s>b", ["a<s>b"]),
    ],
)
def test_documents_of_a_row(make, begins, ends, text, right):
    made = make(begins=begins, ends=ends)
    if begins:
        right = [found if found.startswith("<s>") else f"<s>{found}" for found in right]
    if ends and right and not right[-1].endswith("</s>"):
        right = [*right[:-1], right[-1] + "</s>"]
    assert documents(made, text) == right


def test_a_separator_cuts_too(make):
    assert documents(make(), "a</s>b<sep>c", "<sep>") == ["<s>a</s>", "<s>b<sep>", "<s>c"]
    assert documents(make(), "a<sep>b") == ["<s>a<sep>b"]


@pytest.mark.parametrize(
    ("eos", "template", "text", "right"),
    [
        ("<|im_end|>", CHATML, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n", 1),
        ("<|im_end|>", CHATML, "<|im_start|>system\nx<|im_end|>\n<|im_start|>tool\nho<|im_end|>", 1),
        ("<|im_end|>", CHATML, "one<|im_end|>two<|im_end|>\nthree", 3),
        ("<|im_end|>", None, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>", 2),
        ("</s>", LLAMA2, "<s>[INST] a [/INST] b</s><s>[INST] c [/INST] d</s>", 1),
        ("</s>", LLAMA2, "<s>one</s><s>two</s>", 2),
        ("</s>", REFUSING, "one</s>two", 2),
    ],
)
def test_a_chat_is_one_document(make, eos, template, text, right):
    assert len(documents(make(eos, begins=False, template=template), text)) == right


def test_documents_in_a_prepared_folder(make, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "<s>river</s>lake"}) + "\n" + json.dumps({"text": "sea"}) + "\n")
    made = make()
    folder = prepare([TextSource(path=str(tmp_path / "x.jsonl"))], made, separator=None, seed=0, limit=None, where="x")
    pieces = np.split(np.load(folder / "00000" / "tokens.npy"), np.load(folder / "00000" / "starts.npy")[1:])
    assert sorted(made.decode(piece) for piece in pieces) == ["<s>lake</s>", "<s>river</s>", "<s>sea</s>"]
    batch = Windows(folder, sum(map(len, pieces)) - 1, None).batch(0, 1)
    begins = (batch.positions[0] == 0).nonzero()[:, 0].tolist()
    assert len(begins) == 3 and all(batch.ids[0, place] == made.bos_token_id for place in begins)
    assert (batch.weights[0] == 0).sum() == 2  # nothing is asked across a border


def test_a_tokenizer_with_another_template_prepares_again(make, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a<|im_end|>\n<|im_start|>b"}) + "\n")
    counts = []
    for template in (None, CHATML):
        made = make("<|im_end|>", begins=False, template=template)
        folder = prepare([TextSource(path=str(tmp_path / "x.jsonl"))], made, separator=None, seed=0, limit=None, where="x")
        counts.append(len(np.load(folder / "00000" / "starts.npy")))
    assert counts == [2, 1]


def asked(tokenizer):
    """As much of a teacher as scoring reads."""
    teacher = object.__new__(Teacher)
    teacher.model, teacher.tokenizer = SimpleNamespace(config=PretrainedConfig()), tokenizer
    return teacher


def test_scoring_opens_a_context_once(make):
    made = make()
    once, twice, none = marked(asked(made), [("river", " lake"), ("<s>river", " lake"), ("", " lake")])
    assert once.ids == twice.ids and once.ids[0] == made.bos_token_id != once.ids[1]
    assert none.ids[0] == made.bos_token_id and opening(made) == [made.bos_token_id]


@pytest.mark.parametrize("text", ["river", "<s>river"])
def test_a_prompt_is_opened_once_and_not_ended(make, text, tmp_path):
    made = make(ends=True)
    assert made.decode(_encode(made, text, False, tmp_path)["input_ids"][0]) == "<s>river"
    assert made.decode(_encode(made, "river</s>", False, tmp_path)["input_ids"][0]) in ("<s>river</s>", "<s>river</s></s>")
