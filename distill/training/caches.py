"""Caches of logits for the stages of a run: the windows that a stage needs, and checks of a cache folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from distill.errors import UserError
from distill.logits.facts import WORDS, Facts, read_facts
from distill.logits.reader import LogitCache
from distill.recipe import Recipe
from distill.runs.session import Session
from distill.stages import StageEntry, key_of, stages_of
from distill.stages.targets import Source
from distill.stages.texts import text_of
from distill.text.windows import Windows
from distill.training.trainer import steps_of
from students.skeleton import Student
from teachers.fingerprint import difference, tokenizer_part
from teachers.teacher import Teacher


@dataclass(frozen=True)
class Reading:
    """The windows of training text that a stage reads: `count` of them from number `first`, numbered through all epochs."""

    entry: StageEntry
    windows: Windows
    first: int
    count: int

    @classmethod
    def of(cls, recipe: Recipe, entry: StageEntry, student: Student, windows: Windows, first: int) -> "Reading":
        """The windows that a stage reads from number `first`. student: its weights may be on the meta device."""
        tokens, batch, length = entry.options.tokens, entry.batch(recipe.data), windows.seq_len
        steps = entry.kind.trains and entry.kind.count(student, entry.options) > 0
        return cls(entry, windows, first, steps_of(tokens, batch, length) * batch if steps else -(-tokens // length))

    def places(self) -> np.ndarray:
        """The distinct window numbers within one epoch, in reading order."""
        return self.windows.places(self.first, self.count)


def readings(session: Session, students: Sequence[Student]) -> list[Reading]:
    """The windows that each stage of the session's recipe reads; stages with the same text and length continue each other.

    Args:
        students: the student of each stage."""
    found: list[Reading] = []
    ends: dict[Any, int] = {}
    for entry, student in zip(stages_of(session.recipe), students, strict=True):
        key, windows = text_of(session.recipe, entry).key, session.windows_of(entry)
        found.append(Reading.of(session.recipe, entry, student, windows, ends.get(key, 0)))
        ends[key] = found[-1].first + found[-1].count
    return found


def facts_for(session: Session, windows: Windows, teacher: Teacher, temperature: float, top_k: int) -> Facts:
    """The description that a cache of a teacher's logits on some training text has."""
    recipe, own = session.recipe, session.teacher
    return Facts(
        reference=teacher.reference,
        teacher=teacher.fingerprint,
        tokenizer=tokenizer_part(own.fingerprint),
        text=windows.meta.sha256,
        seq_len=windows.seq_len,
        seed=recipe.seed,
        long_documents=recipe.data.long_documents,
        temperature=temperature,
        top_k=top_k,
        vocabulary=vocabulary_of(own, teacher),
    )


def vocabulary_of(own: Teacher, other: Teacher) -> int:
    """The number of vocabulary entries that two models' distributions are compared over: the rows that both heads have."""
    return min(rows_of(own), rows_of(other))


def rows_of(teacher: Teacher) -> int:
    """The number of rows of a teacher's head: its logits for one token."""
    return getattr(teacher.model.get_output_embeddings(), "out_features", None) or teacher.config.vocab_size


def folder_of(entry: StageEntry) -> Path:
    """The folder of a stage's offline_logits, relative to the working directory."""
    return Path(cast(str, cast(Source, entry.source).offline)).expanduser()


def _where(recipe: Recipe, entry: StageEntry) -> str:
    return f"{recipe.name}: {key_of(recipe, entry)}.offline_logits"


def without_caches(recipe: Recipe) -> Recipe:
    """The recipe without offline_logits, for `distill cache`, which makes the cache that they name."""
    stages = [
        {name: {key: value for key, value in options.items() if key != "offline_logits"} for name, options in stage.items()}
        for stage in recipe.stages
    ]
    return recipe.model_copy(update={"stages": stages})


def check_caches(recipe: Recipe) -> None:
    """Refuse caches that are missing, or whose description does not fit the recipe. Needs neither teacher nor text.

    Raises:
        UserError: naming the stage's key and both values.
    """
    for entry in stages_of(recipe):
        if entry.source is None or entry.source.offline is None:
            continue
        where = _where(recipe, entry)
        facts = read_facts(folder_of(entry), where)
        wanted = facts.model_copy(
            update={
                "seed": recipe.seed,
                "seq_len": text_of(recipe, entry).seq_len,
                "long_documents": recipe.data.long_documents,
                "temperature": entry.source.temperature,
            }
        )
        _same(facts, wanted, folder_of(entry), where, text_of(recipe, entry).length_key)
        if entry.source.teacher is not None and entry.source.teacher != facts.reference:
            raise UserError(
                f"{where} is {folder_of(entry)}, which holds the logits of {facts.reference}, but the stage's teacher is "
                f"{entry.source.teacher}; make its cache with `distill cache`, or set teacher={facts.reference}"
            )


def open_cache(session: Session, reading: Reading) -> LogitCache:
    """Open a stage's cache and check that it fits this run and holds every window that the stage reads.

    Raises:
        UserError: it does not; the message names the stage's key, the difference and the fix.
    """
    recipe, entry = session.recipe, reading.entry
    source = cast(Source, entry.source)
    where, own = _where(recipe, entry), session.teacher
    cache = LogitCache(folder_of(entry), where)
    facts = cache.facts
    wanted = facts_for(session, reading.windows, own, source.temperature, facts.top_k)
    if source.teacher is not None:  # the tokenizers were compared token by token when the cache was made
        wanted = wanted.model_copy(update={"teacher": facts.teacher, "vocabulary": min(facts.vocabulary, wanted.vocabulary)})
    _same(facts, wanted, cache.folder, where, text_of(recipe, entry).length_key)
    places = reading.places()
    if len(missing := cache.missing(places)):
        raise UserError(
            f"{where} is {cache.folder}, which has {len(places) - len(missing):,} of the {len(places):,} windows that this "
            f"stage reads; add the others with `distill cache` of this recipe and --out {cache.folder}"
        )
    return cache


def _same(known: Facts, wanted: Facts, folder: Path, where: str, length_key: str) -> None:
    """Refuse a cache whose description differs."""
    name = known.difference(wanted)
    if name is None:
        return
    then, now = getattr(known, name), getattr(wanted, name)
    if name == "teacher":
        of = f"another teacher ({known.reference}; they differ in the {difference(then, now)})"
        fix = f", or set the stage's teacher={known.reference}"
    elif name in ("tokenizer", "text"):
        of, fix = f"another {'tokenizer' if name == 'tokenizer' else 'training text'}", ", or restore that one"
    else:
        keys = {"seed": "seed", "seq_len": length_key, "long_documents": "data.long_documents"}
        keys["temperature"] = f"{where.partition(': ')[2].rpartition('.')[0]}.temperature"
        of = f"another run: {WORDS[name]} is {then} there, and {now} here"
        fix = f", or set {keys[name]}={then}" if name in keys else ""
    raise UserError(f"{where} is {folder}, a cache of {of}; make one of this run with `distill cache`{fix}")
