"""Reading a folder of results: every row checked, the latest row of each cell."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsieve.bench.report.check import ResultsError, Row, check
from kvsieve.bench.rows import is_of, parsed

FILE = "quality.jsonl"

SETUP = ("model", "weights", "engine", "dtype", "device")
"""What rows must share before they are compared."""

_CELL = (*SETUP, *("task", "task_version", "setting", "length", "method", "budget", "recipe"))
_ORIGIN = ("commit", "versions", "threads")


@dataclass(frozen=True)
class Results:
    """What a folder holds; of several rows of one cell only the last counts."""

    rows: tuple[Row, ...]
    failed: tuple[Row, ...]
    unfinished: int
    """Lines that a killed run left unfinished."""

    @property
    def everything(self) -> tuple[Row, ...]:
        """Measured rows, then failed ones."""
        return self.rows + self.failed

    def remarks(self) -> list[str]:
        """Return what a reader should know before comparing."""
        made = [
            f"These rows differ in their {name}: compare them with care."
            for name in _ORIGIN
            if len({as_text(row[name]) for row in self.everything}) > 1
        ]
        if self.unfinished:
            made.append(f"Left out: {self.unfinished} line(s) that a killed run left unfinished.")
        return made


def as_text(value: Any) -> str:
    """Return a JSON value as text that is equal for equal values."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def cell(row: Row) -> str:
    """Return what a row is of: equal for the same cell, whoever measured it, and when."""
    return as_text([row[name] for name in (*_CELL, "seed")])


def read(folder: Path, optional: bool = False) -> Results:
    """Return the rows of a folder, in an order that doesn't depend on when they were measured.

    ``optional``: a folder without such rows gives none.

    Raises:
        ResultsError: no such folder, no rows, or a row that can't be used.
    """
    path = folder / FILE
    if optional and not path.exists():
        return Results((), (), 0)
    lines = _lines(folder, path)
    latest: dict[str, Row] = {}
    unfinished = 0
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line) if line.strip() else None
        except (json.JSONDecodeError, RecursionError):
            unfinished += 1
            continue
        if found is not None:
            row = check(_printable(found), f"{FILE}, line {number}")
            latest[cell(row)] = row
    if not latest:
        raise ResultsError(f"{str(path)!r} has no rows yet.")
    return _sorted(latest, unfinished)


def beside(
    folder: Path,
    file: str,
    kind: str,
    version: int,
    names: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> list[Row]:
    """Return the measured rows of another file of a folder (none without it).

    Of rows that agree in ``names`` (and ``optional`` ones, where they have them) the latest counts;
    lines cut by a kill are left out.

    Raises:
        ResultsError: rows of another kind or version.
    """
    path = folder / file
    latest: dict[str, Row] = {}
    for number, value in parsed(path):
        row = _printable(value)
        if not is_of(row, kind, version):
            raise ResultsError(
                f"{file}, line {number}, is no row of kind {kind!r}, version {version}. "
                "Measure again into a new folder."
            )
        cell = [row[name] for name in names] + [row.get(name) for name in optional]
        latest[as_text(cell)] = row
    return [row for row in latest.values() if row["error"] is None]


def _sorted(latest: dict[str, Row], unfinished: int) -> Results:
    rows = [latest[key] for key in sorted(latest)]
    return Results(
        rows=tuple(row for row in rows if row["error"] is None),
        failed=tuple(row for row in rows if row["error"] is not None),
        unfinished=unfinished,
    )


def _lines(folder: Path, path: Path) -> Iterable[str]:
    make = "`kvsieve bench quality --out DIR` makes one."
    if not folder.is_dir():
        kind = "is no folder" if folder.exists() else "does not exist"
        raise ResultsError(f"{str(folder)!r} {kind}. Give a folder of results; {make}")
    if not path.exists():
        raise ResultsError(f"{str(folder)!r} has no {FILE}. Give a folder of results; {make}")
    try:
        return path.read_text("utf-8").split("\n")
    except OSError as error:
        raise ResultsError(f"Can't read {str(path)!r}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ResultsError(f"{str(path)!r} is not UTF-8.") from error


def _printable(value: Any) -> Any:
    """Return a JSON value without characters that a page can't show (or that turn text around)."""
    if isinstance(value, str):
        spaced = " ".join(value.split()) if any(c.isspace() for c in value) else value
        return "".join(c if c.isprintable() else "\ufffd" for c in spaced)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(name): _printable(item) for name, item in value.items()}
    return value
