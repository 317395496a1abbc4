"""The students of the export matrix: one trained for some steps, and a random one of every row that containers hold."""

import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from distill.shipped import shipped_folder
from tests.distill.random_students import saved, student_of

M, GDN = {"mixer": "mamba2"}, {"mixer": "gated_deltanet"}
LITE = {"P": {"mixer": "parallel_heads", "norm": False, "ssm": M}}
LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.21, "logits_scaling": 1.7}
# Heads of 32 channels and more: attention on a CPU has no kernels for narrower ones in vLLM.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Row:
    """A random student: family, pattern, mixers, and entries of the teacher's config."""

    family: str
    pattern: str
    mixers: dict
    entries: dict = field(default_factory=dict)

    def make(self, folder: Path) -> Path:
        """The folder of the student, with its tokenizer."""
        tokenizer = small_tokenizer(self.family)
        sizes = SIZES | {"vocab_size": len(tokenizer)} | self.entries
        return saved(student_of(self.family, self.pattern, self.mixers, **sizes), folder, tokenizer)


ROWS = {
    "SmolLM2/Llama, tied, stock Mamba-2": Row("llama", "AMMM", {"M": M}, {"tie_word_embeddings": True}),
    "Llama, untied, one norm group": Row("llama", "AMMM", {"M": M | {"n_groups": 1}}),
    "Llama 3's rope scaling": Row("llama", "AMMM", {"M": M}, {"rope_parameters": LLAMA3}),
    "Llama, expand 1": Row("llama", "MMAM", {"M": M | {"expand": 1}}),
    "Llama, heads of their own width": Row("llama", "AMMM", {"M": M}, {"head_dim": 64}),
    "Llama, heads of their own width, expand 1": Row("llama", "AMMM", {"M": M | {"expand": 1}}, {"head_dim": 64}),
    "Mistral": Row("mistral", "AMMM", {"M": M}, {"sliding_window": None}),
    "Qwen2 (biases)": Row("qwen2", "AMMM", {"M": M}, {"tie_word_embeddings": True}),
    "Granite (multipliers)": Row("granite", "AMMM", {"M": M}, GRANITE),
    "Zamba (shared attention, untied)": Row("llama", "MSMS", {"M": M, "S": {"mixer": "shared_attention", "rank": 3}}),
    "Mixtral": Row("mixtral", "AMMM", {"M": M}, EXPERTS),
    "Qwen3, gated DeltaNet, MMMA": Row("qwen3", "MMMA", {"M": GDN}, {"head_dim": 64}),
    "Qwen3, gated DeltaNet, AMMM": Row("qwen3", "AMMM", {"M": GDN}, {"head_dim": 64}),
    "Hymba-lite": Row("llama", "P", LITE),
    "Llama, discrete Mamba-2": Row("llama", "AMMM", {"M": {"mixer": "discrete_mamba2"}}),
}


def small_tokenizer(family):
    """A byte-pair tokenizer of 512 entries, trained on shipped text, that splits text as GPT-2's does; as Qwen2's does for
    families whose classes bring that along."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if family.startswith("qwen"):
        from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

        split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
        raw.normalizer = normalizers.NFC()
        raw.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with lzma.open(shipped_folder() / "text" / "train.jsonl.xz", "rt", encoding="utf-8") as file:
        raw.train_from_iterator([json.loads(line)["text"] for line, _ in zip(file, range(40), strict=False)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")


def trained(runs: Path) -> Path:
    """The folder of a SmolLM2 student with stock Mamba-2 in 22 of 30 layers, trained for some steps; takes minutes."""
    import distill
    from distill.recipe_file import load

    changes = [
        "name=smollm2-135m_stock",
        "mixers={M: {mixer: mamba2}}",
        "data.seq_len=128",
        "stages=[{initialise: {tokens: 1k}}, {align: {tokens: 2k, lr: 2e-3}}, {imitate: {tokens: 1k, lr: 1e-4}}]",
        "evaluation={tokens: 256, documents: 2, seq_len: 64, probe_tokens: 64, passkey: []}",
        "twin=false",
    ]
    return distill.run(load("quickstart", changes), runs=runs).path / "student"


def students(trained_too: bool) -> dict[str, Callable[[Path], Path]]:
    """What makes each student of the matrix in a folder, by name; the trained one first."""
    found = {name: row.make for name, row in ROWS.items()}
    if not trained_too:
        return found
    return {"SmolLM2-135M, stock Mamba-2, trained": trained} | found
