"""The Python API of the steps before a run: recipes, prepared text, cached logits, questions and answers.

Imports are inside the functions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from distill.recipe_file import AnyRecipe


def recipes() -> list[dict[str, str]]:
    """List the shipped recipes: the name, the teacher and the first sentence of the comment at the top."""
    from distill.shipped import list_recipes

    return list_recipes()


def recipe_text(name: str) -> str:
    """Return the text of a shipped recipe. Raises a UserError if there is none of that name."""
    from distill.shipped import find_shipped

    return find_shipped(name).read_text(encoding="utf-8")


def copy_recipe(name: str, target: str | Path = ".") -> Path:
    """Copy a shipped recipe to a file or into a folder, so that it can be changed. Returns the new file's path.

    The JSON schema of recipes, which the recipe's first line names for editors, is copied into the same folder. Another
    file of that name is kept.

    Raises:
        UserError: there is no such recipe, the file exists, or it cannot be written.
    """
    from distill.shipped import copy_shipped

    return copy_shipped(name, Path(target))


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of recipes: every key with its type, default, range and meaning, for editors and programs."""
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
    """Tokenise the texts of a recipe into shards, which later runs read. A call that was stopped continues where it was.

    Args:
        recipe, overrides: as in `plan`. processes: how many processes tokenise; by default chosen by the cores and the size
            of each text. The result does not depend on it. console: where progress is shown; the standard error by default.
            show: the number of documents of each text that the result holds token by token, with the tokens that are
            trained on.

    Returns:
        the counts, as the docstring of `distill.runs.preparing.prepare_texts` describes them.

    Raises:
        UserError: an error that the user can fix.
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
    """Cache the teacher's top-k logits of the windows that a recipe's imitate stage reads, for `imitate.offline_logits`.

    Windows that are already in the folder are kept. A call that was stopped continues, and a longer recipe adds windows.

    Args:
        recipe, overrides: as in `plan`. out: the folder; by default the stage's own offline_logits, else a folder in the
            cache that is named after its content. top_k: the number of most likely tokens kept of each distribution.
            stage: the stage's number, if the recipe has several such stages. stop_after: minutes after which to stop.
            console: where progress is shown; the standard error by default.

    Returns:
        the folder.

    Raises:
        UserError: an error that the user can fix. Interrupted: stopped early, every whole shard is kept.
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
    """Generate the teacher's answers to prompts, as shards of JSON lines that recipes can read as a source of text.

    A call that was stopped continues, and writes the same bytes as one call would have.

    Args:
        recipe, overrides: as in `plan`. data: files (a glob) of rows with a `prompt`, or with `messages` whose last answer
            is dropped; data.train by default. out: the folder; by default one in the cache that is named after its
            content. student: a run folder or a student that answers in place of the teacher. pairs: write pairs of the
            row's own answer (chosen) and the model's (rejected) where their final answers differ. plan: only count the
            tokens.
        tokens: the most tokens of an answer. temperature: 0 takes the most likely token. top_p: nucleus sampling: sample
            from the most likely tokens whose probabilities add up to top_p. seed: the seed of sampling, together with a
            row's number. batch: the batch size (8 on a CPU and 64 on a GPU by default). limit: the most prompts.
            unfinished: also write answers that were cut off, with a mark. stop_after: minutes after which to stop.
            console: where progress is shown; the standard error by default.

    Returns:
        prompts, prompt_tokens, most_tokens. Unless `plan` is set also tokens, the folder, how tokens were generated
        (decoding), and the number of prompts by outcome: answered, unfinished, empty; with `pairs` also pairs, right,
        unstated, no_reference.

    Raises:
        UserError: an error that the user can fix. Interrupted: stopped early, every whole shard is kept.
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
    """Convert public sets of questions with reference answers into chats.

    The chats can be trained on, and `answers` with `pairs` makes preference pairs of them.

    Args:
        files: JSON lines (globs) with `question` and `answer`, or with a `text` that holds both. out: the file to write.
            leave_out: words; rows whose id or source contains one are left out, such as gsm8k if GSM8K is the benchmark.
            ask: a line that is added after each question.

    Returns:
        rows, chats, final_answers (chats whose answer states a final answer), left_out, no_question, and the file.

    Raises:
        UserError: an error that the user can fix; an existing file of that name is kept.
    """
    from distill.answering.questions import write_questions

    return write_questions([files] if isinstance(files, str) else files, out, leave_out, ask)
