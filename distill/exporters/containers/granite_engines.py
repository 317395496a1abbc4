"""The engines that run a GraniteMoeHybrid, from their source code: transformers 5.17 to 5.24, vLLM 0.32, mlx-lm 0.32.2.

For llama.cpp, the target `gguf` decides.
"""

from typing import TYPE_CHECKING

import transformers
from packaging.version import Version

from distill.exporters.containers import kept_attention, stock_mamba2

if TYPE_CHECKING:
    from distill.exporters.source import Source

VLLM_TAPS = (2, 3, 4, 5)  # widths of vLLM's convolution kernels


def engines(source: "Source", since: str | None) -> dict[str, str | None]:
    """Return, for each engine but llama.cpp, why it does not run the student; None if it does."""
    shape = source.shapes.at(kept_attention.layers(source)[0])
    sizes = stock_mamba2.known_sizes(source, stock_mamba2.layers(source)[0])
    rope = source.config.rope_parameters.get("rope_type", "default")
    rotary = kept_attention.rope_of(source, kept_attention.layers(source)[0]) is not None
    found: dict[str, list[str]] = {"transformers": [], "vllm": [], "mlx": []}
    if since and Version(transformers.__version__) < Version(since):
        found["transformers"].append(
            f"its norm is over each of the {sizes.all_groups} groups only from version {since} on; version "
            f"{transformers.__version__} is installed"
        )
    if shape.head_dim * shape.n_heads != shape.d_model:
        for engine in ("vllm", "mlx"):
            found[engine].append(
                f"it takes heads of {shape.d_model / shape.n_heads:g} channels (hidden / heads), but the student's have "
                f"{shape.head_dim}"
            )
    if sizes.all_taps not in VLLM_TAPS:
        found["vllm"].append(f"its convolution has at most {VLLM_TAPS[-1]} taps, but d_conv is {sizes.all_taps}")
    if sizes.all_groups > 1:
        found["mlx"].append(
            f"its gated norm is over all channels at once, not over {sizes.all_groups} groups; set n_groups: 1"
        )
    if rotary and rope != "default":
        found["mlx"].append(f"it ignores the rope scaling {rope}")
    return {engine: "; ".join(why) or None for engine, why in found.items()}
