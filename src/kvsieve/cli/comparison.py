"""The outcomes of `kvsieve compare`, as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.filesize import decimal

from kvsieve.cli.generation import Outcome
from kvsieve.cli.output import console, share, slots, table, verdict
from kvsieve.cli.prompts import Prompt

_OTHER_COLUMNS = 94
"""Width of everything but the answer."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method: its outcome and, where known, whether it is right; or why it failed."""

    method: str
    outcome: Outcome | None = None
    right: bool | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return `kvsieve run --json`'s object with `right`, or the error."""
        if self.outcome is None:
            return {"version": 1, "method": self.method, "error": self.error}
        return {**self.outcome.to_dict(), "right": self.right}


def json_object(rows: list[Row], source: Prompt) -> dict[str, Any]:
    """Return the object of `kvsieve compare --json`; a part of the public interface."""
    made = source.sample
    return {
        "version": 1,
        "sample": made and {"kind": made.kind, "seed": made.seed, "answer": made.answer},
        "runs": [row.to_dict() for row in rows],
    }


def print_table(rows: list[Row], source: Prompt) -> None:
    """Print one row per method."""
    out = console()
    numbers = ("kept", "full", "%", "peak", "slots", "tok/s", "s")
    marked = ("",) if source.sample is not None else ()
    made = table("method", *marked, *numbers, "answer", right=numbers)
    width = max(24, out.width - _OTHER_COLUMNS)
    for row in rows:
        cells = [] if row.outcome is None else _numbers(row.outcome)
        if marked:
            cells = [verdict(row.right), *cells] if cells else []
        cells = cells or ["–"] * (len(numbers) + len(marked))
        text = f"Error: {row.error}" if row.outcome is None else excerpt(row.outcome.text, width)
        made.add_row(row.method, *cells, text)
    if source.sample is not None:
        out.print(f"right answer: {excerpt(source.sample.answer, out.width - 14)}")
    out.print(made)


def _numbers(outcome: Outcome) -> list[str]:
    report = outcome.report
    seconds = report.seconds["prefill"] + report.seconds["decode"]
    return [
        decimal(report.bytes_kept),
        decimal(report.bytes_full),
        share(report),
        decimal(report.bytes_peak),
        slots(report),
        f"{report.tokens_per_second:.0f}",
        f"{seconds:.1f}",
    ]


def excerpt(text: str, width: int) -> str:
    """Return a text in one line of at most `width`: where it is longer, its start and its end."""
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    tail = (width - 3) // 2
    return f"{line[: width - 3 - tail]} … {line[-tail:]}"
