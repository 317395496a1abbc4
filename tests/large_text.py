"""Prepares a large text, made from the shipped one: measures speed and memory, and checks that the number of processes
does not change the hash. `python -m tests.large_text --tokens 200M --processes 16`; needs no network and no teacher. With
--chats the text is chats in ChatML, and the share of padding in their windows is measured too.

Exits with 1 where the writing process takes more than --most MiB in all.
"""

import argparse
import json
import lzma
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distill.recipe import TextSource
from distill.schema import count
from distill.shipped import shipped_folder
from distill.text.preparation import Tokenising, prepare
from distill.text.prepared import load
from distill.text.tokenising import usable_cores
from distill.text.windows import Windows

VOCABULARY = 16_384
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROOM = (512, 2048, 8192)  # tokens of windows
SHORTEST, LONGEST = 300, 9_000  # characters of a made-up document


def shipped_texts() -> list[str]:
    """The shipped training text."""
    with lzma.open(shipped_folder() / "text" / "train.jsonl.xz", "rt") as file:
        return [json.loads(line)["text"] for line in file]


def trained(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of the text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", chat_template=CHATML)


def made_up(texts: list[str], characters: int) -> Iterator[str]:
    """Pieces of the text in an order that chance gives, so many characters in all."""
    chance, made = random.Random(1), 0
    texts = [text for text in texts if len(text) > 2 * SHORTEST]
    while made < characters:
        text, length = chance.choice(texts), chance.randint(SHORTEST, LONGEST)
        begin = chance.randrange(max(1, len(text) - length))
        yield text[begin : begin + length]
        made += min(length, len(text) - begin)


def as_chat(text: str) -> dict:
    """A text as a chat: what stands before a third of it is asked, and what follows said, in up to three turns."""
    turns = 1 + len(text) % 3
    size = -(-len(text) // turns)
    messages = []
    for begin in range(0, len(text), size):
        asked, said = text[begin : begin + size // 3], text[begin + size // 3 : begin + size]
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said or "yes"}]
    return {"messages": [message if message["content"].strip() else message | {"content": "so"} for message in messages]}


def most() -> float:
    """MiB that this process has taken at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cpu(*whose: int) -> float:
    """Seconds that cores worked for this process, and for those that it began and that ended."""
    used = [resource.getrusage(who) for who in whose]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=count, default=200_000_000)
    parser.add_argument("--processes", type=int, default=usable_cores())
    parser.add_argument("--chats", action="store_true")
    parser.add_argument("--most", type=float, default=1536.0, help="MiB")
    asked = parser.parse_args()
    texts = shipped_texts()
    tokenizer = trained(texts)
    sample = texts[:20]
    each = sum(map(len, sample)) / sum(len(ids) for ids in tokenizer(sample)["input_ids"])
    with tempfile.TemporaryDirectory(prefix="distill-") as place:
        os.environ["DISTILL_CACHE"] = place
        file = Path(place) / "text.jsonl"
        with file.open("w") as opened:
            for text in made_up(texts, int(asked.tokens * each)):
                opened.write(json.dumps(as_chat(text) if asked.chats else {"text": text}) + "\n")
        size, before, began = file.stat().st_size, most(), time.monotonic()
        worked, own = cpu(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN), cpu(resource.RUSAGE_SELF)
        options = {"separator": None, "seed": 0, "limit": None, "where": "text", "how": Tokenising(asked.processes)}
        text = load(prepare([TextSource(path=str(file))], tokenizer, **options))
        seconds, after = time.monotonic() - began, most()
        worked = cpu(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN) - worked
        own = cpu(resource.RUSAGE_SELF) - own
        made = f"{text.tokens:,} tokens of {text.meta.documents:,} documents ({size / 1e6:,.0f} MB)"
        speed = f"{text.tokens / seconds:,.0f} tokens/s"
        cores = f"{text.tokens / worked:,.0f} a second of one core, {text.tokens / own:,.0f} of the first process"
        print(f"{made} in {len(text.shards)} shards by {asked.processes} processes: {seconds:,.0f} s, {speed} ({cores})")
        if asked.chats:
            windows = [Windows(text.folder, length, None) for length in ROOM]
            first = [one.batch(0, min(64, one.count)) for one in windows]
            room = ", ".join(f"{(one.labels < 0).float().mean():.1%} of {one.ids.shape[1]}" for one in first)
            print(f"{text.trained / text.tokens:.1%} of the tokens are trained on; room in the first windows: {room}")
            print("; ".join(one.fitted or "none is longer" for one in windows))
        print(f"{before:,.0f} MiB before, {after:,.0f} MiB at most; sha256 {text.meta.sha256[:16]}")
    return int(after > asked.most)


if __name__ == "__main__":
    sys.exit(main())
