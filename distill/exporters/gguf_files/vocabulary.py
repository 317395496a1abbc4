"""A tokenizer as the entries of a GGUF file. A tokenizer that llama.cpp would not reproduce is refused, with the reason.

llama.cpp selects the way in which a byte-level vocabulary splits text by a name. The name is found by the tokenizer's own
regular expressions (`teachers.gguf_vocabulary` has the names). A tokenizer with other expressions, or with parts that
llama.cpp lacks, is refused. Two differences are accepted, which most texts do not meet. llama.cpp does not compose
characters (NFC), which Qwen's tokenizers do. llama.cpp adds a space before a text that begins with one, which some
SentencePiece tokenizers (Metaspace) do not.
"""

import json
from typing import TYPE_CHECKING, Any

from distill.exporters.gguf_files.architecture import Entry
from teachers.gguf_vocabulary import GPT2, VOCABULARIES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # their names in GGUF entries
# End-of-turn tokens, the surest first. Without an entry llama.cpp would take any that its unordered table has first.
TURNS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|end_of_text|>", "<|endoftext|>")
SPACE = "▁"


def vocabulary(tokenizer: "PreTrainedTokenizerBase", size: int, ends: list[int]) -> dict[str, Any]:
    """Return the entries of a tokenizer.

    Args:
        size: rows of the model's embedding. ends: ids of the tokens that end a generation.

    Raises:
        ValueError: the tokenizer has more tokens than the embedding has rows, or does something that llama.cpp does not.
    """
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    model = said["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its tokenizer is of type {model['type']}, but GGUF files are written for BPE only")
    tokens, kinds = _tokens(said, size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        found = _pieces(said, tokens, kinds, [merge.split(" ", 1) for merge in merges])
    else:
        found = {"model": "gpt2", "pre": _named(said), "merges": merges}
    found |= {"tokens": tokens, "token_type": kinds}
    return {f"tokenizer.ggml.{name}": value for name, value in (found | _special(tokenizer, tokens, ends)).items()} | (
        _templates(tokenizer)
    )


def _tokens(said: dict, size: int) -> tuple[list[str], list[int]]:
    """Return the text and type of every row of the embedding."""
    added = {token["id"]: token for token in said["added_tokens"]}
    known = {index: text for text, index in said["model"]["vocab"].items()}
    known |= {index: token["content"] for index, token in added.items()}
    if max(known) >= size:
        raise ValueError(f"its tokenizer has a token of id {max(known)}, but its embedding has only {size} rows")
    odd = [token["content"] for token in added.values() if token["lstrip"] or token["rstrip"] or token["single_word"]]
    if odd:
        raise ValueError(f"its token {odd[0]!r} strips spaces or matches whole words only, which llama.cpp does not do")
    tokens = [known.get(index, f"[PAD{index}]") for index in range(size)]
    kinds = [NORMAL if index in known else UNUSED for index in range(size)]
    for index, token in added.items():
        kinds[index] = CONTROL if token["special"] else USER_DEFINED
    return tokens, kinds


def _named(said: dict) -> str:
    """Return llama.cpp's name for the way in which a byte-level tokenizer splits text.

    Raises:
        ValueError: llama.cpp has no name for it.
    """
    splits, whole = _splits(said["pre_tokenizer"]), bool(said["model"].get("ignore_merges"))
    composed = _composed(said["normalizer"])
    for prefer in (composed, False):
        for name, row in VOCABULARIES.items():
            if (row.splits, row.whole_words, row.composed) == (splits, whole, prefer):
                return name
    if other := next((name for name, row in VOCABULARIES.items() if row.splits == splits), None):
        raise ValueError(
            f"its tokenizer splits text like {other!r} but takes whole words {'before' if whole else 'only by'} the merges, "
            "which llama.cpp has no name for"
        )
    raise ValueError(f"llama.cpp has no name for how its tokenizer splits text: {' then '.join(splits)}")


def _composed(normalizer: dict | None) -> bool:
    kinds = [] if normalizer is None else [part["type"] for part in normalizer.get("normalizers", [normalizer])]
    if set(kinds) - {"NFC"}:
        raise ValueError(f"its tokenizer rewrites text first ({', '.join(kinds)}), which llama.cpp does not do")
    return bool(kinds)


def _splits(cutter: dict | None) -> tuple[str, ...]:
    """Return the regular expressions that split text, in their order."""
    parts = [] if cutter is None else cutter.get("pretokenizers", [cutter])
    found, spelled = [], False
    for part in parts:
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"] and "Regex" in part["pattern"]:
            found.append(part["pattern"]["Regex"])
        elif part["type"] == "Digits" and part["individual_digits"]:
            found.append(r"\p{N}")
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            found += [GPT2] if part["use_regex"] else []
            spelled = True
        else:
            raise ValueError(f"its tokenizer splits text by {part['type']} in a way that llama.cpp has no name for")
    if not spelled:
        raise ValueError("its tokenizer neither encodes text as bytes nor has tokens for single bytes")
    return tuple(found)


def _pieces(said: dict, tokens: list[str], kinds: list[int], merges: list[list[str]]) -> dict[str, Any]:
    """Return the entries of a SentencePiece vocabulary.

    llama.cpp merges the pair whose result has the highest score first, so the scores follow the order of the merges.

    Raises:
        ValueError: no scores give the order of the merges, or text is prepared otherwise than by one space before it.
    """
    order: dict[str, int] = {}
    for left, right in merges:
        made = left + right
        if order.setdefault(made, len(order)) != len(order) - 1:
            raise ValueError(f"the merges of its tokenizer that make {made!r} are not consecutive, as scores require")
    for index, token in enumerate(tokens):
        if kinds[index] == NORMAL and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kinds[index] = BYTE
    if (unknown := said["model"].get("unk_token")) is not None:
        kinds[tokens.index(unknown)] = UNKNOWN
    scores = [-float(order.get(token, len(order))) for token in tokens]
    prefix = _prefixed(said)
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}


def _prefixed(said: dict) -> bool:
    """Whether the tokenizer adds a space before text."""
    normalizer, cutter = said["normalizer"], said["pre_tokenizer"]
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    spaces = [part for part in parts if part["type"] == "Replace" and part["pattern"] == {"String": " "}]
    if cutter is None and parts and len(spaces) == 1 and spaces[0]["content"] == SPACE:
        rest = [part for part in parts if part not in spaces]
        if not rest:
            return False
        if rest == [{"type": "Prepend", "prepend": SPACE}]:
            return True
    if not parts and cutter and cutter["type"] == "Metaspace" and cutter["replacement"] == SPACE and not cutter["split"]:
        return cutter["prepend_scheme"] != "never"
    raise ValueError("its tokenizer prepares text in a way that llama.cpp's SentencePiece does not")


def _special(tokenizer: "PreTrainedTokenizerBase", tokens: list[str], ends: list[int]) -> dict[str, Entry]:
    """Return the ids of the special tokens, and which of them are added around every text."""
    found: dict[str, Entry] = {}
    for name, spelled in SPECIAL.items():
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            found[f"{spelled}_token_id"] = index
    if "eos_token_id" not in found and ends:
        found["eos_token_id"] = ends[0]
    template = json.dumps(tokenizer.chat_template or "", ensure_ascii=False)
    spoken = [turn for turn in TURNS if turn in tokens and (turn in template or tokens.index(turn) in ends)]
    if spoken:
        found["eot_token_id"] = tokens.index(spoken[0])
    if "<|eom_id|>" in tokens:
        found["eom_token_id"] = tokens.index("<|eom_id|>")
    inside = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a", add_special_tokens=True)
    at = next((at for at in range(len(whole)) if whole[at : at + len(inside)] == inside), len(whole))
    before, after = whole[:at], whole[at + len(inside) :]
    for name, around in (("bos", before), ("eos", after)):
        if around not in ([], [found.get(f"{name}_token_id")]):
            raise ValueError(f"its tokenizer puts the tokens {around} around text, but llama.cpp only the {name} token")
        found[f"add_{name}_token"] = bool(around)
    return found


def _templates(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str | list[str]]:
    template = tokenizer.chat_template
    if not template:
        return {}
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
    usual = {"tokenizer.chat_template": template["default"]} if "default" in template else {}
    return usual | named | {"tokenizer.chat_templates": [name for name in template if name != "default"]}
