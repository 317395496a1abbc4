"""What end-to-end training does to the layers that stay attention: which of their projections it leaves, and how fast the
depths of the student learn.

freeze       the queries' and keys' projections and norms of kept attention stay as they are. What hybrids recall, they look
             up there: training on chains of thought took recall of a hybrid of 9B at 256k from 67 % to 9 %, and putting back
             W_Q and W_K of its attention alone brought it back (arXiv 2606.11052).
layer_decay  a layer's rates are multiplied once for every layer above it, the embeddings' once for all layers, so that what
             lies lowest, and is most general, moves least (discriminative fine-tuning, arXiv 1801.06146; with one factor for
             all layers ELECTRA, arXiv 2003.10555, which uses 0.8 to 0.9).
"""

from collections.abc import Collection
from re import match

from torch import nn

from students.model import PREFIX
from students.skeleton import Student
from teachers.families import FAMILIES, Family


def check(student: Student, freeze: Collection[str]) -> None:
    """Refuse to freeze what there is none of, or what lies in one weight with what learns.

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
            f"{family.qkv[0]}, which learns as a whole; leave freeze out"
        )


def frozen(student: Student, freeze: Collection[str]) -> set[str]:
    """Names in the student of the parameters of kept attention that stay as they are: of q and k, their norms too."""
    if not freeze:
        return set()
    family, place = _family(student), student.place
    names = [found for letter in freeze for found in (family.qkv["qk".index(letter)], family.norms["qk".index(letter)])]
    kept = [layer for layer in range(len(student.layout.pattern)) if layer not in student.layout.converted]
    inside = tuple(f"{place.layers}.{layer}.{place.name}.{name}." for layer in kept for name in names)
    return {name for name, _ in student.named_parameters() if name.startswith(inside)}


def depth_factor(student: Student, name: str, decay: float) -> float:
    """What multiplies a parameter's rate: decay for every layer above its own. Embeddings, a head tied to them, and meta
    tokens stand below all layers; what follows the layers has none above it."""
    if decay == 1.0:
        return 1.0
    depth, place = len(student.layout.pattern), student.place.layers
    if inside := match(rf"{place.replace('.', '[.]')}[.](\d+)[.]", name):
        return decay ** (depth - 1 - int(inside[1]))
    lowest = {"meta_tokens.", *(f"{path}." for path, part in student.named_modules() if isinstance(part, nn.Embedding))}
    return decay**depth if name.startswith(tuple(lowest)) else 1.0


def _family(student: Student) -> Family:
    return FAMILIES[student.config.model_type.removeprefix(PREFIX)]
