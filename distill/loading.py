"""Loading of teachers and students by name. A failure becomes one `UserError`."""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

import students
import teachers
from distill.errors import UserError, reason_of
from distill.memory import ran_out
from distill.recipe import Recipe, Selected
from distill.schema import Schema, explain
from distill.shipped import shipped_folder
from distill.teacher_type import teacher_type
from students.skeleton import Student
from teachers import folder, gguf
from teachers.checks import check_size, panicked, plain
from teachers.fingerprint import difference
from teachers.folder import check_tokenizer_files
from teachers.foreign import ADAPTER_FILES, plain_config
from teachers.quiet import no_panics
from teachers.source import resolve
from teachers.teacher import Teacher

TRUST = "give --trust-remote-code if you have read it and trust it"


def load_teacher(recipe: Recipe, device: torch.device) -> Teacher:
    """Load the recipe's teacher.

    Raises:
        UserError: it cannot be found, read or used.
    """
    try:
        teacher = teachers.load(
            recipe.teacher,
            device=device,
            dtype=teacher_type(recipe, device),
            trust_remote_code=recipe.teacher_trust_remote_code,
            allow_pickle=recipe.teacher_pickle,
            ignore=recipe.teacher_ignore,
        )
        if recipe.teacher_dtype == "int8":
            teacher.quantise()
        return teacher
    except (ValueError, OSError, ImportError) as error:
        raise _no_teacher(recipe, error) from error


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the recipe's teacher, without the weights.

    Raises:
        UserError: it cannot be found or read.
    """
    try:
        return teachers.load_tokenizer(
            recipe.teacher, trust_remote_code=recipe.teacher_trust_remote_code, allow_pickle=recipe.teacher_pickle
        )
    except (ValueError, OSError, ImportError) as error:
        raise _no_teacher(recipe, error) from error


def teacher_config(recipe: Recipe) -> PretrainedConfig:
    """The teacher's config: from a folder, the hub, a snapshot shipped under recipes/configs, or the GGUF file.

    Raises:
        UserError: it cannot be found or read.
    """
    name = re.sub(r"([.-]q\d\w*)?\.gguf$", "", recipe.teacher.rpartition("/")[2].lower())
    snapshot = shipped_folder() / "configs" / f"{name}.json"
    if snapshot.is_file() and not Path(recipe.teacher).exists():
        return AutoConfig.from_pretrained(snapshot)
    try:
        source = resolve(recipe.teacher, recipe.teacher_pickle)
        location = source.location
        if source.kind == "gguf":
            return gguf.config(Path(location))
        config = folder.teacher_config(recipe.teacher, location, recipe.teacher_trust_remote_code)
        plain_config(recipe.teacher, config, location)
        return config
    except (OSError, ValueError, ImportError) as error:
        raise _no_teacher(recipe, error) from error


def _no_teacher(recipe: Recipe, error: Exception) -> UserError:
    """The message that a teacher cannot be loaded. A reference like `models/my-qwen` is a hub id where no such folder is."""
    place = Path(recipe.teacher)
    here = f"there is no folder {place} here (looked from {Path.cwd()}), and as a hub id: "
    named = len(place.parts) == 2 and place.parent.is_dir() and not place.exists()
    return UserError(f"teacher: {here if named else ''}{error}")


def load_student(path: str | Path, trust_remote_code: bool = False) -> Student:
    """Load a student from a folder or a hub id, in float32 and in evaluation mode.

    Args:
        trust_remote_code: run the code in its folder, if the student is of a kind that this version does not know.

    Raises:
        UserError: there is no student, its files are damaged, or only its own code could load it.
    """
    if not os.path.exists(path) and str(path).count("/") != 1:  # a hub id has exactly one slash
        raise UserError(
            f"{path} cannot be loaded as a student: there is no such folder; name a run folder or a whole student's folder"
        )
    parent = Path(path).parent
    if not os.path.exists(path) and parent.is_dir():
        alike = sorted(str(other) for other in parent.glob(f"{glob.escape(Path(path).name)}*"))
        absent = f" in {parent}; name a run folder or a student's folder"
        meant = f"; did you mean {', '.join(alike[:5])}?" if alike else absent
        raise UserError(f"{path} cannot be loaded as a student: there is no such folder{meant}")
    check_student_files(path)
    with _as_student(path):
        if Path(path).is_dir():
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            check_size(str(path), lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
        return students.load(path, trust_remote_code=trust_remote_code, dtype=torch.float32).eval()


def student_config(path: Path) -> PretrainedConfig:
    """Load a student's config from its folder, without the weights.

    Raises:
        UserError: it cannot be read, or is not of a student that this version knows.
    """
    with _as_student(path):
        folder.read_config(path / folder.CONFIG)
        return AutoConfig.from_pretrained(path)


def load_student_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a student's tokenizer from a folder or a hub id.

    Raises:
        UserError: it cannot be loaded, or only its own code could load it.
    """
    try:
        if path.is_dir():
            check_tokenizer_files(path)
        with no_panics():
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except BaseException as error:  # transformers raises exceptions of any type on damaged files
        if not isinstance(error, Exception) and not panicked(error):
            raise
        said = plain(str(error))
        if "trust_remote_code" in said:
            raise UserError(f"the tokenizer in {path} comes with its own code, which is not run: {TRUST}") from error
        if isinstance(error, TypeError | AttributeError | KeyError | IndexError) or not said:
            said = "its files do not hold a tokenizer"
        raise UserError(
            f"the tokenizer in {path} cannot be loaded: {said}; copy the teacher's tokenizer files there"
        ) from error


@contextmanager
def _as_student(path: str | Path) -> Iterator[None]:
    """Turn the exceptions of any type that transformers raises on damaged files inside the block into one message."""
    try:
        yield
    except Exception as error:
        if ran_out(error):
            raise
        said = reason_of(error)
        if "trust_remote_code" in said:
            raise UserError(
                f"{path} is not a student that this version knows, and comes with its own code, which is not run: if you "
                "have read it and trust it, give --trust-remote-code to generate, or trust_remote_code=True to students.load"
            ) from error
        if not said or isinstance(error, TypeError | AttributeError | LookupError | AssertionError | RecursionError):
            said = "the entries of its config.json or generation_config.json contradict each other"
        raise UserError(
            f"{path} cannot be loaded as a student: {said}; name a run folder or a whole student's folder"
        ) from error


class MadeFrom(Schema):
    """The entry of a student's config.json on its teacher; empty if another program made the student."""

    reference: str | None = None
    fingerprint: str | None = None


class MadeOf(Schema):
    """The entries of a student's config.json on how it was made."""

    teacher: MadeFrom = MadeFrom()
    selected: Selected | None = None


def made_of(student: Student, path: str | Path) -> MadeOf:
    """A student's teacher and the scorer that selected its layout, from its config.json.

    Raises:
        UserError: the entries of config.json are invalid.
    """
    entries = {name: value for name, value in student.config.distill.items() if name in MadeOf.model_fields}
    try:
        return MadeOf(**entries)
    except ValidationError as error:
        raise UserError(explain(error, f"{path}: config.json's distill", MadeOf)) from error


def check_student_files(path: str | Path) -> None:
    """Refuse damaged files of a student's folder before transformers reads them. A hub id is not checked.

    Raises:
        UserError: naming the file.
    """
    if not Path(path).is_dir():
        return
    place = Path(path)
    with _as_student(path):
        folder.check_files(place)
        folder.read_config(place / folder.CONFIG)
        folder.check_settings(place)
        folder.check_weight_files(place, allow_pickle=False)
        for name in ADAPTER_FILES:
            if Path(name).suffix in folder.PICKLES and (place / name).exists():
                raise ValueError(f"{name} is an adapter as a pickle, and unpickling runs code: convert it to safetensors")


def check_vocabulary(config: PretrainedConfig, teacher: Teacher, path: str | Path) -> None:
    """Refuse a student whose vocabulary has another size than the teacher's. config: the student's.

    Raises:
        UserError: naming both sizes.
    """
    if config.vocab_size != teacher.config.vocab_size:
        raise UserError(
            f"{path} has a vocabulary of {config.vocab_size}, but the teacher {teacher.reference} one of "
            f"{teacher.config.vocab_size}: they cannot be compared token by token"
        )


def check_teacher(student: Student, teacher: Teacher, path: str | Path) -> None:
    """Refuse to compare a student with a teacher that is not its own.

    Raises:
        UserError: the vocabulary or the fingerprint differs from the teacher that the student was made from.
    """
    check_vocabulary(student.config, teacher, path)
    made_from = made_of(student, path).teacher
    if part := difference(made_from.fingerprint or teacher.fingerprint, teacher.fingerprint):
        raise UserError(
            f"{path} was distilled from {made_from.reference} (fingerprint {made_from.fingerprint}), not from "
            f"{teacher.reference} (fingerprint {teacher.fingerprint}): they differ in the {part}; pass its own "
            "teacher with --teacher"
        )
