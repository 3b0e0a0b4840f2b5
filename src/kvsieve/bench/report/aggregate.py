"""From rows to points: seeds of one cell pooled, cells grouped by task, setting and length."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvsieve.bench.quality.rows import asked_options
from kvsieve.bench.report.check import Row
from kvsieve.bench.report.reading import SETUP, as_text

FULL = "full"


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval."""

    mean: float
    low: float
    high: float


def pooled(parts: Sequence[tuple[int, Estimate]]) -> Estimate:
    """Return the estimate over all samples of independent parts (n, estimate).

    mean = sum w_i m_i with w_i = n_i / sum n; low = mean - sqrt(sum (w_i (m_i - l_i))^2), and high
    likewise: distances to the ends add in quadrature (MOVER; Zou and Donner, 2008). One part alone
    stays as it is.
    """
    if len(parts) == 1:
        return parts[0][1]
    total = sum(n for n, _ in parts)
    mean = math.fsum(n / total * part.mean for n, part in parts)
    below = math.hypot(*(n / total * (part.mean - part.low) for n, part in parts))
    above = math.hypot(*(n / total * (part.high - part.mean) for n, part in parts))
    return Estimate(mean, mean - below, mean + above)


def score(rows: Iterable[Row]) -> Estimate:
    """Return the score over all prompts of rows."""
    return pooled([(r["n"], Estimate(r["score"], r["low"], r["high"])) for r in rows])


def full_score(rows: Iterable[Row]) -> Estimate:
    """Return the full cache's score on the same prompts; each prompt counts once."""
    once = {as_text([row["setting"], row["length"], row["seed"]]): row for row in rows}
    return score([row["full"] | {"n": row["n"]} for row in once.values()])


def difference(rows: Iterable[Row]) -> Estimate:
    """Return the paired difference to the full cache over all prompts of rows."""
    return pooled([(row["n"], Estimate(**row["difference"])) for row in rows])


def average(rows: Iterable[Row], *path: str) -> float | None:
    """Return the mean of a figure over the rows that have it, each row counted once."""
    values = []
    for row in rows:
        value: Any = row
        for name in path:
            value = value[name]
        if value is not None:
            values.append(value)
    return math.fsum(values) / len(values) if values else None


def share(rows: Sequence[Row]) -> float:
    """Return bytes kept over bytes of the full cache, all rows together."""
    kept = math.fsum(row["cache"]["bytes_kept"] for row in rows)
    return kept / math.fsum(row["cache"]["bytes_full"] for row in rows)


@dataclass(frozen=True)
class Point:
    """One method at one budget: rows that differ in their seeds alone."""

    label: str
    rows: tuple[Row, ...]

    @property
    def method(self) -> str:
        """The method's name."""
        return self.rows[0]["method"]

    @property
    def budget(self) -> str | None:
        """The budget as it was asked for."""
        return self.rows[0]["budget"]


@dataclass(frozen=True)
class Panel:
    """The points of one length."""

    length: int | None
    points: tuple[Point, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all points."""
        return tuple(row for point in self.points for row in point.rows)


@dataclass(frozen=True)
class Section:
    """One task in one setting, on one model."""

    head: Row
    """Any of its rows: they agree in the setup, the task and the setting."""
    panels: tuple[Panel, ...]

    @property
    def labels(self) -> list[str]:
        """The methods that have a line, in order."""
        points = (point for panel in self.panels for point in panel.points)
        return sorted({point.label for point in points if point.method != FULL})


def front(panel: Panel) -> list[Point]:
    """Return the points that no other beats: none has as good a score with fewer bytes, or a
    better one with as many. In the order of bytes.
    """
    known = [(share(p.rows), score(p.rows).mean, p) for p in panel.points]
    best = [
        (own_share, point)
        for own_share, own, point in known
        if not any(
            (s < own_share and m >= own) or (s <= own_share and m > own) for s, m, _ in known
        )
    ]
    return [point for _, point in sorted(best, key=lambda pair: pair[0])]


def sections(rows: Sequence[Row]) -> list[Section]:
    """Return what the page shows, in the order of names and sizes."""
    names = labels(rows)
    fields = ("task", "setting", *SETUP, "task_version", "metric")
    groups = grouped(rows, lambda row: (foreign(row), as_text([row[name] for name in fields])))
    return [_section(group, names) for group in groups]


def foreign(row: Row) -> bool:
    """Whether a row is another library's, measured for comparison: those come last."""
    return row["engine"] != "transformers"


def _section(rows: Sequence[Row], names: dict[str, str]) -> Section:
    by_length = grouped(rows, lambda row: row["length"] or 0)
    panels = [Panel(group[0]["length"], _points(group, names)) for group in by_length]
    return Section(rows[0], tuple(panels))


def _points(rows: Sequence[Row], names: dict[str, str]) -> tuple[Point, ...]:
    groups = grouped(rows, lambda row: as_text([variant(row), row["budget"]]))
    points = [Point(names[variant(group[0])], tuple(group)) for group in groups]
    return tuple(sorted(points, key=lambda p: (p.method != FULL, p.label, share(p.rows))))


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    """Return rows in groups of equal keys, in the order of the keys."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return [groups[found] for found in sorted(groups)]


def variant(row: Row) -> str:
    """Return a method with its recipe, the budget left out: what makes one line of a plot."""
    return as_text([row["method"], asked_options(row)])


def labels(rows: Iterable[Row]) -> dict[str, str]:
    """Return a name for each variant: the method's, and the options in which its recipes differ."""
    recipes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for found in sorted({variant(row) for row in rows}):
        method, recipe = json.loads(found)
        recipes[method].append(recipe)
    return {
        as_text([method, recipe]): _label(method, recipe, others)
        for method, others in recipes.items()
        for recipe in others
    }


def _label(method: str, recipe: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    names = sorted({name for other in others for name in other})
    differing = [n for n in names if len({as_text([o.get(n)]) for o in others}) > 1]
    options = (f"{name}={as_text(recipe[name])}" for name in differing if name in recipe)
    return " ".join([method, *options])
