"""`distill questions` and `distill answers`: data that a model or a public set gives."""

from pathlib import Path
from typing import Annotated

import typer

import distill
from distill.cli.arguments import Json, Overrides, RecipeArgument
from distill.cli.output import check_json, quiet_libraries, say, write_json
from distill.ranges import ANSWERED, MINUTES, NEW_TOKENS, ROWS, SEEDS, TEMPERATURE, TOP_P


def questions(
    files: Annotated[list[str], typer.Argument(help="Files of JSON lines with questions and their answers (globs).")],
    out: Annotated[Path, typer.Option(help="The file of chats to write.", metavar="FILE")],
    leave_out: Annotated[
        list[str] | None, typer.Option(help="Leave out rows whose id or source has this word.", metavar="WORD")
    ] = None,
    ask: Annotated[str | None, typer.Option(help="A line to put behind each question.", metavar="TEXT")] = None,
    json: Json = None,
) -> None:
    """Write public sets of questions with reference answers as chats."""
    check_json(json)
    made = distill.questions(files, out=out, leave_out=leave_out or [], ask=ask)
    words = (
        "of {rows:,} rows: {chats:,} chats ({final_answers:,} state a final answer), {left_out:,} left out, {no_question:,} "
    )
    if json is None or str(json) != "-":
        say(f"{words.format(**made)}without a question and an answer: {made['file']}")
    write_json(json, made)


def answers(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    data: Annotated[
        str | None, typer.Option(help="Files (a glob) of prompts or chats; data.train by default.", metavar="FILES")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder; one in the cache by default.", metavar="FOLDER")] = None,
    student: Annotated[
        str | None, typer.Option(help="A run folder or a student that answers in the teacher's place.", metavar="FOLDER")
    ] = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Write pairs of the rows' own answers and wrong ones of the model.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say how many tokens that is.")] = False,
    tokens: Annotated[int, typer.Option(help="Of an answer at most.", callback=NEW_TOKENS.option("--tokens"))] = 512,
    temperature: Annotated[
        float,
        typer.Option(help="0 takes the likeliest token, more samples.", callback=TEMPERATURE.option("--temperature")),
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens with so much in sum.", callback=TOP_P.option("--top-p"))
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn, row by row.", callback=SEEDS.option("--seed"))] = 0,
    batch: Annotated[
        int | None,
        typer.Option(help="Prompts at once; 8 on a CPU, 64 on a GPU by default.", callback=ANSWERED.option("--batch")),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Prompts at most.", callback=ROWS.option("--limit"))] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Write answers that were cut off too, marked.")] = False,
    stop_after: Annotated[
        float | None, typer.Option(help="Stop after so many minutes.", callback=MINUTES.option("--stop-after"))
    ] = None,
    json: Json = None,
) -> None:
    """Let a recipe's teacher answer prompts, for a training on what it says, or go on where that stopped."""
    quiet_libraries()
    check_json(json)
    made = distill.answers(
        recipe,
        overrides=overrides or [],
        data=data,
        out=out,
        student=student,
        pairs=pairs,
        plan=plan,
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch=batch,
        limit=limit,
        unfinished=unfinished,
        stop_after=stop_after,
    )
    if "folder" in made and str(json) != "-":
        say(made["folder"])
    write_json(json, made)
