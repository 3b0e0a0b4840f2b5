"""How the command line ends: one paragraph on stderr, never a traceback, and an exit code.

0 done, 1 failed while running, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from kvsieve.errors import KVSieveError

# Typer brings its own copy of Click in newer releases; its exceptions are found through Typer.
UsageError: Any = typer.BadParameter.__mro__[1]

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class BadInput(Exception):
    """Something that was asked for can't be done; found before any work."""


class Failed(Exception):
    """Something went wrong while running."""


class Guarded(TyperGroup):
    """The root command, with every way to end turned into a message and an exit code."""

    traceback = False

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run; Typer's own printing of errors is not used."""
        with ending(self):
            sys.exit(super().main(*args, standalone_mode=False, **extra) or 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the sub-command; Typer would make an exit code of Ctrl-C without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(say("Interrupted.", INTERRUPTED))


@contextmanager
def ending(group: Guarded | None = None) -> Iterator[None]:
    """Turn exceptions into a message and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(say("Interrupted.", INTERRUPTED))
    except Exception as error:
        if group is not None and group.traceback:
            traceback.print_exc()
        sys.exit(say(*describe(error)))


def describe(error: Any) -> tuple[str, int]:
    """Return the message and the exit code of an exception."""
    if isinstance(error, UsageError):
        command = error.ctx.command_path if error.ctx is not None else "kvsieve"
        message = error.format_message().rstrip(".")
        return f"Error: {message}. See `{command} --help`.", BAD_INPUT
    if isinstance(error, Failed):
        return f"Error: {error}", FAILED
    if isinstance(error, BadInput | KVSieveError):
        return f"Error: {error}", BAD_INPUT
    return (
        f"Error: {type(error).__name__}: {error} (`kvsieve --traceback ...` shows where.)",
        FAILED,
    )


def say(message: str, code: int) -> int:
    """Print a line on stderr and return the code."""
    typer.echo(message, err=True)
    return code


@contextmanager
def working() -> Iterator[None]:
    """Mark what runs inside as work: what fails there is no bad input any more."""
    try:
        yield
    except ValueError:
        raise  # among them recipe errors that only a prompt's length brings out
    except (KVSieveError, RuntimeError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise  # Typer ends quietly
        raise Failed(str(error) or type(error).__name__) from error
