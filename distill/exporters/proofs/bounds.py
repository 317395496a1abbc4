"""The bounds of a proof: how far each engine may be from its reference, with the reason for every bound."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.exporters.target import Form


@dataclass(frozen=True)
class Bounds:
    """Bounds of one engine.

    dtype: the type that the engine computes in.
    logits: largest difference of a logit; None if the engine gives no logits. Logits of trained models reach 30 and more,
        and float32 has 7 digits. So the bound is for logits of up to `SCALE`, and grows in proportion to larger ones.
    ways: the same between two ways of computing one thing in one engine. Decoding token by token adds up a state in another
        order than a scan over a text does, and rounding accumulates over the hundreds of tokens after a prompt.
    logprobs: largest difference of a log-probability of a token of the text; None if only the divergence is bounded.
    kl, agreement: largest mean divergence in nats a token, and smallest top-1 agreement, for types that are too coarse for
        closer bounds.
    perplexity: largest relative difference of the perplexity of the text.
    tie: a token may differ only where the reference's two most likely logits are less apart than this. Two distributions
        within e of each other can differ in the most likely token only where its logit is within 2 e of the second. None if
        only the agreement is bounded.
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


SCALE = 16.0  # the largest logit for which the bounds of logits are not scaled up

BOUNDS = {
    "transformers": Bounds("float32", 1e-4, 1e-3, 1e-4, 2e-3, "float32 on both sides; sums are taken in another order"),
    "vllm": Bounds("float32", None, None, 1e-3, 2e-3, "float32, with its own kernels for attention, scan and convolution"),
    "mlx": Bounds("float32", 1e-3, None, 1e-3, 2e-3, "float32, with its own products in another order"),
    "llama.cpp": Bounds(
        "float16",
        None,
        None,
        None,
        None,
        "matrices, activations, keys and values in float16",
        kl=5e-3,
        agreement=0.97,
        perplexity=5e-3,
    ),
}
# Some students amplify the rounding of float32 beyond its bounds, such as a tiny student with large random weights. In
# float64 the difference vanishes.
IN_FLOAT64 = Bounds("float64", 1e-6, 1e-6, 1e-6, 1e-5, "float64 on both sides, where float32 rounds by more than its bounds")
# Engines without float32 kernels for a model, with the model_type of its config.json.
BFLOAT16 = {("vllm", "qwen3_5_text"), ("vllm", "qwen3_5")}
ROUNDED = Bounds(
    "bfloat16",
    None,
    None,
    None,
    None,
    "its gated-delta kernel takes only bfloat16: 8 bits of mantissa in every activation of every layer",
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

# llama.cpp with a float32 file, and with quantised files.
FLOAT32 = Bounds("float32", 1e-3, None, 1e-3, 2e-3, "float32, with its own products in another order; caches in float32")
QUANTISED = {
    "q8_0": Bounds(
        "q8_0",
        None,
        None,
        None,
        None,
        "blocks of 32 weights in 8 bits, activations too; the near ties of an unsure student flip at a KL of 0.004",
        kl=2e-2,
        perplexity=2e-2,
    ),
    "q4_k_m": Bounds(
        "q4_k_m",
        None,
        None,
        None,
        None,
        "4 to 6 bits a weight: the loss is reported, and only a broken model is refused",
        kl=1.0,
        perplexity=0.5,
    ),
}


def bounds_of(engine: str, model_type: str, form: "Form | None" = None) -> Bounds:
    """Return the bounds of an engine for a model of this type and form."""
    if engine == "llama.cpp" and form is not None and form.quantize:
        return QUANTISED[form.quantize]
    if engine == "llama.cpp" and form is not None and form.dtype == "float32":
        return FLOAT32
    if engine == "mlx" and model_type.startswith("qwen3_5") and (form is None or form.dtype != "float32"):
        return NORMS
    return ROUNDED if (engine, model_type) in BFLOAT16 else BOUNDS[engine]
