"""How far an engine may be from what it is held against. One table; every bound with its reason."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.exporters.target import Form


@dataclass(frozen=True)
class Bounds:
    """Bounds of one engine.

    dtype: that it computes in.
    logits: largest difference of a logit, None where the engine gives none. Logits of trained models reach 30 and more, and
        float32 has 7 digits, so the bound is for logits of up to `SCALE` and grows with the largest beyond it.
    ways: the same for ways of computing one thing in one engine. A token at a time adds up a state in another order than a
        scan over a text does, and hundreds of tokens behind a prompt stand on each other's rounding.
    logprobs: largest difference of a log-probability of a token of the text, None where only the divergence is bounded.
    kl: mean divergence in nats a token, agreement: least share of positions with the same most likely token; where the type
        leaves nothing closer to ask for.
    perplexity: largest relative difference of the perplexity of the text.
    tie: tokens may differ where the reference's own two most likely logits are less apart than this; every other token is
        the same. Two distributions within e of each other can only differ in their first token where it is within 2 e of
        the second. None where only the agreement is bounded.
    why: the reason for the numbers.
    """

    dtype: str
    logits: float | None
    ways: float | None
    logprobs: float | None
    tie: float | None
    why: str
    kl: float | None = None
    agreement: float | None = None
    perplexity: float | None = None


SCALE = 16.0  # the largest logit for which the bounds of logits stand as they are

BOUNDS = {
    "transformers": Bounds("float32", 1e-4, 1e-3, 1e-4, 2e-3, "float32 on both sides; sums are taken in another order"),
    "vllm": Bounds("float32", None, None, 1e-3, 2e-3, "float32, by kernels of its own for attention, scan and convolution"),
    "mlx": Bounds("float32", 1e-3, None, 1e-3, 2e-3, "float32, with products of its own in another order"),
    "llama.cpp": Bounds(
        "float16",
        None,
        None,
        None,
        None,
        "matrices in float16 with activations rounded to it, keys and values in float16",
        kl=5e-3,
        agreement=0.97,
        perplexity=5e-3,
    ),
}
# Some students turn the rounding of float32 into more than its bounds, a tiny one with large random weights among them. In
# float64 nothing is left of it.
IN_FLOAT64 = Bounds("float64", 1e-6, 1e-6, 1e-6, 1e-5, "float64 on both sides, where float32 rounds by more than its bounds")
# An engine that has no float32 kernels for a model: by the model_type of config.json.
BFLOAT16 = {("vllm", "qwen3_5_text"), ("vllm", "qwen3_5")}
ROUNDED = Bounds(
    "bfloat16",
    None,
    None,
    None,
    None,
    "its gated-delta kernel takes bfloat16 alone: 8 bits of mantissa in every activation of every layer",
    kl=3e-2,
    agreement=0.9,
)
NORMS = Bounds(
    "float32",
    None,
    None,
    None,
    None,
    "mlx-lm adds one to the norms' weights in the file's own bfloat16; a float32 file has the bounds of float32",
    kl=5e-3,
    agreement=0.9,
)

# llama.cpp with a file that is float32, and with quantised ones.
FLOAT32 = Bounds("float32", 1e-3, None, 1e-3, 2e-3, "float32, with products of its own in another order; caches in float32")
QUANTISED = {
    "q8_0": Bounds(
        "q8_0",
        None,
        None,
        None,
        None,
        "blocks of 32 weights in 8 bits, activations too; an unsure student has near ties that turn at a KL of 0.004",
        kl=2e-2,
        perplexity=2e-2,
    ),
    "q4_k_m": Bounds(
        "q4_k_m",
        None,
        None,
        None,
        None,
        "4 to 6 bits a weight cost what they cost: it is said, and only a model that is broken is refused",
        kl=1.0,
        perplexity=0.5,
    ),
}


def bounds_of(engine: str, model_type: str, form: "Form | None" = None) -> Bounds:
    """The bounds of an engine on a model that was written in a form."""
    if engine == "llama.cpp" and form is not None and form.quantize:
        return QUANTISED[form.quantize]
    if engine == "llama.cpp" and form is not None and form.dtype == "float32":
        return FLOAT32
    if engine == "mlx" and model_type.startswith("qwen3_5") and (form is None or form.dtype != "float32"):
        return NORMS
    return ROUNDED if (engine, model_type) in BFLOAT16 else BOUNDS[engine]
