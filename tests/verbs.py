"""The current command line, against which commands in pages and scripts are checked."""

from collections.abc import Sequence

import click
import typer

from distill.cli import app


def parsed(words: Sequence[str]) -> click.Context:
    """What the words behind `distill` are read as; an unknown verb, or options that it would refuse, end the test."""
    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"distill {' '.join(words)}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command.make_context("distill", rest)
