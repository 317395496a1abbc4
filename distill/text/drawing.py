"""Draws documents from one source, or from several in the shares of their weights, and can begin at any place."""

from collections.abc import Iterator, Sequence

import numpy as np

from distill.errors import UserError
from distill.text.chat_tokens import Marked
from distill.text.shard_facts import Place
from distill.text.sources import Stream
from distill.text.tokenising import Encode

Drawn = tuple[str, np.ndarray | Marked]  # label and tokens of a document


class Source:
    """The documents of one stream, pass by pass; `place` says where the next one is."""

    def __init__(self, stream: Stream, encode: Encode, place: Place) -> None:
        self._stream, self._encode, self.place = stream, encode, place
        self._documents = self._pass()

    @property
    def share(self) -> float | None:
        """The share of its rows that was read, 1 from the end of the first pass on; None where their number is not known."""
        if self._stream.count is None:
            return None
        return 1.0 if self.place.turn else self.place.rows / max(self._stream.count, 1)

    def draw(self) -> Drawn | None:
        """The next document of this pass; None at its end."""
        return next(self._documents, None)

    def again(self) -> None:
        """Begin the next pass, in another order."""
        self.place = Place(turn=self.place.turn + 1, taken=self.place.taken)
        self._documents = self._pass()

    def _pass(self) -> Iterator[Drawn]:
        turn, first, skipped = self.place.turn, self.place.rows, self.place.documents
        rows = self._stream.rows(turn, first)
        numbered = (((first + number, label), text) for number, (label, text) in enumerate(rows))
        for (number, label), documents in self._encode(numbered):
            begun = skipped if number == first else 0  # the row that the last shard ended in
            for index in range(begun, len(documents)):
                taken = self.place.taken + len(documents[index])
                last = index + 1 == len(documents)
                self.place = Place(turn=turn, rows=number + last, documents=0 if last else index + 1, taken=taken)
                yield label, documents[index]


def drawn(sources: Sequence[Source], weights: Sequence[float] | None, where: str) -> Iterator[Drawn]:
    """Documents of one source in one pass, or of several mixed."""
    if weights is None:
        (source,) = sources
        while (document := source.draw()) is not None:
            yield document
    else:
        yield from mixed(sources, weights, where)


def mixed(sources: Sequence[Source], weights: Sequence[float], where: str) -> Iterator[Drawn]:
    """Documents of several sources; each source's share of the tokens is always as near to its weight as documents allow.

    A source that ends begins again in another order, until each has ended once. Nothing here is random, so any part of the
    result is the same when it is made again, from any place.

    Raises:
        UserError: a source has no text.
    """
    while not all(source.place.turn for source in sources):
        k = min(range(len(sources)), key=lambda index: sources[index].place.taken / weights[index])
        document = sources[k].draw()
        if document is not None:
            yield document
            continue
        if not sources[k].place.taken:
            raise UserError(f"{where}.{k}: there is no text in this source")
        sources[k].again()
