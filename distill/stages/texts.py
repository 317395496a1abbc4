"""The training texts of a recipe: the sources and the window length of each stage, and the tokens read of each text."""

from collections.abc import Sequence
from dataclasses import dataclass

from distill.recipe import Recipe, TextSource
from distill.stages import StageEntry, stages_of
from distill.text.pairs import PAIRS


@dataclass(frozen=True)
class StageText:
    """The text of a stage. where: the recipe key of the sources. seq_len, length_key: tokens of a window and the recipe key
    that sets it."""

    sources: tuple[TextSource, ...]
    where: str
    seq_len: int
    length_key: str

    @property
    def pairs(self) -> bool:
        """Whether the text consists of pairs of answers."""
        return any(source.train_on == PAIRS for source in self.sources)

    @property
    def key(self) -> tuple[tuple[TextSource, ...], int]:
        """A key that is equal for two stages if the later one continues in the windows of the earlier one."""
        return self.sources, self.seq_len


def usual_text(recipe: Recipe) -> StageText:
    """The text of a stage without `data` or `seq_len` of its own."""
    return StageText(tuple(recipe.data.train), "data.train", recipe.data.seq_len, "data.seq_len")


def text_of(recipe: Recipe, entry: StageEntry) -> StageText:
    """The text that a stage reads."""
    usual, options, place = usual_text(recipe), entry.options, f"stages.{entry.index}.{entry.name}"
    sources: list[TextSource] | None = getattr(options, "data", None)
    length = getattr(options, "seq_len", None)
    if entry.kind.text == PAIRS and sources is not None:
        sources = [source.model_copy(update={"train_on": PAIRS}) for source in sources]
    own = sources is not None and tuple(sources) != usual.sources
    return StageText(
        tuple(sources or ()) if own else usual.sources,
        f"{place}.data" if own else usual.where,
        entry.seq_len(recipe.data),
        f"{place}.seq_len" if length else usual.length_key,
    )


def texts_of(recipe: Recipe) -> list[StageText]:
    """All combinations of text and window length that a recipe's stages read, the recipe's own first."""
    found = {text.key: text for text in (usual_text(recipe), *(text_of(recipe, entry) for entry in stages_of(recipe)))}
    return list(found.values())


def own_sources(recipe: Recipe) -> dict[str, tuple[TextSource, ...]]:
    """The sources that stages have in place of `data.train`, by recipe key; each text once."""
    found = {text.sources: text.where for text in reversed(texts_of(recipe)) if text.where != "data.train"}
    return {where: sources for sources, where in reversed(found.items())}


def tokens_read(recipe: Recipe, sources: Sequence[TextSource]) -> int:
    """The most tokens that a run's stages read of a text: each reads its `tokens` and up to one batch more.

    This is the larger of two sums: the student's, and the window-only control's (twin). The control skips some stages, and
    its next stage gets their tokens."""
    total, twin, spare = 0, 0, 0
    for entry in stages_of(recipe):
        text = text_of(recipe, entry)
        tokens = entry.options.tokens + entry.batch(recipe.data) * text.seq_len
        if text.sources == tuple(sources):
            total += tokens
        if not entry.kind.for_twin:
            spare += entry.options.tokens
        else:
            taken, spare = (spare, 0) if entry.kind.trains else (0, spare)
            twin += tokens + taken if text.sources == tuple(sources) else 0
    return max(total, twin) if recipe.twin else total
