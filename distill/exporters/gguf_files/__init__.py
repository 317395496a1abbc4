"""The table of llama.cpp's architectures, by the transformers class (`exporters.containers`) that each holds.

To add an architecture, write a file next to this one with an `Architecture`, and add a line to `ARCHITECTURES`.
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
    """Return llama.cpp's architecture for a transformers class; None if it has none."""
    if container not in ARCHITECTURES:
        return None
    module, _, attribute = ARCHITECTURES[container].partition(":")
    return getattr(import_module(module), attribute)()
