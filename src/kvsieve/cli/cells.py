"""Measuring the cells of a results folder that it lacks, under a bar, and printing all of them."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from kvsieve.cli import sweeps as s
from kvsieve.cli.progress import prompts_bar
from kvsieve.cli.sweeps import Row

Measure = Callable[[set[str], Callable[[str, int], None]], Iterator[Row]]
"""Takes the keys of finished cells, and what is told a cell's name and its prompts done since."""


def gather(
    path: Path | None,
    known: list[Row],
    wanted: list[Row],
    key: Callable[[Row], str],
    measure: Measure,
    prompts: int,
    json: bool,
) -> list[Row]:
    """Measure the wanted cells that are not known, and return all of them in their order.

    ``wanted`` are identities; rows are added to ``path``, and printed with ``json``, as they
    finish. Cells that failed are measured again. ``prompts``: how many a cell has.
    """
    found = {key(row): row for row in known if s.finished(row)}
    names = [key(row) for row in wanted]
    left = sum(name not in found for name in names)
    with prompts_bar(left * prompts) as bar:
        for number, row in enumerate(measure(set(found), bar.step) if left else (), 1):
            bar.reached(number * prompts)
            if path is not None:
                s.append(path, row)
            if json:
                typer.echo(jsonlib.dumps(row))
            found[key(row)] = row
    return [found[name] for name in names]


def finish(found: list[Row], json: bool, show: Callable[[list[Row]], None]) -> None:
    """Print the rows' tables, then what was refused and what failed.

    Raises:
        Failed: a cell failed.
    """
    if not json:
        show(found)
    s.tell(found, lambda row: f"{_source(row)}, {row['method']} {row['budget'] or ''}".rstrip())


def _source(row: Row) -> str:
    return row.get("task") or row.get("sample") or row["text"]


def verdict(row: Row) -> str:
    """Return what stands in a table for a cell without figures."""
    return "refused" if row["refused"] else "failed"
