"""Protocols of papers on state-space models for measuring generation, with their reported multiples of a Transformer.

mamba  (arXiv 2312.00752, section 4.5): prompts of 2,048 tokens, 128 more, the largest batch that fits
hymba  (arXiv 2411.13676, table 2): 8,000 tokens, batch 128 or the largest that fits; also the cache's size
samba  (arXiv 2406.07522, section 4.1): a prompt of 131,072 tokens; decoding after 65,536
"""

from collections.abc import Mapping
from dataclasses import dataclass

from distill.errors import UserError, nearest


@dataclass(frozen=True)
class Protocol:
    """One measurement. batch: batch size, halved until it fits; None: the largest that fits, guessed from shapes first.

    papers: the multiples of a Transformer's numbers that the paper reported for its model, by the name of the number.
    """

    prompt: int
    tokens: int
    batch: int | None
    papers: Mapping[str, float]


PROTOCOLS: dict[str, tuple[Protocol, ...]] = {
    "mamba": (Protocol(2048, 128, None, {"tokens_per_second": 5.0}),),
    "hymba": (Protocol(8000, 128, 128, {"tokens_per_second": 3.49, "cache_bytes": 11.67}),),
    "samba": (
        Protocol(131_072, 32, 1, {"prompt_tokens_per_second": 3.73}),
        Protocol(65_536, 128, 1, {"tokens_per_second": 3.64}),
    ),
}


def protocol(name: str) -> tuple[Protocol, ...]:
    """A paper's measurements.

    Raises:
        UserError: there is no protocol of that name.
    """
    if name not in PROTOCOLS:
        raise UserError(f"there is no protocol {name!r}; {nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
