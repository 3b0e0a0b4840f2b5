"""The tables of a report, as text with values to sort by; pages and Markdown show the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.filesize import decimal

from kvsieve.bench.report import aggregate
from kvsieve.bench.report.aggregate import FULL, Estimate, Panel, Point, Section, grouped
from kvsieve.bench.report.check import Row
from kvsieve.bench.report.reading import SETUP, Results, as_text

_NONE = "–"


@dataclass(frozen=True)
class Cell:
    """What is shown, and, for numbers, what is sorted by."""

    text: str
    order: float | None = None


@dataclass(frozen=True)
class Table:
    """Columns by name, True for numbers, and rows of as many cells."""

    columns: dict[str, bool]
    rows: list[list[Cell]]

    @property
    def numbers(self) -> set[int]:
        """The places of columns that hold numbers."""
        return {place for place, number in enumerate(self.columns.values()) if number}

    @property
    def asked(self) -> set[int]:
        """The places of columns that say what was asked for: their numbers are no results."""
        return {place for place, name in enumerate(self.columns) if name in ("budget", "of full")}


def points(panel: Panel) -> Table:
    """Return the points of a plot; the full cache comes first."""
    best = aggregate.front(panel)
    rows = [_point(point, best) for point in panel.points]
    if all(point.method != FULL for point in panel.points):
        rows.insert(0, _reference(panel))
    columns = {
        "method": False,
        "budget": True,
        "of full": True,
        "front": False,
        "score [interval]": True,
        "difference to full [interval]": True,
        "n": True,
        "bytes kept": True,
        "peak": True,
        "tokens/s": True,
        "prefix": True,
    }
    return _without_empty(Table(columns, rows))


def _point(point: Point, best: Sequence[Point]) -> list[Cell]:
    share = aggregate.share(point.rows)
    return [
        Cell(point.label),
        Cell(point.budget or _NONE, share),
        Cell(f"{share:.1%}", share),
        Cell("●" if point in best else _NONE),
        Cell(estimate(aggregate.score(point.rows)), aggregate.score(point.rows).mean),
        Cell(change(aggregate.difference(point.rows)), aggregate.difference(point.rows).mean),
        _number(sum(row["n"] for row in point.rows), "d"),
        _size(aggregate.average(point.rows, "cache", "bytes_kept")),
        _size(aggregate.average(point.rows, "cache", "bytes_peak")),
        _number(aggregate.average(point.rows, "tokens_per_second"), ".1f"),
        _number(aggregate.average(point.rows, "prefix"), ".3f"),
    ]


def _reference(panel: Panel) -> list[Cell]:
    full = aggregate.full_score(panel.rows)
    seen = {row["seed"]: row["n"] for row in panel.rows}
    return [
        Cell("full cache"),
        Cell(_NONE, 1.0),
        Cell("100.0%", 1.0),
        Cell(_NONE),
        Cell(estimate(full), full.mean),
        Cell(_NONE),
        _number(sum(seen.values()), "d"),
        _size(aggregate.average(panel.rows, "cache", "bytes_full")),
        Cell(_NONE),
        Cell(_NONE),
        Cell(_NONE),
    ]


def _without_empty(table: Table) -> Table:
    """Leave out columns in which nothing was measured."""
    kept = [i for i in range(len(table.columns)) if any(r[i].text != _NONE for r in table.rows)]
    names = list(table.columns)
    columns = {names[i]: table.columns[names[i]] for i in kept}
    return Table(columns, [[row[i] for i in kept] for row in table.rows])


def failed(rows: Sequence[Row]) -> Table:
    """Return the cells that ended with an error."""
    names = ("task", "setting", "length", "method", "budget", "seed", "error")
    columns = {name: name in ("length", "seed") for name in names}
    return Table(columns, [[_plain(row[name]) for name in names] for row in rows])


def origins(results: Results) -> Table:
    """Return where the numbers come from: one line for each way in which rows were made."""
    fields = (*SETUP, "threads", "versions", "commit")
    groups = grouped(results.everything, lambda row: as_text([row[name] for name in fields]))
    columns = {**dict.fromkeys((*fields, "tasks", "seeds", "n per row"), False), "rows": True}
    return Table(columns, [_origin(group, fields) for group in groups])


def _origin(rows: Sequence[Row], fields: Iterable[str]) -> list[Cell]:
    tasks = sorted({f"{row['task']} (version {as_text(row['task_version'])})" for row in rows})
    return [
        *(_plain(rows[0][name]) for name in fields),
        Cell(", ".join(tasks)),
        Cell(_range(row["seed"] for row in rows)),
        Cell(_range(row["n"] for row in rows if row["error"] is None)),
        _number(len(rows), "d"),
    ]


def heading(section: Section) -> str:
    """Return what a section is of."""
    whose = f" ({section.head['engine']})" if aggregate.foreign(section.head) else ""
    return f"{section.head['task']}, {section.head['setting']}{whose}"


def setup(section: Section) -> str:
    """Return on what a section was measured."""
    head = section.head
    weights = "" if head["weights"] is None else f" ({as_text(head['weights'])})"
    return (
        f"{head['model']}{weights}, {head['engine']}, {head['dtype']} on {head['device']}; "
        f"task version {as_text(head['task_version'])}, metric {head['metric']}"
    )


def length(panel: Panel) -> str:
    """Return the length of a panel's prompts."""
    return "" if panel.length is None else f"length {panel.length}"


def estimate(value: Estimate) -> str:
    """Return a score with its interval."""
    return f"{value.mean:.3f} [{value.low:z.3f}, {value.high:.3f}]"


def change(value: Estimate) -> str:
    """Return a difference with its interval."""
    return f"{value.mean:+z.3f} [{value.low:+z.3f}, {value.high:+z.3f}]"


def size(count: float) -> str:
    """Return a number of bytes in three digits or so."""
    return decimal(round(count), precision=1)


def _size(count: float | None) -> Cell:
    return Cell(_NONE) if count is None else Cell(size(count), count)


def _number(value: float | None, form: str) -> Cell:
    return Cell(_NONE) if value is None else Cell(format(value, form), value)


def _plain(value: Any) -> Cell:
    if isinstance(value, dict):
        return Cell(", ".join(f"{k} {as_text(v)}" for k, v in sorted(value.items())) or _NONE)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(_NONE if value is None else as_text(value), value if number else None)


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    if not found:
        return _NONE
    whole = len(found) > 2 and found[-1] - found[0] == len(found) - 1
    return f"{found[0]}–{found[-1]}" if whole else ", ".join(map(str, found))
