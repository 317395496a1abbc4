"""`distill generate`: a student goes on with a text, word by word."""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOBase
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from transformers import AutoTokenizer, BatchEncoding, TextStreamer

from distill.console import new_console
from distill.errors import UserError
from distill.loading import load_student
from distill.memory import enough_memory
from distill.text import encoding
from students.decoding import GraphError
from students.generation import replayed
from students.prompts import watched

SOON = 1.0  # seconds that a prompt may take before a bar shows how far it is


def generated(
    target: Path,
    prompt: str,
    *,
    tokens: int,
    chat: bool,
    temperature: float,
    graphs: bool,
    stream: TextIOBase | None,
    chunk: int | None,
) -> str:
    """What a student says; see `distill.generate`."""
    path = target / "student" if (target / "recipe.yaml").is_file() else target
    if not path.exists():
        raise UserError(f"{target} has no finished student; is it a run folder, and is the run over?")
    if tokens < 1:
        raise UserError(f"--tokens is {tokens}; ask for 1 or more")
    if chunk is not None and chunk < 1:
        raise UserError(f"--prefill-chunk is {chunk}; ask for 1 or more tokens at a time")
    if temperature < 0:
        raise UserError(f"--temperature is {temperature:g}; it is 0 (the likeliest token) or more")
    with enough_memory(f"generating with {path}", f"--tokens (now {tokens}), --prefill-chunk or the length of the prompt"):
        student = load_student(path).to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = _tokenizer(path)
        inputs = _encode(tokenizer, prompt, chat, path).to(student.device)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        streamer = None if stream is None else Streamer(stream, tokenizer, skip_prompt=chat, skip_special_tokens=True)
        if graphs and student.device.type == "cuda":  # transformers hands its streamer to no function of others
            sampling["custom_generate"] = functools.partial(replayed, streamer=streamer)
        try:
            with prompt_bar():
                out = student.generate(
                    **inputs,
                    max_new_tokens=tokens,
                    streamer=streamer,
                    pad_token_id=tokenizer.pad_token_id,
                    prefill_chunk_size=chunk,
                    **sampling,
                )
        except GraphError as error:
            raise UserError(f"{error}: --no-graphs") from error
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@contextmanager
def prompt_bar() -> Iterator[None]:
    """Inside the block a terminal shows how far a prompt is that takes seconds; nothing is written elsewhere."""
    console, began, bars = new_console(stderr=True), time.monotonic(), []
    if not console.is_terminal:
        yield
        return

    def tell(done: int, total: int) -> None:
        if not bars and done < total and time.monotonic() - began > SOON:
            columns = ("prompt", BarColumn(), MofNCompleteColumn(), "tokens", TimeRemainingColumn())
            bars.append(Progress(*columns, console=console, transient=True))
            bars[0].add_task("prompt", total=total)
            bars[0].start()
        for bar in bars:
            bar.update(bar.task_ids[0], completed=done, refresh=True)
            if done == total:
                bar.stop()

    try:
        with watched(tell):
            yield
    finally:
        for bar in bars:
            bar.stop()


class Streamer(TextStreamer):
    """Writes text to a stream as soon as its words are whole."""

    def __init__(self, stream: TextIOBase, tokenizer, **options) -> None:
        super().__init__(tokenizer, **options)
        self.stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.stream.write(text + ("\n" if stream_end else ""))
        self.stream.flush()


def _tokenizer(path: Path):
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # what transformers raises on damaged files is of every type
        said = " ".join(str(error).split())
        raise UserError(
            f"the tokenizer in {path} cannot be loaded: {said}; copy the teacher's tokenizer files there"
        ) from error


def _encode(tokenizer, prompt: str, chat: bool, path: Path):
    """The prompt's tokens, in the chat template where asked for."""
    if chat and tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {path} has no chat template; leave out --chat")
    if chat:
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if chat else encoding.prompt(tokenizer, prompt)
    if not ids:
        raise UserError(f"the prompt {prompt!r} holds no token to go on from; give it a word")
    return BatchEncoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tensor_type="pt")
