"""`distill cache`: one pass of a teacher over the windows that a stage will read, which saves its top-k logits.

Several processes (torchrun, accelerate launch) divide the shards.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from torch import nn

from distill.console import new_console
from distill.errors import Interrupted, UserError, printable
from distill.evaluation.baselines import twin_layout
from distill.logits.facts import Facts
from distill.logits.reader import LogitCache
from distill.logits.writer import LogitWriter
from distill.memory import enough_memory, or_cpu
from distill.output_head import trimmed, wide_head, wide_logits
from distill.reading import size_of
from distill.recipe import Recipe
from distill.runs.progress import PLAIN_SECONDS, live_bar
from distill.runs.run_dir import alone
from distill.runs.session import Session
from distill.runs.stopper import Stopper
from distill.stages import StageEntry, key_of, stages_of
from distill.stages.layouts import students_of
from distill.stages.targets import Source
from distill.stages.texts import text_of
from distill.text.windows import Batch, Windows
from distill.training.aside import Aside
from distill.training.caches import facts_for, folder_of, readings, without_caches
from distill.training.checks import check_fit, check_here, check_session
from distill.training.teaching import load_other
from distill.training.twin import twin_recipe
from teachers.cache import cache_folder
from teachers.teacher import Teacher

TOKENS = {"cpu": 2048, "cuda": 16_384}  # tokens that the teacher reads at a time
CHUNK = 1024  # tokens whose logits are in memory at a time
LOWEST = -60_000.0  # near the lowest number of float16


def write_cache(
    recipe: Recipe,
    *,
    out: str | Path | None,
    top_k: int,
    stage: str | None,
    stopper: Stopper,
    console: Console | None,
) -> Path:
    """Cache a teacher's logits; see `distill.cache`."""
    chosen = stages_to_cache(recipe, stage)
    entry, source = chosen[0], cast(Source, chosen[0].source)
    offline = source.offline
    target = Path(out).expanduser() if out is not None else None if offline is None else folder_of(entry)
    plain = without_caches(recipe)
    check_here(plain)
    console = console or new_console(stderr=True)
    with console.status("loading the teacher and preparing the text"):
        session = Session.open(plain)
    check_session(session)
    main = session.accelerator.is_main_process
    console = console if main else Console(quiet=True)
    windows, places = windows_of(session, {one.index for one in chosen})
    with _teacher_of(session, entry) as teacher:
        facts = facts_for(session, windows, teacher, source.temperature, top_k)
        if top_k >= facts.vocabulary:
            raise UserError(f"--top-k is {top_k}, but the vocabulary has {facts.vocabulary} tokens; give a smaller number")
        folder = target or cache_folder() / "logits" / facts.key[:16]
        option = "--out" if out is not None or offline is None else f"{key_of(recipe, entry)}.offline_logits"
        with alone(folder) if main else nullcontext():
            _fill(session, teacher, LogitWriter(folder, facts), windows, places, option, stopper, console)
    return folder


def stages_to_cache(recipe: Recipe, stage: str | None) -> list[StageEntry]:
    """The stages that compare next-token distributions, or the named one. All have the same teacher, temperature and folder.

    Raises:
        UserError: there is no such stage, or the stages differ in these and none is named.
    """
    known = [entry for entry in stages_of(recipe) if entry.source is not None]
    if not known:
        raise UserError(f"{recipe.name}: none of the stages compares next-token distributions, so there is nothing to cache")
    chosen = known if stage is None else [one for one in known if stage in (one.name, str(one.index))]
    names = ", ".join(f"{one.index} ({one.name})" for one in known)
    if not chosen:
        raise UserError(f"--stage is {stage}, but the stages of {recipe.name} that can be cached are {names}")
    asked = [(cast(Source, one.source), text_of(recipe, one).key) for one in chosen]
    of = {(source.teacher, source.temperature, source.offline, key) for source, key in asked}
    if len(of) > 1:
        raise UserError(
            f"{recipe.name}: the stages {names} have different teachers, temperatures, folders or texts; "
            "give the number of one with --stage"
        )
    return chosen


def windows_of(session: Session, stages: set[int]) -> tuple[Windows, np.ndarray]:
    """The text that some stages of a run read, and the places in it of all windows that they and the same stages of the
    window-only control (`twin`) read, without repeats."""
    recipe = session.recipe
    fit = check_fit(recipe, session.teacher)
    wanted = [reading for reading in readings(session, fit.students) if reading.entry.index in stages]
    if recipe.twin:
        twin = twin_recipe(fit.recipe, fit.layout, fit.layouts)
        students = students_of(twin, session.teacher, twin_layout(fit.layout), twin.name)
        names = {reading.entry.name for reading in wanted}
        theirs = readings(session.with_recipe(twin), students)
        wanted += [one for one in theirs if one.entry.name in names and one.windows is wanted[0].windows]
    places = np.concatenate([reading.places() for reading in wanted])
    return wanted[0].windows, places[np.sort(np.unique(places, return_index=True)[1])]


@contextmanager
def _teacher_of(session: Session, entry: StageEntry) -> Iterator[Teacher]:
    """The teacher to cache: the run's, or the stage's own. The run's weights are then moved away while the block runs."""
    own = session.teacher
    if cast(Source, entry.source).teacher is None:
        yield own
        return
    _ = own.fingerprint  # computed from the weights before they are moved away
    with Aside(own).away(nn.Identity()):
        yield load_other(session, entry)


def _fill(
    session: Session,
    teacher: Teacher,
    writer: LogitWriter,
    text: Windows,
    places: np.ndarray,
    option: str,
    stopper: Stopper,
    console: Console,
) -> None:
    """Write the missing windows, one shard after the other."""
    accelerator, facts = session.accelerator, writer.facts
    said = f"{len(places):,} windows of {facts.seq_len} tokens, the {facts.top_k} most likely tokens at each: "
    if accelerator.is_main_process:
        left, complaints = writer.begin(places, option)
        for complaint in complaints:
            console.print(f"  {complaint}")
        size = size_of(len(places) * facts.window_bytes)
        console.print(
            Text(printable(f"{said}{size} in {writer.folder}, {len(places) - len(left):,} already there")), soft_wrap=True
        )
    accelerator.wait_for_everyone()
    left = LogitCache(writer.folder, option).missing(places)
    shards = list(writer.shards(left))
    accelerator.wait_for_everyone()  # every process has listed the missing windows before one writes
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    progress = _Progress(console, sum(len(windows) for _, windows in mine), facts.seq_len)
    lower = f"--top-k (now {facts.top_k}) or data.seq_len (now {facts.seq_len}){or_cpu(accelerator.device)}"
    with progress.shown(), stopper.listening(), enough_memory("caching logits", lower):
        distribution = _Distribution(session, teacher, facts)
        for name, windows in mine:
            writer.write(name, windows, _arrays(text, distribution, windows, facts, stopper, progress))
    accelerator.wait_for_everyone()


def _arrays(text, distribution, windows, facts, stopper, progress) -> dict[str, np.ndarray]:
    """The arrays of a shard: ids, logs and rest."""
    shape = (len(windows), facts.seq_len, facts.top_k)
    arrays = {
        "ids": np.empty(shape, facts.ids),
        "logs": np.empty(shape, np.float16),
        "rest": np.empty(shape[:2], np.float16),
    }
    device = distribution.session.accelerator.device
    size = max(1, TOKENS[device.type] // facts.seq_len)
    for start in range(0, len(windows), size):
        if (reason := stopper.due()) is not None:
            raise Interrupted(f"{reason}. What is written is kept, and the same command continues from there")
        batch = text.at(windows[start : start + size]).to(device)
        for name, values in distribution.of(batch).items():
            arrays[name][start : start + size] = values
        progress.add(len(batch.ids))
    return arrays


class _Distribution:
    """A teacher's most likely tokens. Its body runs in the run's precision, its head and softmax in float32."""

    def __init__(self, session: Session, teacher: Teacher, facts: Facts) -> None:
        self.session, self.teacher, self.facts = session, teacher, facts
        self.head = wide_head(teacher.model)
        self.head = trimmed(self.head, facts.vocabulary)

    @torch.no_grad()
    def of(self, batch: Batch) -> dict[str, np.ndarray]:
        """ids, logs and rest of a batch's windows, as a shard holds them."""
        with self.session.accelerator.autocast():
            hidden = self.teacher.hidden(batch.ids, batch.positions)
        parts: dict[str, list[np.ndarray]] = {"ids": [], "logs": [], "rest": []}
        for states in hidden.flatten(0, 1).split(CHUNK):
            logits = wide_logits(states, self.head) / self.facts.temperature
            if not bool(logits.isfinite().all()):
                raise UserError(f"the logits of {self.teacher.reference} are not finite; try precision=float32")
            whole = logits.logsumexp(-1)
            top, ids = logits.topk(self.facts.top_k)
            rest = logits.scatter_(-1, ids, -torch.inf).logsumexp(-1)
            parts["ids"].append(ids.cpu().numpy().astype(self.facts.ids))
            parts["logs"].append((top - whole[:, None]).clamp_min(LOWEST).half().cpu().numpy())
            parts["rest"].append((rest - whole).clamp_min(LOWEST).half().cpu().numpy())
        shape = batch.ids.shape
        return {name: np.concatenate(pieces).reshape(*shape, *pieces[0].shape[1:]) for name, pieces in parts.items()}


class _Progress:
    """The progress of caching: a live line on a terminal, plain lines otherwise."""

    def __init__(self, console: Console, windows: int, seq_len: int) -> None:
        self.console, self.windows, self.seq_len, self.done = console, windows, seq_len, 0
        self._began = self._printed = time.monotonic()
        said = "{task.completed}/{task.total} windows  {task.fields[speed]} tokens/s"
        self._bar = live_bar(console, "  caching", said)
        self._task = self._bar.add_task("caching", total=windows, speed="-")

    def shown(self) -> Progress:
        """A context manager that shows the line inside its block."""
        return self._bar

    def add(self, windows: int) -> None:
        """Count `windows` more as done."""
        self.done += windows
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        speed = self.done * self.seq_len / seconds
        if self.console.is_terminal:
            self._bar.update(self._task, completed=self.done, speed=f"{speed:,.0f}")
        elif now - self._printed > PLAIN_SECONDS or self.done == self.windows:
            self._printed = now
            left = (self.windows - self.done) * seconds / self.done
            self.console.print(f"  cached {self.done:,}/{self.windows:,} windows  {speed:,.0f} tokens/s  {left:.0f} s left")
