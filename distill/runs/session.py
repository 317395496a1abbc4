"""The session of a command: device and precision, the teacher, the training and the held-out text, made once."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from transformers import PreTrainedTokenizerBase

from distill import processes
from distill.compat import forget_precision
from distill.errors import UserError
from distill.loading import load_teacher
from distill.memory import enough_memory, or_cpu
from distill.recipe import Recipe
from distill.runs.texts import text_windows, training_windows
from distill.runs.together import PATIENCE, check_backends, check_same
from distill.stages import StageEntry
from distill.stages.texts import StageText, own_sources, text_of, texts_of, usual_text
from distill.text.by_document import DocumentWindows, selection_begins
from distill.text.heldout import Heldout
from distill.text.overlap import overlap
from distill.text.windows import Batch, Calibration, Windows
from teachers.teacher import Teacher

BATCH_TOKENS = {"cpu": 4096}  # held-out tokens of one forward pass; on other devices 32,768
SHORTEST = 8  # the smallest number of tokens that a recipe may set as a length


@dataclass
class Session:
    """Teacher, text and device of one recipe. The training text is prepared when it is first needed."""

    recipe: Recipe
    accelerator: Accelerator
    teacher: Teacher
    heldout_windows: Windows

    @classmethod
    def open(cls, recipe: Recipe, project: Path | None = None, trains: bool = True) -> "Session":
        """Load the teacher and prepare the texts; training text only if `trains`.

        Raises:
            UserError: the teacher, a text or the device cannot be used.
        """
        accelerator = make_accelerator(recipe, project)
        check_same(recipe.fingerprint, recipe.name, accelerator.device)
        set_seed(recipe.seed)
        smaller = f"the teacher's size (choose a smaller one){or_cpu(accelerator.device)}"
        with enough_memory(f"loading {recipe.teacher}", smaller):
            teacher = load_teacher(recipe, accelerator.device)
        check_length(recipe, teacher)
        with accelerator.main_process_first():  # so that the others find the text prepared
            session = cls(
                recipe,
                accelerator,
                teacher,
                text_windows(recipe, cast(PreTrainedTokenizerBase, teacher.tokenizer), "heldout"),
            )
            if trains:  # early, so that an error in the text is raised before anything is written
                session.open_texts()
                check_windows(session.windows.count, session.windows.seq_len, accelerator.num_processes)
        return session

    def with_recipe(self, recipe: Recipe) -> "Session":
        """A session with the same teacher, text and device for another recipe on the same text."""
        other = replace(self, recipe=recipe)
        for name in ("windows", "overlap", "_opened"):
            if name in vars(self):
                vars(other)[name] = vars(self)[name]
        return other

    def open_texts(self) -> None:
        """Prepare and open every text that a stage reads."""
        for text in texts_of(self.recipe):
            self._windows(text)

    def windows_of(self, entry: StageEntry) -> Windows:
        """The training text of a stage in windows of its length."""
        return self._windows(text_of(self.recipe, entry))

    def stage_texts(self) -> dict[str, Windows]:
        """The texts that stages have in place of `data.train`, by the key of their sources."""
        own = own_sources(self.recipe)
        return {text.where: self._windows(text) for text in texts_of(self.recipe) if text.where in own}

    def _windows(self, text: StageText) -> Windows:
        if text.key == usual_text(self.recipe).key:
            return self.windows
        if text.key not in self._opened:
            self._opened[text.key] = training_windows(self.recipe, self._tokenizer, text)
        return self._opened[text.key]

    @cached_property
    def _opened(self) -> dict[tuple, Windows]:
        """The windows of stages with a text or a length of their own."""
        return {}

    @cached_property
    def windows(self) -> Windows:
        """The windows of `data.train`, for stages without a text or a length of their own."""
        return text_windows(self.recipe, self._tokenizer, "train")

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return cast(PreTrainedTokenizerBase, self.teacher.tokenizer)

    @cached_property
    def overlap(self) -> dict | None:
        """The overlap of held-out and training text (see `distill.text.overlap`); None if the training text is neither open
        nor prepared."""
        texts = {text.sources: text for text in reversed(texts_of(self.recipe))}.values()  # one length for each text
        if "windows" in vars(self):
            return overlap([self._windows(text) for text in texts], self.heldout_windows)
        try:
            found = [training_windows(self.recipe, self._tokenizer, text, make=False) for text in texts]
        except UserError:  # the files of the texts are gone
            return None
        return overlap(found, self.heldout_windows)

    def heldout(self, tokens: int, length: int | None = None) -> Heldout:
        """`tokens` held-out tokens from as many documents as possible, with the teacher's hidden states.

        Args:
            length: of the windows; the recipe's by default.

        Raises:
            UserError: none of the tokens can be scored.
        """
        windows = self.heldout_windows
        last = selection_begins(windows.prepared) if windows.count > 1 else None
        return self._heldout(DocumentWindows(windows.prepared, length or windows.seq_len, last=last), tokens)

    def selection_text(self, tokens: int) -> Heldout:
        """As `heldout`, from the part of the text that only selections read.

        Raises:
            UserError: the text is too short to have such a part, or none of its tokens can be scored.
        """
        windows = self.heldout_windows
        self.check_selection_text()
        first, probed = selection_begins(windows.prepared), self._probed()[0] * windows.seq_len
        last = probed if probed >= first + windows.seq_len else None
        return self._heldout(DocumentWindows(windows.prepared, windows.seq_len, first, last), tokens)

    def check_selection_text(self) -> None:
        """Refuse held-out text that is too short to have a part for selections.

        Raises:
            UserError: giving its size.
        """
        windows = self.heldout_windows
        if windows.count < 2:
            raise UserError(
                f"the held-out text is {windows.meta.tokens:,} tokens, one window of {windows.seq_len}, but a selection "
                "needs text that its student is not evaluated on; name more text under data.heldout, or shorter windows"
            )

    def probe_batch(self) -> Batch:
        """The fixed batch on which checkpoints are verified: the last windows of the held-out text."""
        return self.heldout_windows.batch(*self._probed()).to(self.teacher.device)

    def calibration(self, window: int, text: Windows | None = None) -> Calibration:
        """Batches of training text from window `window` on, for closed-form work.

        Batches have about the same number of tokens for every length of windows. text: a stage's; the recipe's by default.
        """
        data, text = self.recipe.data, text or self.windows
        size = max(1, data.calibrated * data.seq_len // text.seq_len)

        def batches(tokens: int):
            count = max(1, tokens // text.seq_len)
            for offset in range(0, count, size):
                yield text.batch(window + offset, min(size, count - offset)).to(self.accelerator.device)

        return batches

    def _probed(self) -> tuple[int, int]:
        """The first window of the probe batch, and the number of windows."""
        windows = self.heldout_windows
        count = min(windows.count, max(1, self.recipe.evaluation.probe_tokens // windows.seq_len))
        return windows.count - count, count

    def _heldout(self, windows: DocumentWindows, tokens: int) -> Heldout:
        size = max(1, BATCH_TOKENS.get(self.teacher.device.type, 32_768) // windows.seq_len)
        batches, documents = zip(*windows.batches(tokens, size), strict=True)
        with self.accelerator.autocast():
            alone = self.accelerator.num_processes == 1
            return Heldout.of(self.teacher, batches, self.heldout_windows.label_names, documents, at_once=alone)


def make_accelerator(recipe: Recipe, project: Path | None) -> Accelerator:
    """Make an Accelerator with the device and precision of the recipe.

    Raises:
        UserError: the recipe wants a GPU and there is none, or a launcher was told several processes and started one.
    """
    processes.check_launch()
    check_device(recipe)
    cuda = torch.cuda.is_available()
    on_gpu = cuda and recipe.device != "cpu"
    wide = recipe.precision == "float32" or (recipe.precision == "auto" and not on_gpu)
    if on_gpu and not wide:
        torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # wrong gradients for some tensor layouts: see students.kernels.attention
    forget_precision()  # an earlier run of this process may have set another
    if processes.count() > 1:
        check_backends(on_gpu)
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)] if processes.count() > 1 else None,
        mixed_precision="no" if wide else "bf16",
        cpu=not on_gpu,
        log_with=(recipe.trackers or None) if project else None,  # evaluations of a run do not log to trackers
        project_dir=project,
    )
    if dist.is_available() and dist.is_initialized():
        processes.leave_at_exit()
    return accelerator


def check_device(recipe: Recipe) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        UserError: the recipe wants a GPU and there is none.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but PyTorch sees no GPU here; set device=auto, or see `distill doctor`")


def check_windows(windows: int, length: int, count: int) -> None:
    """Refuse more processes than windows of training text. length: tokens of a window. count: of processes.

    Raises:
        UserError: giving both numbers.
    """
    if windows < count:
        raise UserError(
            f"data.train is {windows} windows of {length} tokens, fewer than the {count} processes of this "
            "run: name more text, shorter windows (data.seq_len), or use fewer processes"
        )


def check_length(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse windows, and passkey lengths that a recipe sets, that are longer than the teacher's positions.

    Raises:
        UserError: naming the key and both lengths.
    """
    options, room = recipe.evaluation, teacher.positions(recipe.meta_tokens)
    if room is not None and room < SHORTEST:
        raise UserError(
            f"meta_tokens is {recipe.meta_tokens}, but {recipe.teacher} has positions for {room + recipe.meta_tokens} "
            f"tokens, which leaves {max(room, 0)} for a text; make it {room + recipe.meta_tokens - SHORTEST} or less"
        )
    before = f" after {recipe.meta_tokens} meta tokens" if recipe.meta_tokens else ""
    lengths: list[tuple[str, int | None]] = [(text.length_key, text.seq_len) for text in texts_of(recipe)]
    lengths += [("evaluation.seq_len", options.seq_len)]
    if "passkey" in options.model_fields_set:  # default lengths that are too long are skipped
        lengths += [("evaluation.passkey", length) for length in options.passkey]
    for key, length in lengths:
        if room is not None and length and length > room:
            raise UserError(
                f"{key} is {length}{before}, but {recipe.teacher} has positions for {room + recipe.meta_tokens} tokens; "
                f"make it {room} or less"
            )
