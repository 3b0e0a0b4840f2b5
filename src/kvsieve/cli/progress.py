"""A bar over prompts, with the time left, on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class PromptsBar:
    """Counts prompts; refused cells jump ahead."""

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task("loading the model", total=total)

    def step(self, name: str, prompts: int) -> None:
        """Note what is being done, and how many prompts more are done."""
        self._bar.update(self._task, description=name, advance=prompts)

    def reached(self, prompts: int) -> None:
        """Note how many prompts are done in all."""
        self._bar.update(self._task, completed=prompts)


@contextmanager
def prompts_bar(total: int) -> Iterator[PromptsBar]:
    """Show a bar over ``total`` prompts."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        # The time left is judged by minutes, not by the last cell.
        speed_estimate_period=1800,
    )
    with bar:
        yield PromptsBar(bar, total)
