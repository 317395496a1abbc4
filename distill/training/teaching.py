"""Other teachers and caches of logits for the stages of a run: checked before the run, opened when a stage begins.

See `distill.stages.targets` for the sources of next-token distributions."""

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from distill.division import divided
from distill.errors import UserError
from distill.loading import load_teacher, teacher_config
from distill.memory import enough_memory, or_cpu
from distill.recipe import Recipe
from distill.runs.run_dir import RunDir
from distill.runs.session import Session
from distill.stages import StageEntry, key_of, stages_of
from distill.stages.stage import Stage
from distill.stages.targets import Cached, Online, Source, Targets
from distill.stages.texts import text_of
from distill.training.caches import Reading, open_cache, readings, rows_of, vocabulary_of
from students.skeleton import Student
from teachers.fingerprint import difference
from teachers.teacher import Teacher, positions_of
from teachers.vocabulary import tokenizer_of, vocabulary_difference


def other_teacher(recipe: Recipe, reference: str) -> Recipe:
    """The recipe with another teacher, for loading that teacher."""
    return recipe.model_copy(update={"teacher": reference, "teacher_ignore": []})


# what a run refuses


def check_teaching(session: Session, students: Sequence[Student]) -> None:
    """Refuse caches of another tokenizer, text or teacher, with too few windows or damaged ones, and other
    vocabularies.

    Args:
        students: the student of each stage; their weights may be on the meta device.

    Raises:
        UserError: naming the stage's key, what differs and the fix.
    """
    for reading in readings(session, students):
        source = reading.entry.source
        if source is not None and source.offline is not None:
            cache = open_cache(session, reading)
            divided(cache.shards_of(reading.places()), cache.check_whole)  # now, not when stages before it have trained
        elif source is not None and source.teacher is not None:
            _check_vocabulary(session, reading.entry)


def check_other_teachers(recipe: Recipe, own: Teacher) -> None:
    """Refuse other teachers whose sizes do not fit. Reads their configs only.

    Args:
        own: the run's teacher; its weights may be on the meta device.

    Raises:
        UserError: naming the stage's key and both sizes.
    """
    for entry in stages_of(recipe):
        source = entry.source
        if source is None or source.teacher is None or source.offline is not None:
            continue
        key = key_of(recipe, entry)
        try:
            config = teacher_config(other_teacher(recipe, source.teacher))
        except UserError as error:
            raise UserError(f"{recipe.name}: {key}.{error}") from error
        theirs = config.get_text_config(decoder=True)
        mine, room = own.config, positions_of(theirs)
        if source.hidden and theirs.hidden_size != mine.hidden_size:
            raise UserError(
                f"{recipe.name}: {key}.hidden compares hidden states, and those of {source.teacher} have "
                f"{theirs.hidden_size} channels, the student's {mine.hidden_size}; set {key}.hidden=0"
            )
        if source.layers and theirs.num_hidden_layers != own.n_layers:
            raise UserError(
                f"{recipe.name}: {key}.hidden_layers needs a teacher of the student's depth, but {source.teacher} has "
                f"{theirs.num_hidden_layers} layers, the student {own.n_layers}; leave hidden_layers out"
            )
        text = text_of(recipe, entry)
        if room is not None and text.seq_len > room:
            raise UserError(
                f"{recipe.name}: {text.length_key} is {text.seq_len}, but {key}.teacher, {source.teacher}, has positions "
                f"for {room} tokens; make it {room} or less"
            )


# when a stage begins


def teach(session: Session, folder: RunDir, stage: Stage, reading: Reading, resumed: bool) -> None:
    """Give a stage its source of distributions, if that is not the run's teacher, and record it in the run folder.

    Args:
        resumed: whether the stage goes on from a checkpoint.

    Raises:
        UserError: as `check_teaching`; also for a teacher that cannot be loaded, and, in a resumed stage, for another
            teacher or cache than the stage began with.
    """
    if (targets := targets_of(session, reading)) is not None:
        _note(folder, reading.entry, targets, resumed, session.accelerator.is_main_process)
        stage.learn_from(targets)


def targets_of(session: Session, reading: Reading) -> Targets | None:
    """Open a stage's cache or load its own teacher; None if the stage uses the run's teacher or no distributions.

    Raises:
        UserError: as `check_teaching`; also where the other teacher cannot be loaded.
    """
    entry, source = reading.entry, reading.entry.source
    if source is None or (source.offline is None and source.teacher is None):
        return None
    if source.offline is not None:
        return Cached(open_cache(session, reading))
    _check_vocabulary(session, entry)
    return Online(other := load_other(session, entry), _unless_whole(session.teacher, other))


def load_other(session: Session, entry: StageEntry) -> Teacher:
    """Load the stage's own teacher onto the run's device.

    Raises:
        UserError: it cannot be found or read, does not fit into memory, or its head has fewer rows than the tokenizer has
            tokens.
    """
    reference, device, key = _other(entry), session.accelerator.device, key_of(session.recipe, entry)
    smaller = f"{key}.teacher's size (choose a smaller one, or cache it: `distill cache`){or_cpu(device)}"
    with enough_memory(f"loading {reference}", smaller):
        try:
            return load_teacher(other_teacher(session.recipe, reference), device)
        except UserError as error:
            raise UserError(f"{session.recipe.name}: {key}.{error}") from error


def _other(entry: StageEntry) -> str:
    """The reference of the stage's own teacher, as the recipe gives it."""
    return cast(str, cast(Source, entry.source).teacher)


def _note(folder: RunDir, entry: StageEntry, targets: Targets, resumed: bool, writes: bool) -> None:
    """Check that a resumed stage has the source that it began with; record the source when a stage begins.

    Raises:
        UserError: a resumed stage has another teacher or cache.
    """
    if isinstance(targets, Cached):
        now = f"cache {targets.cache.facts.key}"
    else:
        now = f"teacher {cast(Teacher, targets.teacher).fingerprint}"
    known = folder.read("run.json", {}).get("taught", {}).get(entry.key)
    if resumed and known is not None and not _goes_on(known, now):
        what = "cache of logits" if isinstance(targets, Cached) else "teacher"
        raise UserError(
            f"{folder.path}: the {what} of stage {entry.name} is not the one that it began with; restore that one, or "
            "start again with --fresh"
        )
    if writes and not resumed:
        folder.change("run.json", lambda facts: facts.update(taught={**facts.get("taught", {}), entry.key: now}))


def _goes_on(known: str, now: str) -> bool:
    kind, _, word = known.partition(" ")
    other_kind, _, other = now.partition(" ")
    return kind == other_kind and (word == other if kind == "cache" else difference(word, other) is None)


def _unless_whole(own: Teacher, other: Teacher) -> int | None:
    """The number of vocabulary entries to compare over; None if the two heads have the same number of rows."""
    return None if rows_of(own) == rows_of(other) else vocabulary_of(own, other)


def _check_vocabulary(session: Session, entry: StageEntry) -> None:
    recipe, reference, own = session.recipe, _other(entry), session.teacher
    tokenizer = cast(PreTrainedTokenizerBase, own.tokenizer)
    where = f"{recipe.name}: {key_of(recipe, entry)}.teacher"
    try:
        theirs = tokenizer_of(reference, recipe.teacher_trust_remote_code, recipe.teacher_pickle)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{where}: {error}") from error
    if said := vocabulary_difference(tokenizer, theirs):
        raise UserError(
            f"{where} is {reference}, whose vocabulary is not that of {own.reference}: {said}; choose a teacher with the "
            "same vocabulary"
        )
    rows = teacher_config(other_teacher(recipe, reference)).get_text_config(decoder=True).vocab_size
    if rows <= (last := max(tokenizer.get_vocab().values())):
        raise UserError(f"{where} is {reference}, which has {rows} embeddings, but the tokenizer has a token {last}")
