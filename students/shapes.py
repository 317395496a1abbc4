"""The letters of tensor shapes in this package, and the array types that use them.

b batch        t time (tokens)     h head          g group of heads sharing B and C
n state        p value (channels of a head)         k term of a mixer's output
d model width  c channel           v vocabulary     r rotary width

The annotations are checked in the tests (pytest turns jaxtyping on) and cost nothing elsewhere.
"""

from jaxtyping import Bool, Float, Int

__all__ = ["Bool", "Float", "Int"]
