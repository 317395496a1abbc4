"""What a command works with, made once: device and precision, the teacher, the text, the held-out text."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
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

BATCH_TOKENS = {"cpu": 4096}  # of held-out text that one pass reads; elsewhere 32,768
SHORTEST = 8  # tokens of a text that a recipe can ask for


@dataclass
class Session:
    """Teacher, text and device of one recipe. The training text is prepared when it is first asked for."""

    recipe: Recipe
    accelerator: Accelerator
    teacher: Teacher
    heldout_windows: Windows

    @classmethod
    def open(cls, recipe: Recipe, project: Path | None = None, trains: bool = True) -> "Session":
        """Load and prepare everything; the training text only if `trains`.

        Raises:
            UserError: what the teacher, the text or the device refuses.
        """
        accelerator = make_accelerator(recipe, project)
        check_same(recipe.fingerprint, recipe.name, accelerator.device)
        set_seed(recipe.seed)
        smaller = f"the teacher's size (choose a smaller one){or_cpu(accelerator.device)}"
        with enough_memory(f"loading {recipe.teacher}", smaller):
            teacher = load_teacher(recipe, accelerator.device)
        check_length(recipe, teacher)
        with accelerator.main_process_first():  # the others find the text prepared
            session = cls(
                recipe,
                accelerator,
                teacher,
                text_windows(recipe, cast(PreTrainedTokenizerBase, teacher.tokenizer), "heldout"),
            )
            if trains:  # now, so that a mistake in the text shows before anything is written
                session.open_texts()
                check_windows(session.windows.count, session.windows.seq_len, accelerator.num_processes)
        return session

    def with_recipe(self, recipe: Recipe) -> "Session":
        """The same teacher, text and device for another recipe on the same text."""
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
        """The training text of a stage, in its windows."""
        return self._windows(text_of(self.recipe, entry))

    def stage_texts(self) -> dict[str, Windows]:
        """The texts that stages have in place of the recipe's, by the key of their sources."""
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
        """What stages read that have a text or a length of their own."""
        return {}

    @cached_property
    def windows(self) -> Windows:
        """The training text that stages read which have none of their own."""
        return text_windows(self.recipe, self._tokenizer, "train")

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return cast(PreTrainedTokenizerBase, self.teacher.tokenizer)

    @cached_property
    def overlap(self) -> dict | None:
        """How much of the held-out text is training text (see `distill.text.overlap`); None where the latter is neither open
        nor prepared."""
        texts = {text.sources: text for text in reversed(texts_of(self.recipe))}.values()  # each in one length
        if "windows" in vars(self):
            return overlap([self._windows(text) for text in texts], self.heldout_windows)
        try:
            found = [training_windows(self.recipe, self._tokenizer, text, make=False) for text in texts]
        except UserError:  # their files are elsewhere by now
            return None
        return overlap(found, self.heldout_windows)

    def heldout(self, tokens: int, length: int | None = None) -> Heldout:
        """So many held-out tokens of as many documents as can be, and the teacher's hidden states on them.

        Args:
            length: of the windows; the recipe's by default.

        Raises:
            UserError: none of them can be scored.
        """
        windows = self.heldout_windows
        last = selection_begins(windows.prepared) if windows.count > 1 else None
        return self._heldout(DocumentWindows(windows.prepared, length or windows.seq_len, last=last), tokens)

    def selection_text(self, tokens: int) -> Heldout:
        """As `heldout`, of the part that selections read and nothing else does.

        Raises:
            UserError: the text is too short to have such a part, or none of it can be scored.
        """
        windows = self.heldout_windows
        self.check_selection_text()
        first, probed = selection_begins(windows.prepared), self._probed()[0] * windows.seq_len
        last = probed if probed >= first + windows.seq_len else None
        return self._heldout(DocumentWindows(windows.prepared, windows.seq_len, first, last), tokens)

    def check_selection_text(self) -> None:
        """Refuse held-out text that has no part for a selection to read.

        Raises:
            UserError: giving its size.
        """
        windows = self.heldout_windows
        if windows.count < 2:
            raise UserError(
                f"the held-out text is {windows.meta.tokens:,} tokens, one window of {windows.seq_len}: a selection "
                "needs text that its student is not judged by; name more under data.heldout, or shorter windows"
            )

    def probe_batch(self) -> Batch:
        """The fixed batch that checkpoints are checked on: the last of the held-out text."""
        return self.heldout_windows.batch(*self._probed()).to(self.teacher.device)

    def calibration(self, window: int, text: Windows | None = None) -> Calibration:
        """Training text from a window on, for closed-form work: as many tokens at a time as the recipe's windows are.

        text: a stage's; the recipe's by default.
        """
        data, text = self.recipe.data, text or self.windows
        size = max(1, data.calibrated * data.seq_len // text.seq_len)

        def batches(tokens: int):
            count = max(1, tokens // text.seq_len)
            for offset in range(0, count, size):
                yield text.batch(window + offset, min(size, count - offset)).to(self.accelerator.device)

        return batches

    def _probed(self) -> tuple[int, int]:
        """The first window of the probe batch, and how many."""
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
    """accelerate's device and precision as the recipe asks.

    Raises:
        UserError: a GPU is asked for and there is none, or one process was started where several were asked for.
    """
    processes.check_launch()
    check_device(recipe)
    cuda = torch.cuda.is_available()
    on_gpu = cuda and recipe.device != "cpu"
    wide = recipe.precision == "float32" or (recipe.precision == "auto" and not on_gpu)
    if on_gpu and not wide:
        torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its gradients go wrong where layouts change: students.kernels.attention
    forget_precision()  # another run of this process may have had another
    if processes.count() > 1:
        check_backends(on_gpu)
    return Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)] if processes.count() > 1 else None,
        mixed_precision="no" if wide else "bf16",
        cpu=not on_gpu,
        log_with=(recipe.trackers or None) if project else None,  # what only judges a run tells no tracker
        project_dir=project,
    )


def check_device(recipe: Recipe) -> None:
    """Refuse a device that is not here.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but PyTorch sees no GPU here; set device=auto, or see `distill doctor`")


def check_windows(windows: int, length: int, count: int) -> None:
    """Refuse more processes than there are windows of so many tokens of training text.

    Raises:
        UserError: giving both numbers.
    """
    if windows < count:
        raise UserError(
            f"data.train is {windows} windows of {length} tokens, fewer than the {count} processes of this "
            "run: name more text, shorter windows (data.seq_len), or use fewer processes"
        )


def check_length(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse windows, and passkeys that a recipe asks for, that are longer than the teacher has positions for.

    Raises:
        UserError: naming the key and both lengths.
    """
    options, room = recipe.evaluation, teacher.positions(recipe.meta_tokens)
    if room is not None and room < SHORTEST:
        raise UserError(
            f"meta_tokens is {recipe.meta_tokens}, but {recipe.teacher} has positions for {room + recipe.meta_tokens} "
            f"tokens, which leaves {max(room, 0)} for a text; make it {room + recipe.meta_tokens - SHORTEST} or less"
        )
    before = f" behind {recipe.meta_tokens} meta tokens" if recipe.meta_tokens else ""
    lengths: list[tuple[str, int | None]] = [(text.length_key, text.seq_len) for text in texts_of(recipe)]
    lengths += [("evaluation.seq_len", options.seq_len)]
    if "passkey" in options.model_fields_set:  # the usual ones are left out where they are too long
        lengths += [("evaluation.passkey", length) for length in options.passkey]
    for key, length in lengths:
        if room is not None and length and length > room:
            raise UserError(
                f"{key} is {length}{before}, but {recipe.teacher} has positions for {room + recipe.meta_tokens} tokens; "
                f"make it {room} or less"
            )
