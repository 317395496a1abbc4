"""`distill answers`: a teacher or a student answers prompts; the answers are a source of text.

Prompts are cut into shards in their order, and the prompts of a shard are answered in batches of similar length. A shard is
written whole or not at all, so that a call that was stopped goes on to the same bytes. Several processes (torchrun,
accelerate launch) each answer a share of the shards.
"""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from distill.answering.files import SIZE, Facts, Folder
from distill.answering.prompts import Prompt, digest, prompts_of, tokens_of
from distill.answering.rows import ANSWERS, PAIRS, rows_of
from distill.answering.speaking import Said, Speaker
from distill.console import new_console
from distill.errors import Interrupted, UserError, printable
from distill.loading import load_student, load_teacher, load_tokenizer, teacher_config
from distill.memory import enough_memory, or_cpu
from distill.recipe import Recipe, TextSource
from distill.runs.progress import PLAIN_SECONDS, live_bar
from distill.runs.run_dir import alone
from distill.runs.session import check_device, make_accelerator
from distill.runs.stopper import Stopper
from distill.runs.together import all_or_none, check_same
from teachers.cache import cache_folder
from teachers.fingerprint import fingerprint
from teachers.teacher import positions_of

BATCH = {"cpu": 8, "cuda": 64}  # batch size, by device


def answer(
    recipe: Recipe,
    *,
    data: str | None,
    out: str | Path | None,
    student: str | Path | None,
    pairs: bool,
    plan: bool,
    tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch: int | None,
    limit: int | None,
    unfinished: bool,
    stopper: Stopper,
    console: Console | None,
) -> dict[str, Any]:
    """Answer prompts; see `distill.answers`."""
    check_device(recipe)
    console = console or new_console(stderr=True)
    sources, where = recipe.data.train, "data.train"
    if data is not None:
        sources, where = [TextSource(path=data)], "--data"
    prompts = prompts_of(sources, where, recipe.data.longest_document, limit)
    if pairs:
        _check_references(prompts, where)
    room = positions_of(teacher_config(recipe).get_text_config(decoder=True))
    tokenizer = load_tokenizer(recipe)
    ids = tokens_of(prompts, tokenizer, room, tokens)
    asked = sum(map(len, ids))
    planned = {"prompts": len(prompts), "prompt_tokens": asked, "most_tokens": len(prompts) * tokens}
    if plan:
        console.print(_planned(planned, tokens))
        return planned
    accelerator = make_accelerator(recipe, None)
    check_same(recipe.fingerprint, recipe.name, accelerator.device)
    set_seed(recipe.seed)
    main = accelerator.is_main_process
    console = console if main else Console(quiet=True)
    lower = f"--batch, --tokens (now {tokens}){or_cpu(accelerator.device)}"
    with enough_memory("answering", lower):
        model, reference, word = _model(recipe, student, tokenizer, accelerator.device)
        facts = Facts(
            kind="pairs" if pairs else "answers",
            reference=reference,
            model=word,
            prompts=digest(prompts),
            count=len(prompts),
            tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            unfinished=unfinished,
        )
        folder = Folder(cache_folder() / "answers" / facts.key[:16] if out is None else Path(out).expanduser(), facts)
        with alone(folder.path) if main else nullcontext():
            all_or_none(folder.begin if main else None, accelerator.device)
            accelerator.wait_for_everyone()
            speaker = Speaker(
                model,
                tokenizer,
                tokens=tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                check=lambda: _check_stop(stopper),
            )
            console.print(_planned(planned, tokens))
            _fill(
                accelerator, speaker, folder, prompts, ids, batch or BATCH.get(accelerator.device.type, 8), stopper, console
            )
            counts = folder.counts()
    _tell(console, folder, counts)
    return planned | counts | {"folder": str(folder.path), "decoding": speaker.way}


def _check_references(prompts: list[Prompt], where: str) -> None:
    """Refuse pairs of prompts that have no reference answers."""
    without = next((one for one in prompts if one.reference is None), None)
    if without is not None:
        raise UserError(
            f"{without.place}: it has no reference answer, which --pairs chooses; name rows of {where} whose last "
            "message is the assistant's, or with a prompt and a completion"
        )


def _model(recipe: Recipe, student: str | Path | None, tokenizer, device: torch.device) -> tuple[PreTrainedModel, str, str]:
    """The model that answers, its name, and its fingerprint."""
    if student is None:
        teacher = load_teacher(recipe, device)
        return teacher.model, teacher.reference, teacher.fingerprint
    path = Path(student)
    path = path / "student" if (path / "recipe.yaml").is_file() else path
    if (Path(student) / "recipe.yaml").is_file() and not path.exists():
        raise UserError(f"--student is {student}, which has no finished student; is the run over?")
    loaded: Any = load_student(path)
    model = loaded.to(device)
    last = max(tokenizer.get_vocab().values(), default=0)
    embedded = model.get_input_embeddings().num_embeddings
    if last >= embedded:
        raise UserError(
            f"--student is {student}, which embeds {embedded:,} tokens, but the tokenizer of {recipe.teacher} has the token "
            f"{last:,}; name a student of this teacher"
        )
    return model, str(student), fingerprint(model, model.config, tokenizer)


def _check_stop(stopper: Stopper) -> None:
    if (reason := stopper.due()) is not None:
        raise Interrupted(f"{reason}. What is written stays, and the same command goes on after it")


def _fill(
    accelerator, speaker: Speaker, folder: Folder, prompts, ids, batch: int, stopper: Stopper, console: Console
) -> None:
    """Write the missing shards, one after the other."""
    left = folder.missing()
    accelerator.wait_for_everyone()  # all processes list the missing shards before one of them is written
    mine = left[accelerator.process_index :: accelerator.num_processes]
    spans = [range(number * SIZE, min(len(prompts), (number + 1) * SIZE)) for number in mine]
    there = folder.facts.shards - len(left)
    console.print(
        Text(printable(f"  decoding by {speaker.way}; {there} of {folder.facts.shards} shards are in {folder.path}")),
        soft_wrap=True,
    )
    progress = _Progress(console, sum(map(len, spans)))
    with progress.bar, stopper.listening():
        for number, span in zip(mine, spans, strict=True):
            answers = _answers(speaker, span, ids, batch, progress)
            shard = [prompts[row] for row in span]
            folder.write(number, *rows_of(shard, answers, folder.facts.kind == "pairs", folder.facts.unfinished))
    accelerator.wait_for_everyone()


def _answers(speaker: Speaker, span: range, ids: list[list[int]], batch: int, progress: "_Progress") -> list[Said]:
    """The answers of a shard, generated in batches of prompts of similar length, the longest first."""
    order = sorted(span, key=lambda row: (-len(ids[row]), row))
    found: dict[int, Said] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        said = speaker([ids[row] for row in rows], rows)
        found |= dict(zip(rows, said, strict=True))
        progress.add(len(rows), sum(one.tokens for one in said))
    return [found[row] for row in span]


def _planned(planned: dict[str, int], tokens: int) -> str:
    return (
        f"  {planned['prompts']:,} prompts of {planned['prompt_tokens']:,} tokens, answers of {tokens:,} at most: up to "
        f"{planned['most_tokens']:,} tokens"
    )


def _tell(console: Console, folder: Folder, counts: dict[str, int]) -> None:
    """Print how many prompts had each outcome."""
    words = PAIRS if folder.facts.kind == "pairs" else ANSWERS
    first, *_ = words
    said = ", ".join(
        f"{counts.get(name, 0):,} {text}" for name, text in words.items() if counts.get(name) or name in ANSWERS
    )
    kept = "" if folder.facts.unfinished or folder.facts.kind == "pairs" else " (--unfinished writes those too)"
    console.print(
        Text(f"  of {folder.facts.count:,} prompts: {said}{kept if counts.get('unfinished') else ''}"), soft_wrap=True
    )
    if not counts.get(first) and not (folder.facts.unfinished and counts.get("unfinished")):
        console.print(Text(f"  nothing was written to {folder.path}, so a run cannot read it"), soft_wrap=True)


class _Progress:
    """The progress of answering: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, prompts: int) -> None:
        self.console, self.prompts, self.done, self.tokens = console, prompts, 0, 0
        self._began = self._printed = time.monotonic()
        said = "{task.completed}/{task.total} prompts  {task.fields[speed]} tokens/s"
        self.bar = live_bar(console, "  answering", said)
        self._task = self.bar.add_task("answering", total=prompts, speed="-")

    def add(self, prompts: int, tokens: int) -> None:
        """Count further prompts, and the tokens of their answers, as done."""
        self.done, self.tokens = self.done + prompts, self.tokens + tokens
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        speed = self.tokens / seconds
        if self.console.is_terminal:
            self.bar.update(self._task, completed=self.done, speed=f"{speed:,.0f}")
        elif now - self._printed > PLAIN_SECONDS or self.done == self.prompts:
            self._printed = now
            left = (self.prompts - self.done) * seconds / self.done
            self.console.print(
                f"  answered {self.done:,}/{self.prompts:,} prompts  {speed:,.0f} tokens/s  {left:.0f} s left"
            )
