"""The options `freeze` and `layer_decay` of end-to-end training: frozen projections of kept attention, rates by depth.

freeze       keeps the projections and norms of queries and keys in kept attention unchanged. Hybrids recall through these
             layers: training on chains of thought took the recall of a 9B hybrid at 256k from 67 % to 9 %, and restoring
             W_Q and W_K of its attention alone brought it back (arXiv 2606.11052).
layer_decay  multiplies a layer's learning rate by this factor once for every layer above it, and that of the embeddings
             once for every layer. The lowest layers, which are the most general, change least (discriminative fine-tuning,
             arXiv 1801.06146; ELECTRA, arXiv 2003.10555, has one factor for all layers and uses 0.8 to 0.9).
"""

from collections.abc import Collection
from re import match

from torch import nn

from students.model import PREFIX
from students.skeleton import Student
from teachers.families import FAMILIES, Family


def check(student: Student, freeze: Collection[str]) -> None:
    """Refuse `freeze` if no layer keeps attention, or if queries and keys share one weight with the values.

    Raises:
        ValueError: naming the option and the reason.
    """
    if not freeze:
        return
    if len(student.layout.converted) == len(student.layout.pattern):
        raise ValueError(f"freeze is {list(freeze)}, but no layer of the student keeps attention; leave freeze out")
    family = _family(student)
    if family.packing != "separate":
        raise ValueError(
            f"freeze is {list(freeze)}, but {family.examples} keep queries, keys and values in one weight, "
            f"{family.qkv[0]}, which can only be trained or frozen as a whole; leave freeze out"
        )


def frozen(student: Student, freeze: Collection[str]) -> set[str]:
    """Names of the student's frozen parameters: the q or k projections of kept attention, with their norms."""
    if not freeze:
        return set()
    family, place = _family(student), student.place
    names = [found for letter in freeze for found in (family.qkv["qk".index(letter)], family.norms["qk".index(letter)])]
    kept = [layer for layer in range(len(student.layout.pattern)) if layer not in student.layout.converted]
    inside = tuple(f"{place.layers}.{layer}.{place.name}.{name}." for layer in kept for name in names)
    return {name for name, _ in student.named_parameters() if name.startswith(inside)}


def depth_factor(student: Student, name: str, decay: float) -> float:
    """The factor of a parameter's learning rate: `decay` to the power of the number of layers above it.

    Embeddings, a head tied to them, and meta tokens are below all layers. What follows the layers has none above it."""
    if decay == 1.0:
        return 1.0
    depth, place = len(student.layout.pattern), student.place.layers
    if inside := match(rf"{place.replace('.', '[.]')}[.](\d+)[.]", name):
        return decay ** (depth - 1 - int(inside[1]))
    lowest = {"meta_tokens.", *(f"{path}." for path, part in student.named_modules() if isinstance(part, nn.Embedding))}
    return decay**depth if name.startswith(tuple(lowest)) else 1.0


def _family(student: Student) -> Family:
    return FAMILIES[student.config.model_type.removeprefix(PREFIX)]
