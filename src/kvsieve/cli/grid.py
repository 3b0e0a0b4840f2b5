"""The progress of a grid of cells, on stderr."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from kvsieve.bench.plan import Group, Settings, Spec


class Grid:
    """A bar over the cells, weighted by what they cost, with the time left."""

    def __init__(self, settings: Settings) -> None:
        self._cells = [(group, spec) for group in settings.groups() for spec in group.specs()]
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            # The time left is judged by minutes, not by the last cell.
            speed_estimate_period=1800,
        )
        total = sum(group.cost for group, _ in self._cells)
        self._task = self._bar.add_task("starting", total=total)
        self._begun = 0.0

    def __enter__(self) -> Grid:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def keys(self, peer: Any) -> list[str]:
        """Return the keys of all cells, in order."""
        from kvsieve.bench.rows import key
        from kvsieve.bench.speed import identity

        return [key(identity(group, spec, peer)) for group, spec in self._cells]

    def cell(self, group: Group, spec: Spec) -> None:
        """Note that a cell begins, and those before it are done."""
        engine = "kvpress " if spec.engine == "kvpress" else ""
        where = f"{group.context} x {group.batch} {group.dtype}"
        self._bar.update(
            self._task, completed=self._begun, description=f"{where} {engine}{spec.method}"
        )
        self._begun += group.cost
