"""`distill generate`: text generation with a student, streamed to the terminal."""

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOBase
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import nn
from transformers import (
    BatchEncoding,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from distill.chat import render
from distill.console import new_console
from distill.errors import UserError
from distill.loading import check_student_files, load_student, load_student_tokenizer
from distill.memory import enough_memory
from distill.ranges import CHUNK, NEW_TOKENS, TEMPERATURE
from distill.stages.nonfinite import first_nonfinite
from distill.text import encoding
from students.decoding import GraphError
from students.generation import replayed
from students.prompts import watched
from students.skeleton import Student
from teachers.checks import panicked, plain
from teachers.quiet import no_panics
from teachers.teacher import positions_of

SOON = 1.0  # seconds of prefill before a progress bar is shown


def generated(
    target: Path,
    prompt: str,
    *,
    tokens: int,
    chat: bool,
    temperature: float,
    graphs: bool,
    trust_remote_code: bool,
    stream: TextIOBase | None,
    chunk: int | None,
) -> str:
    """Generate text with a student; see `distill.generate`."""
    path = target / "student" if (target / "recipe.yaml").is_file() else target
    if not path.exists():
        raise UserError(f"{target} has no finished student; name a finished run's folder or a student's folder")
    chunk = CHUNK.check(chunk, "--prefill-chunk")
    tokens, temperature = NEW_TOKENS.check(tokens, "--tokens"), TEMPERATURE.check(temperature, "--temperature")
    _check_prompt(prompt)
    with enough_memory(f"generating with {path}", f"--tokens (now {tokens}), --prefill-chunk or the length of the prompt"):
        check_student_files(path)
        tokenizer = load_student_tokenizer(path, trust_remote_code)
        inputs = _encode(tokenizer, prompt, chat, path)
        loaded: Any = load_student(path, trust_remote_code)
        student = loaded.to("cuda" if torch.cuda.is_available() else "cpu")
        _check_fit(student, tokenizer, inputs["input_ids"], tokens, path)
        inputs = inputs.to(student.device)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        )
        streamer = None if stream is None else Streamer(stream, tokenizer, skip_prompt=chat, skip_special_tokens=True)
        if graphs and student.device.type == "cuda":  # transformers does not pass its streamer to custom functions
            sampling["custom_generate"] = functools.partial(replayed, streamer=streamer)
        try:
            with prompt_bar():
                out = student.generate(
                    **inputs,
                    **sampling,
                    max_new_tokens=tokens,
                    num_beams=1,
                    streamer=streamer,
                    logits_processor=LogitsProcessorList([Finite(student, path)]),
                    pad_token_id=tokenizer.pad_token_id,
                    tokenizer=tokenizer,  # for stop strings among the student's settings
                    trust_remote_code=False,
                    prefill_chunk_size=chunk,
                )
        except GraphError as error:
            raise UserError(f"{error}: --no-graphs") from error
        except (ValueError, TypeError) as error:  # settings of generation_config.json that contradict each other
            said = plain(str(error)) if isinstance(error, ValueError) else "a setting has the wrong type"
            raise UserError(f"{path} cannot generate: {said}; look at its generation_config.json") from error
    return cast(str, tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@contextmanager
def prompt_bar() -> Iterator[None]:
    """Inside the block, show a progress bar on a terminal for a prompt that takes seconds. Prints nothing elsewhere."""
    console, began = new_console(stderr=True), time.monotonic()
    bars: list[Progress] = []
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
    """A streamer that writes text to a stream as soon as its words are complete."""

    def __init__(self, stream: TextIOBase, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        super().__init__(cast(Any, tokenizer), **options)
        self.stream = stream

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        coding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(text.encode(coding, errors="replace").decode(coding) + ("\n" if stream_end else ""))
        self.stream.flush()


class Finite(LogitsProcessor):
    """A logits processor that stops generation with an error if the logits are not finite."""

    def __init__(self, student: Student, path: Path) -> None:
        self.student, self.path = student, path

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not bool(scores.amax(-1).isfinite().all()):  # minus infinity rules out single tokens and is allowed
            forward = functools.partial(self.student, input_ids, use_cache=False)
            place = first_nonfinite(self.student, forward, self.student.place.layers) or "the output head"
            raise UserError(
                f"{self.path} gives logits that are not finite (NaN or infinite); the first such output is that of {place}: "
                "its weights are damaged, or its training diverged"
            )
        return scores


def _check_prompt(prompt: str) -> None:
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not UTF-8 at character {error.start + 1}; give it as UTF-8 text") from error


def _check_fit(student: Student, tokenizer, ids: torch.Tensor, tokens: int, path: Path) -> None:
    """Refuse tokens that a student has no embedding for, and, if it keeps attention, more tokens than it has positions."""
    embedded = cast(nn.Embedding, student.get_input_embeddings()).num_embeddings
    last = max(int(ids.max()), max(tokenizer.get_vocab().values(), default=0))
    if last >= embedded:
        raise UserError(
            f"the tokenizer in {path} has the token {last}, but the student embeds only {embedded}; copy the teacher's "
            "tokenizer files there"
        )
    whole = len(student.layout.converted) == len(student.layout.pattern) and not hasattr(student.config, "n_positions")
    room = None if whole else positions_of(student.config)
    if room is None:
        return
    room, given = room - student.layout.meta_tokens, ids.shape[1]
    if given >= room:
        raise UserError(f"the prompt is {given:,} tokens, but {path} has positions for {room:,}; give it a shorter one")
    if given + tokens > room:
        raise UserError(
            f"--tokens is {tokens:,} after a prompt of {given:,} tokens, but {path} has positions for {room:,}; make it "
            f"{room - given:,} or less"
        )


def _encode(tokenizer, prompt: str, chat: bool, path: Path) -> BatchEncoding:
    """Tokenize the prompt, inside the chat template if `chat` is set."""
    if chat and tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {path} has no chat template; leave out --chat")
    said = render(tokenizer, [{"role": "user", "content": prompt}], str(path), answer=True) if chat else prompt
    try:
        with no_panics():
            bare = chat and tokenizer(said, add_special_tokens=False)["input_ids"]
            ids = bare if chat else encoding.prompt(tokenizer, said)
    except BaseException as error:
        if not panicked(error) and not isinstance(error, OverflowError | TypeError | ValueError):
            raise
        raise UserError(
            f"the tokenizer in {path} fails on this prompt: {plain(str(error))}; copy the teacher's tokenizer files there"
        ) from error
    if not ids:
        raise UserError(f"the prompt {prompt[:60]!r} has no tokens; give it at least one word")
    return BatchEncoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tensor_type="pt")
