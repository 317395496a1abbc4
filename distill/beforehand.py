"""The Python API of what stands before a run: recipes, prepared text, cached logits, questions and answers.

Imports stand inside the functions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from distill.recipe_file import AnyRecipe


def recipes() -> list[dict[str, str]]:
    """The shipped recipes: name, teacher, and what the first comment says."""
    from distill.shipped import list_recipes

    return list_recipes()


def recipe_text(name: str) -> str:
    """A shipped recipe as it is written; a UserError says that there is none."""
    from distill.shipped import find_shipped

    return find_shipped(name).read_text(encoding="utf-8")


def copy_recipe(name: str, target: str | Path = ".") -> Path:
    """Copy a shipped recipe to a file or into a folder, to change it; the new file's path. A UserError says why not.

    The JSON schema of recipes, which its first line names to editors, is copied beside it; another file of that name stays.
    """
    from distill.shipped import copy_shipped

    return copy_shipped(name, Path(target))


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipes: every key with its type, default, range and meaning, for editors and other programs."""
    from distill.reference import json_schema

    return json_schema.recipe_schema()


def prepare(
    recipe: "AnyRecipe",
    *,
    overrides: str | Sequence[str] = (),
    processes: int | None = None,
    console: "Console | None" = None,
    show: int = 0,
) -> dict[str, Any]:
    """Prepare the texts of a recipe: tokenise them in shards, so that runs find them. A call that was stopped goes on.

    Args:
        recipe, overrides: as in `plan`. processes: that tokenise; by the cores and the size of each text by default. The
            result is the same with any number. console: where progress is shown (the standard error). show: so many
            documents of each text are in the result token by token, with what is trained on.

    Returns:
        what the docstring of `distill.runs.preparing.prepare_texts` says.

    Raises:
        UserError: anything that the user can mend.
    """
    from distill.console import new_console
    from distill.ranges import PREPARING, SHOWN
    from distill.recipe_file import load
    from distill.runs.preparing import prepare_texts

    if processes is not None:
        PREPARING.check(processes, "processes")
    SHOWN.check(show, "show")
    return prepare_texts(load(recipe, overrides), processes, console or new_console(stderr=True), show)


def cache(
    recipe: "AnyRecipe",
    *,
    overrides: str | Sequence[str] = (),
    out: str | Path | None = None,
    top_k: int = 128,
    stage: str | int | None = None,
    stop_after: float | None = None,
    console: "Console | None" = None,
) -> Path:
    """Write a teacher's likeliest tokens of the windows that a recipe's imitate stage reads, for `imitate.offline_logits`.

    Windows that are there already stay: a call that was stopped goes on, and a longer recipe adds what it needs.

    Args:
        recipe, overrides: as in `plan`. out: the folder; by default the stage's own offline_logits, else one in the cache
            named by what it holds. top_k: tokens that are kept of each distribution. stage: the number of one of several
            such stages. stop_after: minutes after which to stop. console: where progress is shown (the standard error).

    Returns:
        the folder.

    Raises:
        UserError: anything that the user can mend. Interrupted: stopped early, every whole shard kept.
    """
    from distill.caching import write_cache
    from distill.ranges import TOP_K
    from distill.recipe_file import load
    from distill.runs.stopper import Stopper, deadline

    top_k, stopper = TOP_K.check(top_k, "--top-k"), Stopper(deadline(stop_after))
    stage = None if stage is None else str(stage)
    return write_cache(load(recipe, overrides), out=out, top_k=top_k, stage=stage, stopper=stopper, console=console)


def answers(
    recipe: "AnyRecipe",
    *,
    overrides: str | Sequence[str] = (),
    data: str | None = None,
    out: str | Path | None = None,
    student: str | Path | None = None,
    pairs: bool = False,
    plan: bool = False,
    tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch: int | None = None,
    limit: int | None = None,
    unfinished: bool = False,
    stop_after: float | None = None,
    console: "Console | None" = None,
) -> dict[str, Any]:
    """Let a recipe's teacher answer prompts, into shards of JSON lines that are a source of text. A call that was stopped
    goes on, to the same bytes.

    Args:
        recipe, overrides: as in `plan`. data: files (a glob) of rows with a `prompt`, or with `messages` whose last answer
            is dropped; data.train by default. out: the folder; one in the cache named by what it holds by default. student:
            a run folder or a student, to answer in the teacher's place. pairs: write pairs of the row's own answer (chosen)
            and the model's (rejected) where their final answers differ. plan: only say how many tokens that is.
        tokens: of an answer at most. temperature: 0 takes the likeliest token. top_p: of the distribution, the likeliest
            tokens that hold so much of it. seed: of what is drawn, with a row's number. batch: prompts at once (8 on a CPU,
            64 on a GPU). limit: prompts at most. unfinished: write answers that were cut off too, marked.
        stop_after: minutes after which to stop. console: where progress is shown (the standard error).

    Returns:
        prompts, prompt_tokens, most_tokens; and but for a plan tokens, the folder, how tokens were made (decoding), and how
        many prompts came to what: answered, unfinished, empty; of pairs too pairs, right, unstated, no_reference.

    Raises:
        UserError: anything that the user can mend. Interrupted: stopped early, every whole shard kept.
    """
    from distill import ranges
    from distill.answering import answer
    from distill.recipe_file import load
    from distill.runs.stopper import Stopper, deadline

    stopper = Stopper(deadline(stop_after))
    return answer(
        load(recipe, overrides),
        data=data,
        out=out,
        student=student,
        pairs=pairs,
        plan=plan,
        tokens=ranges.NEW_TOKENS.check(tokens, "--tokens"),
        temperature=ranges.TEMPERATURE.check(temperature, "--temperature"),
        top_p=ranges.TOP_P.check(top_p, "--top-p"),
        seed=ranges.SEEDS.check(seed, "--seed"),
        batch=ranges.ANSWERED.check(batch, "--batch"),
        limit=ranges.ROWS.check(limit, "--limit"),
        unfinished=unfinished,
        stopper=stopper,
        console=console,
    )


def questions(
    files: str | Sequence[str], *, out: str | Path, leave_out: Sequence[str] = (), ask: str | None = None
) -> dict[str, Any]:
    """Write public sets of questions with reference answers as chats, which train as they are, and of which `answers` with
    `pairs` makes preference pairs.

    Args:
        files: of JSON lines (globs), with `question` and `answer`, or with a `text` that holds both. out: the file to write.
            leave_out: words; rows whose id or source has one are left out, as gsm8k's where GSM8K judges. ask: a line behind
            each question.

    Returns:
        rows, chats, final_answers (chats whose answer states one), left_out, no_question, and the file.

    Raises:
        UserError: anything that the user can mend; what was there under that name stays.
    """
    from distill.answering.questions import write_questions

    return write_questions([files] if isinstance(files, str) else files, out, leave_out, ask)
