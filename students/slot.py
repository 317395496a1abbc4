"""MixerSlot: what stands where an attention module stood, inside the skeleton's own layer."""

from torch import Tensor, nn
from transformers.cache_utils import Cache

from students.kernels.documents import documents_of
from students.mixers.mixer import Context, Mixer
from students.shapes import Float


class MixerSlot(nn.Module):
    """Calls a mixer the way the skeleton calls its attention.

    The skeleton passes hidden states, rotary tables and its cache by keyword; `document_ids` comes along as one more
    keyword from `Student.forward`. The cache is known by its type: families and versions of transformers call it
    `past_key_values`, `cache` or `layer_past`. The attention mask is not used: padding and packing are in the documents,
    which in families that drop unknown keywords are read off the positions (`documents` is "positions"). `keys_of`: the
    layer whose keys and values the mixer leaves for others or shares, if any; they travel as `shared_keys`.
    """

    def __init__(self, mixer: Mixer, layer_index: int, documents: str = "keywords", keys_of: int | None = None) -> None:
        super().__init__()
        self.keys_of = keys_of
        self.mixer, self.layer_index, self.documents = mixer, layer_index, documents

    def forward(self, hidden_states: Float[Tensor, "b t d"], *unused, **keywords) -> tuple[Float[Tensor, "b t d"], None]:
        """The mixer's output, and None where attention would return its weights."""
        cache = next((value for value in keywords.values() if isinstance(value, Cache)), None)
        documents = keywords.get("document_ids")
        if self.documents == "positions":
            documents = documents_of(keywords["position_ids"], hidden_states.shape[0], cache is not None)
        context = Context(
            documents=documents,
            rope=keywords.get("position_embeddings"),
            state=None if cache is None else cache.layers[self.layer_index],
            shared=None if self.keys_of is None else keywords["shared_keys"][self.keys_of],
        )
        return self.mixer(hidden_states, context), None
