"""Everything at a glance: scores of method x task at each budget, and which method wins where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvsieve.bench.report import aggregate
from kvsieve.bench.report.aggregate import FULL, Estimate, Panel, Point, Section
from kvsieve.bench.report.tables import Cell, Table, estimate, heading

_NONE = "–"
_BEST = 3


@dataclass(frozen=True)
class Matrix:
    """Scores of all methods (rows) in all tasks and settings (columns), at one budget."""

    name: str
    table: Table


def matrices(sections: Sequence[Section]) -> list[Matrix]:
    """Return one matrix per model, engine, length and budget, small budgets first."""
    places = _places(sections)
    ours = {_setup(section): not aggregate.foreign(section.head) for section in sections}
    budgets = sorted(
        {place[:-1] for place in places}, key=lambda key: (not ours[key[0]], _order(key))
    )
    return [_matrix(key, [p for p in places if p[:-1] == key], places, sections) for key in budgets]


_Place = tuple[str, int, str, str]
"""Setup, length, budget, and the task with its setting."""


def _places(sections: Sequence[Section]) -> dict[_Place, dict[str, Point]]:
    found: dict[_Place, dict[str, Point]] = {}
    for section, panel in _panels(sections):
        for point in panel.points:
            if point.budget is not None:
                place = (_setup(section), panel.length or 0, point.budget, heading(section))
                found.setdefault(place, {})[point.label] = point
    return found


def _panels(sections: Sequence[Section]) -> Iterator[tuple[Section, Panel]]:
    for section in sections:
        for panel in section.panels:
            yield section, panel


def _setup(section: Section) -> str:
    return f"{section.head['model']}, {section.head['engine']}"


def _order(key: tuple[str, int, str]) -> tuple[str, int, float, str]:
    setup, length, budget = key
    number = budget.rstrip("%")
    return setup, length, float(number) if number.replace(".", "").isdigit() else 0.0, budget


def _matrix(
    key: tuple[str, int, str],
    columns: Sequence[_Place],
    places: dict[_Place, dict[str, Point]],
    sections: Sequence[Section],
) -> Matrix:
    setup, length, budget = key
    names = sorted({label for place in columns for label in places[place]})
    rows = [_full(columns, sections, length)]
    for name in names:
        scores = [places[place].get(name) for place in columns]
        means = [aggregate.score(p.rows).mean for p in scores if p is not None]
        mean = sum(means) / len(means)
        cells = [_shown(p) for p in scores]
        whole = len(means) == len(columns)
        rows.append([Cell(name), *cells, Cell(f"{mean:.2f}", mean) if whole else Cell(_NONE)])
    heads = {"method": False, **{place[-1]: True for place in columns}, "mean": True}
    where = f"{budget} kept" + (f", length {length}" if length else "")
    return Matrix(f"{where} ({setup})", Table(heads, rows))


def _shown(point: Point | None) -> Cell:
    if point is None:
        return Cell(_NONE)
    mean = aggregate.score(point.rows).mean
    return Cell(f"{mean:.2f}", mean)


def _full(columns: Sequence[_Place], sections: Sequence[Section], length: int) -> list[Cell]:
    found = {
        (_setup(section), heading(section)): aggregate.full_score(panel.rows)
        for section, panel in _panels(sections)
        if (panel.length or 0) == length
    }
    means = [found[place[0], place[-1]].mean for place in columns]
    mean = sum(means) / len(means)
    return [Cell("full cache"), *(Cell(f"{m:.2f}", m) for m in means), Cell(f"{mean:.2f}", mean)]


def winners(sections: Sequence[Section]) -> Table:
    """Return for each task, setting, length and budget the best methods, with their intervals."""
    names = ("task", "length", "budget", "full cache", "best", "next")
    columns: dict[str, bool] = dict.fromkeys(names, False)
    rows = []
    for section, panel in _panels(sections):
        full = aggregate.full_score(panel.rows)
        points = [point for point in panel.points if point.method != FULL]
        for budget in sorted({p.budget for p in points if p.budget}, key=_size):
            best = ranked([p for p in points if p.budget == budget])[:_BEST]
            rows.append(_winner(section, panel, budget, full, best))
    return Table(columns, rows)


def ranked(points: Sequence[Point]) -> list[Point]:
    """Return points by score, then by bytes, then by name."""
    return sorted(
        points, key=lambda p: (-aggregate.score(p.rows).mean, aggregate.share(p.rows), p.label)
    )


def _winner(
    section: Section, panel: Panel, budget: str, full: Estimate, best: Sequence[Point]
) -> list[Cell]:
    first, *others = [f"{p.label} {estimate(aggregate.score(p.rows))}" for p in best]
    return [
        Cell(heading(section)),
        Cell(str(panel.length or _NONE)),
        Cell(budget),
        Cell(f"{full.mean:.3f}"),
        Cell(first),
        Cell("; ".join(others) or _NONE),
    ]


def _size(budget: str | None) -> float:
    return _order(("", 0, budget or ""))[2]
