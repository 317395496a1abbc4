"""Tokenizers: larger or smaller than the model, with a BOS or none, with added tokens and a chat template."""

import json

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import distill
import teachers
from distill.recipe import TextSource
from distill.recipe_file import check
from distill.text.preparation import prepare
from tests.conftest import tiny_entries
from tests.distill.test_session import unfinished

pytestmark = pytest.mark.usefixtures("own_cache")

TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<end>{% endfor %}"


def begun(tokenizer, folder):
    """The tokenizer with a BOS that begins every text, two added tokens and a chat template."""
    tokenizer.save_pretrained(folder)
    changed = AutoTokenizer.from_pretrained(folder)
    changed.add_special_tokens({"bos_token": "<begin>"})
    changed.add_tokens(["<|user|>"])
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<begin> $A", pair="<begin> $A $B", special_tokens=[("<begin>", changed.bos_token_id)]
    )
    changed.chat_template = TEMPLATE
    changed.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def chatty(tokenizer, tmp_path):
    """A teacher whose embeddings have 30 rows more than its tokenizer, which begins texts and has a chat template."""
    torch.manual_seed(2)
    folder = tmp_path / "chatty"
    tokenizer = begun(tokenizer, folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 30,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_student_and_its_export_keep_the_tokenizer(chatty, text_files, tmp_path):
    folder = unfinished(check(tiny_entries(chatty, text_files), "here"), tmp_path / "runs")
    portable = distill.export(folder.path, to="portable", out=tmp_path / "portable")
    original = AutoTokenizer.from_pretrained(chatty)
    messages = [{"role": "user", "content": "A river."}]
    for place in (folder.student, portable):
        kept = AutoTokenizer.from_pretrained(place)
        assert kept.chat_template == TEMPLATE
        assert kept.get_vocab() == original.get_vocab() and len(kept) == 322
        assert kept("The river <|user|> ran").input_ids == original("The river <|user|> ran").input_ids
        assert kept.convert_tokens_to_ids("<|user|>") == 321 in kept("<|user|>").input_ids
        assert kept.bos_token_id == kept("x").input_ids[0]
        ids = kept.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert ids == original.apply_chat_template(messages, tokenize=True, return_dict=False) and 321 in ids
    assert json.loads((folder.student / "config.json").read_text())["vocab_size"] == 352


def prepared(tokenizer, path):
    folder = prepare([TextSource(path=str(path))], tokenizer, separator=None, seed=0, limit=None, where="data.train")
    return folder, np.split(np.load(folder / "00000" / "tokens.npy"), np.load(folder / "00000" / "starts.npy")[1:])


def test_documents_begin_and_end_as_the_tokenizer_has_it(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("one text", "", "another one")))
    plain_folder, plain = prepared(tokenizer, path)
    with_bos = begun(tokenizer, tmp_path / "tokenizer")
    folder, documents = prepared(with_bos, path)
    assert len(plain) == len(documents) == 2  # a BOS alone is no document
    for without, document in zip(plain, documents, strict=True):
        assert document[0] == with_bos.bos_token_id and document[1:].tolist() == without.tolist()
        assert document.tolist().count(with_bos.eos_token_id) == 1 and document[-1] == with_bos.eos_token_id
    assert folder != plain_folder


def test_the_same_vocabulary_with_and_without_a_beginning(tokenizer, tmp_path):
    """Prepared text is kept by what the tokenizer does, not by its vocabulary alone."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "one text"}))
    one, other = begun(tokenizer, tmp_path / "one"), begun(tokenizer, tmp_path / "other")
    other.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    assert one.get_vocab() == other.get_vocab()
    (folder, documents), (other_folder, other_documents) = prepared(one, path), prepared(other, path)
    assert folder != other_folder and len(documents[0]) == len(other_documents[0]) + 1


def test_ids_past_the_embeddings(tiny_teacher, tokenizer, tmp_path):
    """A tokenizer may have fewer entries than rows and still give an id past them."""
    import shutil

    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 400
    (folder / "tokenizer.json").write_text(json.dumps(content))
    found = AutoTokenizer.from_pretrained(folder)
    assert len(found) == 320 < max(found.get_vocab().values())
    with pytest.raises(ValueError, match="the tokenizer has 401 entries, but the model embeds only 320"):
        teachers.load(str(folder))
