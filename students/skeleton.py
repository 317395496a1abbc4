"""Types of a student for type checkers; the actual class is made at run time.

A student's class is mixed into the transformers class of a family (`students.model`). Each part of it, such as `Generating`,
calls that class and the other parts; `Skeleton` declares what a part may call. `Student` is the whole class, for functions
that take or return a student. At run time the parts have no base, and `Student` is any transformers model.
"""

from typing import TYPE_CHECKING

from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

__all__ = ["Skeleton", "SkeletonConfig", "Student"]

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

    from transformers.cache_utils import Cache

    from students.config import Layout, Place, Shapes
    from students.meta_tokens import MetaTokens
    from students.model import StudentMixin as Student
    from students.rotary import LengthRules

    SkeletonConfig = PretrainedConfig

    class Skeleton(PreTrainedModel, GenerationMixin):
        layout: Layout
        place: Place
        shapes: Shapes
        givers: dict[int, int]
        newest: list[int]
        length_rules: LengthRules
        meta_tokens: MetaTokens | None
        entered: Callable[..., AbstractContextManager[dict]]
        new_cache: Callable[[], Cache]
        config: Any
        _prefill: Callable[..., Any]
        _keep_in_fp32_modules_strict: set[str]

else:
    Skeleton, SkeletonConfig, Student = object, object, PreTrainedModel
