"""Progress on stderr, while it is a terminal: a spinner, then tokens per second and time left."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as ProgressTask
from rich.text import Text


class _Speed(ProgressColumn):
    def render(self, task: ProgressTask) -> Text:
        """Show the measured rate."""
        return Text("" if task.speed is None else f"{task.speed:.0f} tokens/s")


class Status:
    """A status line for steps that take a while; it is gone when the block is left."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(20),
            _Speed(),
            TimeElapsedColumn(),
            TextColumn("at most"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Status:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, description: str) -> None:
        """Show a step of unknown length."""
        self._progress.reset(self._task, total=None, description=description)

    def token(self, description: str, total: int) -> None:
        """Count a generated token of at most `total`."""
        task = self._progress.tasks[0]
        if task.total is None:
            self._progress.reset(self._task, total=total, description=description)
        self._progress.advance(self._task)

    def hide(self) -> None:
        """Make room for text on the same terminal."""
        self._progress.stop()


def one_terminal() -> bool:
    """Whether stdout and stderr show on the same terminal, so that text and status would mix."""
    try:
        return os.ttyname(sys.stdout.fileno()) == os.ttyname(sys.stderr.fileno())
    except OSError:
        return False
