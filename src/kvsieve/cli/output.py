"""What the commands print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from kvsieve.report import Report

_FILE_WIDTH = 200
"""Columns of a table that goes to a file or a pipe."""


def console() -> Console:
    """Return the console of stdout; where it is no terminal, lines are not folded at 80."""
    plain = Console(highlight=False, markup=False)
    return plain if plain.is_terminal else Console(width=_FILE_WIDTH, highlight=False, markup=False)


def table(*columns: str, right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """Return an empty table; the columns of `right` are numbers, `whole` and `right` never wrap."""
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column in (*right, *whole),
            overflow="fold",
        )
    return made


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    typer.echo(json.dumps(value))


def size(count: int) -> str:
    """Return a number of bytes in three digits or so."""
    return decimal(count, precision=1 if count >= 1_000_000 else 0)


def slots(report: Report) -> str:
    """Return the least and the most slots of any head."""
    heads = [count for layer in report.slots[0] for count in layer] if report.slots else [0]
    least, most = min(heads), max(heads)
    return str(least) if least == most else f"{least}–{most}"


def share(report: Report) -> str:
    """Return the share of bytes kept."""
    return f"{report.bytes_kept / report.bytes_full:.1%}" if report.bytes_full else "–"


def summary(report: Report, prompt_tokens: int, new_tokens: int, right: bool | None) -> str:
    """Return a run's report in a few lines."""
    seconds = report.seconds
    budget = f"budget {report.budget}" if report.budget else "no budget"
    if report.chosen_share is not None:
        budget += f" at most, {report.chosen_share:.1%} of the tokens chosen"
    marked = "" if right is None else f"answer    {verdict(right)}\n"
    return (
        f"{marked}"
        f"method    {report.method}, {budget}\n"
        f"tokens    {prompt_tokens} in the prompt, {new_tokens} new, "
        f"{report.tokens_per_second:.1f} per second\n"
        f"cache     {size(report.bytes_kept)} of {size(report.bytes_full)} kept "
        f"({share(report)}), at most {size(report.bytes_peak)}\n"
        f"slots     {slots(report)} per head, of {max(report.seen)} tokens seen\n"
        f"seconds   {seconds['prefill']:.2f} prefill, {seconds['decode']:.2f} decode "
        f"({seconds['compress']:.2f} of them compressing)"
    )


def verdict(right: bool | None) -> str:
    """Return the mark of an answer."""
    return {True: "right", False: "wrong", None: "–"}[right]
