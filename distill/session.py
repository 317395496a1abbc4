"""What a command works with, made once: device and precision, the teacher, the text, the held-out text."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

import teachers
from distill.data import Batch, Windows
from distill.errors import UserError
from distill.evaluate.fidelity import Heldout
from distill.prepare import prepare
from distill.recipe import Recipe
from teachers.teacher import Teacher


@dataclass
class Session:
    """Teacher, text and device of one recipe."""

    recipe: Recipe
    accelerator: Accelerator
    teacher: Teacher
    windows: Windows
    heldout_windows: Windows

    @classmethod
    def open(cls, recipe: Recipe, project: Path | None = None) -> "Session":
        """Load and prepare everything.

        Raises:
            UserError: what the teacher, the text or the device refuses.
        """
        accelerator = make_accelerator(recipe, project)
        set_seed(recipe.seed)
        teacher = load_teacher(recipe, accelerator.device)
        with accelerator.main_process_first():
            windows, heldout = (text_windows(recipe, teacher.tokenizer, part) for part in ("train", "heldout"))
        return cls(recipe, accelerator, teacher, windows, heldout)

    def heldout(self, tokens: int) -> Heldout:
        """The first so many held-out tokens, and the teacher's hidden states on them."""
        with self.accelerator.autocast():
            return Heldout.of(self.teacher, self._heldout_batches(tokens), self.heldout_windows.label_names)

    def probe_batch(self) -> Batch:
        """The fixed batch that checkpoints are checked on: the last of the held-out text."""
        count = max(1, self.recipe.evaluation.probe_tokens // self.heldout_windows.seq_len)
        first = max(0, self.heldout_windows.count - count)
        return self.heldout_windows.batch(first, min(count, self.heldout_windows.count)).to(self.teacher.device)

    def _heldout_batches(self, tokens: int) -> list[Batch]:
        length = self.heldout_windows.seq_len
        count = min(math.ceil(tokens / length), self.heldout_windows.count)
        size = max(1, min(count, 4096 // length if self.teacher.device.type == "cpu" else 32_768 // length))
        return [self.heldout_windows.batch(first, min(size, count - first)) for first in range(0, count, size)]


def make_accelerator(recipe: Recipe, project: Path | None) -> Accelerator:
    """accelerate's device and precision as the recipe asks.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    if recipe.device == "cuda" and not cuda:
        raise UserError("device is 'cuda', but PyTorch sees no GPU here; set device=auto, or see `distill doctor`")
    on_gpu = cuda and recipe.device != "cpu"
    wide = recipe.precision == "float32" or (recipe.precision == "auto" and not on_gpu)
    if on_gpu and not wide:
        torch.set_float32_matmul_precision("high")
    AcceleratorState._reset_state(reset_partial_state=False)  # another run of this process may have had another precision
    return Accelerator(
        mixed_precision="no" if wide else "bf16",
        cpu=not on_gpu,
        log_with=(recipe.trackers or None) if project else None,  # what only judges a run tells no tracker
        project_dir=project,
    )


def load_teacher(recipe: Recipe, device: torch.device) -> Teacher:
    """The recipe's teacher.

    Raises:
        UserError: it cannot be found, read or used.
    """
    try:
        return teachers.load(
            recipe.teacher,
            device=device,
            trust_remote_code=recipe.teacher_trust_remote_code,
            allow_pickle=recipe.teacher_pickle,
        )
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise UserError(f"teacher: {error}") from error


def text_windows(recipe: Recipe, tokenizer, part: str) -> Windows:
    """The training or held-out text in windows."""
    data = recipe.data
    sources = getattr(data, part)
    limit = data.limit if part == "train" else None
    if limit is None and any(source.hub for source in sources):  # a hub stream has no end worth waiting for
        needed = sum(options.tokens for _, options in recipe.stage_options())
        limit = needed if part == "train" else 4 * (recipe.evaluation.final_tokens or recipe.evaluation.tokens)
    folder = prepare(sources, tokenizer, separator=data.separator, seed=recipe.seed, limit=limit, where=f"data.{part}")
    if part == "train":
        return Windows(folder, data.seq_len, recipe.seed)
    return Windows(folder, recipe.evaluation.seq_len or data.seq_len, None)


def deadline(minutes: float | None) -> float:
    """The monotonic time at which so many minutes are over."""
    return math.inf if minutes is None else time.monotonic() + 60 * minutes
