"""Progress on stderr, while it is a terminal: a spinner, then tokens per second and time left.

Text that goes to the same terminal scrolls above the status line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from types import TracebackType

import typer
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.progress import Task as ProgressTask
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: ProgressTask) -> Text:
        """Show seconds so far, or tokens per second and the longest time left."""
        if task.total is None:
            return Text(f"{task.elapsed or 0:.0f} s")
        speed = f"{task.speed:.0f} tokens/s" if task.speed else ""
        left = task.time_remaining
        return Text(speed if left is None else f"{speed}, {left:.0f} s left at most")


class _Display(Progress):
    """The status line, below the unfinished last line of the text."""

    tail = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.tail:
            yield Text(self.tail)
        yield from super().get_renderables()


class Status:
    """A status line for steps that take a while; it is gone when the block is left."""

    def __init__(self) -> None:
        self._shared = one_terminal()
        self._display = _Display(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            _Rate(),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=4,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._display.add_task("", total=None)

    def __enter__(self) -> Status:
        self._display.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tail, self._display.tail = self._display.tail, ""
        self._display.stop()
        if tail:
            typer.echo(tail)

    def step(self, description: str) -> None:
        """Show a step of unknown length."""
        # A task's total can't be set back to unknown: each step is a new one.
        self._display.remove_task(self._task)
        self._task = self._display.add_task(description, total=None)

    def token(self, description: str, total: int, count: int = 1) -> None:
        """Count a token, or `count` of them, of at most `total`."""
        if self._display.tasks[0].total is None:
            self._display.reset(self._task, total=total, description=description)
        self._display.advance(self._task, count)

    def text(self, piece: str) -> None:
        """Print a piece of text on stdout."""
        if not self._shared:
            typer.echo(piece, nl=False)
            return
        *lines, self._display.tail = _folded(self._display.tail + piece, self._display.console)
        for line in lines:
            self._display.console.print(Text(line))


def _folded(text: str, console: Console) -> list[str]:
    """Break a text into lines that fit, between words where that is possible."""
    lines = text.split("\n")
    while cell_len(lines[-1]) >= console.width:
        cut = lines[-1].rfind(" ", 0, console.width) + 1 or console.width // 2
        lines[-1:] = [lines[-1][:cut].rstrip(), lines[-1][cut:]]
    return lines


def one_terminal() -> bool:
    """Whether stdout and stderr show on the same terminal, so that text and status would mix."""
    try:
        return os.ttyname(sys.stdout.fileno()) == os.ttyname(sys.stderr.fileno())
    except OSError:
        return False
