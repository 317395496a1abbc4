"""MixerSlot: what stands where an attention module stood, inside the skeleton's own layer."""

from torch import Tensor, nn
from transformers.cache_utils import Cache

from students.mixers.mixer import Context, Mixer
from students.shapes import Float


class MixerSlot(nn.Module):
    """Calls a mixer the way the skeleton calls its attention.

    The skeleton passes hidden states, rotary tables and its cache by keyword; `document_ids` comes along as one more
    keyword from `Student.forward`. The cache is known by its type: families and versions of transformers call it
    `past_key_values`, `cache` or `layer_past`. The attention mask is not used: padding and packing are in the documents.
    """

    def __init__(self, mixer: Mixer, layer_index: int) -> None:
        super().__init__()
        self.mixer, self.layer_index = mixer, layer_index

    def forward(self, hidden_states: Float[Tensor, "b t d"], *unused, **keywords) -> tuple[Float[Tensor, "b t d"], None]:
        """The mixer's output, and None where attention would return its weights."""
        cache = next((value for value in keywords.values() if isinstance(value, Cache)), None)
        context = Context(
            documents=keywords.get("document_ids"),
            rope=keywords.get("position_embeddings"),
            state=None if cache is None else cache.layers[self.layer_index],
        )
        return self.mixer(hidden_states, context), None
