"""Chunks of a sequence with masks for packed documents, shared by the chunked references of linear recurrences.

Within a chunk, tokens interact through a square matrix; between chunks, a state is carried. Both stop at the end of a
document.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from students.kernels.documents import runs as number_runs
from students.shapes import Bool, Int


@dataclass(frozen=True)
class Chunks:
    """Masks over z chunks of l tokens, the same for all heads; a run is a sequence of tokens with the same document id.

    pairs: whether token i reads token j <= i of its chunk. entered: whether a token belongs to the run of the state that
    enters its chunk. leaving: whether a token belongs to the run of the chunk's last token, whose state leaves the chunk.
    through: whether the state that enters the chunk also leaves it.
    """

    pairs: Bool[Tensor, "b 1 z l l"]
    entered: Bool[Tensor, "b 1 z l"]
    leaving: Bool[Tensor, "b 1 z l"]
    through: Bool[Tensor, "b 1 z"]


def chunks_of(documents: Int[Tensor, "b t"] | None, like: Tensor, length: int) -> Chunks:
    """Returns the chunks of a batch of sequences of the shape of `like` [b t ...].

    The last chunk is padded with its last token's run. The state before the first chunk belongs to the first token's run.
    """
    if documents is None:
        documents = torch.zeros(like.shape[:2], dtype=torch.long, device=like.device)
    ids = number_runs(documents)
    ids = torch.cat([ids, ids[:, -1:].expand(-1, -ids.shape[1] % length)], 1).unflatten(1, (-1, length))[:, None]
    before = torch.cat([ids[:, :, :1, :1], ids[:, :, :-1, -1:]], 2)
    return Chunks(
        pairs=(ids[..., :, None] == ids[..., None, :]).tril(),
        entered=ids == before,
        leaving=ids == ids[..., -1:],
        through=(ids[..., -1:] == before).squeeze(-1),
    )


def cut(part: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Reshape [b t h ...] to chunks [b h z l ...] in another type; the last chunk is padded with zeros."""
    missing = -part.shape[1] % length
    part = part.to(dtype)
    if missing:
        part = torch.cat([part, part.new_zeros(part.shape[0], missing, *part.shape[2:])], 1)
    return part.unflatten(1, (-1, length)).permute(0, 3, 1, 2, *range(4, part.dim() + 1)).contiguous()


def join(part: Tensor, time: int) -> Tensor:
    """Reverse `cut`: reshape [b h z l p] to [b t h p]."""
    return part.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :time]
