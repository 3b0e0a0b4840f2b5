"""The outcomes of `kvsieve compare`, as a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvsieve.cli.generation import Outcome
from kvsieve.cli.output import console, share, size, slots, table, verdict
from kvsieve.cli.prompts import Prompt

_NUMBERS = ("kept", "full", "%", "peak", "slots", "tok/s", "s")
_OTHER_COLUMNS = 92
"""Width of everything but the answer."""
_WIDE = _OTHER_COLUMNS + 28
_NAME = 20


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
    """Print one row per method; on a narrow terminal the answers follow below the numbers."""
    out = console()
    wide = out.width >= _WIDE
    marked = source.sample is not None
    head = ["method", *(["right"] if marked else []), *_NUMBERS]
    made = table(*head, *(["answer"] if wide else []), right=_NUMBERS, whole=("method", "right"))
    below = []
    for row in rows:
        text = _text(row, out.width - (_OTHER_COLUMNS if wide else _NAME))
        cells = ["–"] * (len(head) - 1)
        if row.outcome is not None:
            cells = [*([verdict(row.right)] if marked else []), *_numbers(row.outcome)]
        made.add_row(row.method, *cells, *([text] if wide else []))
        below.append(f"{row.method:<{_NAME}}{text}")
    if source.sample is not None:
        out.print(f"right answer: {excerpt(source.sample.answer, out.width - 14)}\n")
    out.print(made)
    if not wide:
        out.print("", *below, sep="\n")


def _text(row: Row, width: int) -> str:
    return f"Error: {row.error}" if row.outcome is None else excerpt(row.outcome.text, width)


def _numbers(outcome: Outcome) -> list[str]:
    report = outcome.report
    seconds = report.seconds["prefill"] + report.seconds["decode"]
    return [
        size(report.bytes_kept),
        size(report.bytes_full),
        share(report),
        size(report.bytes_peak),
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
