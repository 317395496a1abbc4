"""The arguments of the skeleton's `forward`, made from a student's inputs: positions, padding, shared keys."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from students.compat import CACHE
from students.inputs import Inputs
from students.kernels.documents import marked_positions
from students.mixers.sharing import SharedKeys
from students.padding import Unpadded, check_windows, ends_filled
from students.rotary import lengths, turned_as_whole
from students.shapes import Int
from students.skeleton import Skeleton


class SkeletonArguments(Skeleton):
    """Part of the student's class: makes the skeleton's arguments, and refuses inputs that it cannot serve."""

    def _check_length(self, inputs: Inputs) -> None:
        """Refuse tokens after cached keys that were rotated for a shorter sequence."""
        past = inputs.cache.get_seq_length() if self.length_rules and inputs.cache is not None else 0
        if past and not turned_as_whole():
            before, after = lengths(past, inputs.size[1], inputs.position_ids, inputs.attention_mask)
            if refusal := self.length_rules.refusal(before, after - before):
                raise ValueError(refusal)

    def _ends_filled(self, inputs: Inputs) -> AbstractContextManager[None]:
        """Inside the block, padding at the end of a row gets the hidden state of the row's last token."""
        if inputs.documents is None or inputs.attention_mask is None or not self.layout.converted:
            return nullcontext()
        return ends_filled(self.base_model, inputs.documents >= 0)

    def check_windows(self, mask: Int[Tensor, "b s"], to_come: int = 0) -> None:
        """Refuse padding between tokens where a kept attention layer counts it among the tokens of its window.

        Args:
            to_come: tokens that each row will still get.

        Raises:
            ValueError: naming the layer.
        """
        if self.layout.converted:  # without mixers the model is the teacher, windows included
            check_windows(mask, self._kept_windows, to_come)

    @functools.cached_property
    def _kept_windows(self) -> dict[int, int]:
        """The window sizes of the kept attention layers, by layer."""
        layers = DynamicCache(config=self.config.get_text_config(decoder=True)).layers
        windows = {i: getattr(layer, "sliding_window", None) for i, layer in enumerate(layers)}
        return {index: window for index, window in windows.items() if window and index not in self.layout.converted}

    def _arguments(self, inputs: Inputs, use_cache: bool) -> dict:
        """The keyword arguments of the skeleton's `forward`."""
        documents, mask, unpadded = inputs.documents, inputs.attention_mask, None
        past = 0 if inputs.cache is None else inputs.cache.get_seq_length()
        if mask is not None:
            self.check_windows(mask)
        by_positions = self.place.documents == "positions"
        position_ids = self._marked(inputs, past) if by_positions else inputs.position_ids
        if documents is not None and mask is not None and not by_positions:
            unpadded = Unpadded.of(documents, past > 0, inputs.cache is not None)
        arguments: dict[str, Any] = {
            "input_ids": inputs.input_ids,
            "attention_mask": mask,
            "position_ids": position_ids,
            CACHE: inputs.cache,
            "inputs_embeds": inputs.inputs_embeds,
            "use_cache": use_cache,
        }
        if self.givers:
            arguments["shared_keys"] = {giver: SharedKeys() for giver in self.givers.values()}
        arguments |= {} if unpadded is None else {"unpadded": unpadded}
        return arguments if documents is None or by_positions else arguments | {"document_ids": documents}

    def _marked(self, inputs: Inputs, past: int) -> Int[Tensor, "rows t"] | None:
        """Position ids that mark padding and the beginnings of documents."""
        documents, positions, masked = inputs.documents, inputs.position_ids, inputs.attention_mask is not None
        if documents is None and (positions is None or not masked or inputs.cache is not None):
            return None if positions is None else positions.long()
        rows, time = inputs.size
        if positions is None:
            positions = torch.arange(past, past + time, device=cast(Tensor, documents).device)[None]
        documents = torch.zeros_like(positions.expand(rows, -1)) if documents is None else documents
        return marked_positions(positions, documents, packed=not masked)
