"""`make test-compile`: the kernels of decoding compiled for a Hopper GPU, on any machine.

The interpreter, which the suite runs kernels in, accepts what Triton's compiler refuses: a variable of two types in two
branches, for one. Here tiny teachers and students of every layout decode two tokens. A launch compiles its kernel for
compute capability 9.0 with the installed Triton and runs nothing; outputs are whatever the memory held. It needs no GPU, and
is a program of its own: Triton decides when it is imported whether it interprets.

    python -m tests.compile_kernels [LAYOUT]...     layouts of distill.benchmarks.layouts, or "teacher"; all by default
"""

import copy
import itertools
import os
import sys
from collections.abc import Iterator

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import nn
from transformers import LlamaConfig, Qwen3Config
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

import students
from distill.benchmarks.layouts import LAYOUTS
from distill.benchmarks.steps import random_teacher
from distill.build import build
from distill.evaluation.speed import in_bfloat16
from students import kernels
from students.config import Layout
from students.kernels import launch
from students.prompts import new_cache

MULTIPROCESSORS, SHARED_MEMORY = 132, 227 * 1024  # an H100's
SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip
PROMPT = 90  # tokens, more than the layouts' windows


class Hopper:
    """A driver of a GPU that is not there."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": MULTIPROCESSORS}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_only(failures: dict[str, set[str]], compiled: set[tuple[str, str]]) -> None:
    """From now on a launch compiles its kernel; what fails is noted by kernel."""
    driver.set_active(Hopper())
    run = jit.JITFunction.run

    def compiling(self, *arguments, grid, warmup, **options):
        name = f"{self.fn.__module__}.{self.fn.__name__}"
        try:
            compiled.add((name, str(getattr(run(self, *arguments, grid=grid, warmup=True, **options), "hash", ""))))
        except Exception as error:  # the compiler's are of every type
            failures.setdefault(name, set()).add(f"{type(error).__name__}: {str(error)[-600:]}")

    jit.JITFunction.run = compiling


def on_triton() -> None:
    """Let every op choose its Triton kernel for tensors of a CPU, where it has one that serves the call."""
    own = kernels.pick

    def pick(op, implementations, example, refusal=None, computes=None, checked=kernels.TYPES):
        refused = refusal() if callable(refusal) else refusal
        served = refused is None and "triton" in implementations and example.dtype in kernels.TYPES
        return implementations["triton" if served else "reference"]

    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "students"]:
        if getattr(module, "pick", None) is own:
            module.pick = pick
        if getattr(module, "multiprocessors", None) is launch.multiprocessors:
            module.multiprocessors = lambda tensor: MULTIPROCESSORS


def models(names: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Tiny teachers with and without norms on q and k, and their students of these layouts."""
    for kind in (LlamaConfig, Qwen3Config):
        teacher = random_teacher(kind(**SIZES), torch.device("cpu"), torch.float32)
        for name in names:
            if name == "teacher":
                yield f"{kind.model_type} {name}", teacher.model
                continue
            letters, mixers, meta_tokens = LAYOUTS[name]
            taken = itertools.cycle(letters)
            pattern = "".join("A" if layer % 4 == 0 else next(taken) for layer in range(SIZES["num_hidden_layers"]))
            used = {letter: options for letter, options in mixers.items() if letter in pattern}
            layout = Layout.over(len(pattern), pattern, used, meta_tokens)
            yield f"{kind.model_type} {name}", build(teacher, layout)[0]


@torch.no_grad()
def decode(model: nn.Module, rows: int) -> None:
    """A prompt and two tokens."""
    cache = new_cache(model)
    students.prefill(model, torch.randint(1, 500, (rows, PROMPT)), cache)
    decoder = students.Decoder(model, cache, 4)
    for _ in range(2):
        decoder(torch.ones(rows, 1, dtype=torch.long))


def main(names: list[str]) -> int:
    failures: dict[str, set[str]] = {}
    compiled: set[tuple[str, str]] = set()
    compile_only(failures, compiled)
    on_triton()
    for name, model in models(names or ["teacher", *LAYOUTS]):
        for rows, narrow in itertools.product((1, 3), (True, False)):
            decode(in_bfloat16(model) if narrow else copy.deepcopy(model), rows)
        print(f"{name}: {len(compiled)} kernels so far, {sum(map(len, failures.values()))} failures", flush=True)
    for kernel, said in failures.items():
        for one in said:
            print(f"{kernel} does not compile: {one}", file=sys.stderr)
    return 1 if failures or not compiled else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
