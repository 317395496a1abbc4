"""llama.cpp's own tokenizer as a judge, files for it that are little more than a vocabulary, and texts hard to cut."""

import http.client
import json
import random
from urllib.parse import urlsplit

import gguf
import numpy as np

from tests.teachers.gguf_files import add_flags

WORDS = r"""
a the ab Hello WORLD iPhone x1 3d naive deinem def return self.x __init__ 0 1 12 123 1234 2026 3.14 1,000,000 0x1F 007 1e-9
's 'S 't 're 'RE 've 'Ve 'm 'll 'LL 'd 'D 'x ' '' can't I'M . , ... !? ( ) {} [0] == != -> / // /* # $x += ~ ` ^ | < > _ % &
@ \ " 中文 日本語 カタカナ ひらがな 한국어 ไทย हिन्दी العربية ٣٤ עברית Русский Ωμέγα ÉCOLE straße 😀 🇩🇪 ❤️ é ² ½ Ⅷ ① ǅ ʰ ﬁ € ©
"""
ODD = [
    *[
        "\u2019s",
        "👩\u200d👩\u200d👧",
        "e\u0301",
        "a\u0308\u0304",
        "\u0301",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\u00ad",
        "\x00",
        "\x7f",
    ],
    *[
        "\u0378",
        "\U0001d4b3",
        "\U00010400",
        " ",
        "  ",
        "   ",
        "    ",
        "\t",
        "\t\t",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        " \n",
        "\n ",
        "\v",
    ],
    *["\u00a0", "\u3000", "\u2028", "\x85", "\n\n5", "a  5", "for i in range(10):\n    x[i] += 1\n", "/usr/bin/env\n"],
    *["SELECT * FROM t WHERE id=42;", "https://a.b/c?d=1&e=2"],
]
PARTS = [*WORDS.split(), *ODD]  # every text below is a row of these: what tokenizers cut between, by and around


def texts(count, seed=20261123):
    """Texts of one to twelve random parts."""
    chance = random.Random(seed)
    return PARTS + ["".join(chance.choices(PARTS, k=chance.randint(1, 12))) for _ in range(count - len(PARTS))]


def trained(entries=4000):
    """Tokens and merges of byte pairs merged over everything, spaces, digits and words alike: each cut shows in the ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=entries, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts(6000, seed=1), trainer)
    found = json.loads(raw.to_str())["model"]
    return sorted(found["vocab"], key=found["vocab"].get), [" ".join(pair) for pair in found["merges"]]


def write_vocabulary(path, tokens, merges, pre, flags=None, architecture="llama"):
    """A file of one tiny layer around a byte-level vocabulary.

    Args:
        pre: its name, None to leave it out. flags: further entries, named without `tokenizer.ggml.`.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_merges(merges)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    return _finish(writer, path, tokens, flags)


def write_pieces(path, flags=None):
    """A file of one tiny layer around a SentencePiece vocabulary whose every merge is of two entries."""
    words = ["▁", "▁▁", "a", "b", "ab", "▁ab", "1", "2", "12", "▁1", "▁a", "ba", "▁▁a"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(index) for index in range(len(tokens))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * len(words)])
    return _finish(writer, path, tokens, flags)


def trained_pieces(entries=1500):
    """Pieces of a SentencePiece vocabulary merged over everything, and their scores: the earlier, the higher."""
    from tokenizers import Tokenizer, models, trainers

    raw = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=entries, show_progress=False)
    spelled = (text.replace(" ", "▁").replace("\x00", "") for text in texts(6000, seed=1))  # NUL ends llama.cpp's tokens
    raw.train_from_iterator(spelled, trainer)
    vocabulary = json.loads(raw.to_str())["model"]["vocab"]
    characters = [piece for piece in vocabulary if len(piece) == 1]
    merged = [piece for piece in sorted(vocabulary, key=vocabulary.get) if len(piece) > 1]
    return [*merged, *characters], [-float(index) for index in range(len(vocabulary))]


def write_trained_pieces(path, pieces, scores, marks, name=None, flags=None, architecture="llama"):
    """A file of one tiny layer around a SentencePiece vocabulary.

    Args:
        marks: (text, type) of further tokens. name: of the model, by which llama.cpp knows Phi-3's.
    """
    pieces = [piece for piece in pieces if piece not in dict(marks)]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    first = ["<unk>", "<s>", "</s>", *bytes_, *(text for text, _ in marks)]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    if name is not None:
        writer.add_name(name)
    writer.add_token_scores([0.0] * len(first) + scores[: len(pieces)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *(kind for _, kind in marks), *[1] * len(pieces)])
    return _finish(writer, path, [*first, *pieces], flags)


def _finish(writer, path, tokens, flags):
    width = 32
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 2)
    writer.add_token_list(tokens)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    add_flags(writer, {f"tokenizer.ggml.{name}": value for name, value in (flags or {}).items()})
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), width), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(width, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones((width, width), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class LlamaCpp:
    """A file's tokenizer as llama.cpp has it, behind the server that xllamacpp starts on this machine."""

    def __init__(self, path):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 64, 1, 0
        settings.port, settings.verbosity, settings.warmup, settings.fit_params = 0, -1, False, False
        self._server = xllamacpp.Server(settings)
        self._line = http.client.HTTPConnection(urlsplit(self._server.listening_address).netloc)

    def ids(self, text, whole=False):
        """The ids of a text. whole: with what the file puts around it."""
        self._line.request("POST", "/tokenize", json.dumps({"content": text, "add_special": whole}))
        return json.loads(self._line.getresponse().read())["tokens"]
