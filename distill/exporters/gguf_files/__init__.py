"""The table of llama.cpp's architectures, by the class of transformers (`exporters.containers`) that each holds.

To add one: a file beside this one with an `Architecture`, and a line here.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.exporters.gguf_files.architecture import Architecture

ARCHITECTURES = {
    "GraniteMoeHybridForCausalLM": "distill.exporters.gguf_files.granitehybrid:GraniteHybrid",
    "Qwen3_5ForCausalLM": "distill.exporters.gguf_files.qwen35:Qwen35",
    "FalconH1ForCausalLM": "distill.exporters.gguf_files.falcon_h1:FalconH1",
}


def architecture_of(container: str) -> "Architecture | None":
    """How llama.cpp has a class of transformers; None where it does not."""
    if container not in ARCHITECTURES:
        return None
    module, _, attribute = ARCHITECTURES[container].partition(":")
    return getattr(import_module(module), attribute)()
