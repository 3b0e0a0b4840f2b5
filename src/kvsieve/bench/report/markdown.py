"""The tables of a report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kvsieve.bench.report import (
    audits,
    depths,
    others,
    public,
    speed,
    summary,
    tables,
    traces,
)
from kvsieve.bench.report.aggregate import sections
from kvsieve.bench.report.reading import Results
from kvsieve.bench.report.tables import Table
from kvsieve.bench.report.words import SETTINGS

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~&$#!])")


def render(
    results: Results,
    audit: Sequence[audits.Row] = (),
    kept: Sequence[traces.Row] = (),
    fidelity: Sequence[others.Row] = (),
    tasks: Sequence[public.Row] = (),
    timed: Sequence[speed.Row] = (),
) -> str:
    """Return the tables; equal rows give equal bytes."""
    lines = [*_lines(results, audit), *_others(results, kept, fidelity)]
    for heading, found in (
        ("Public benchmarks", public.tables(tasks)),
        ("Speed", speed.tables(timed)),
    ):
        lines += [f"\n## {heading}"] if found else []
        for name, table in found:
            lines += [f"\n### {escape(name)}\n", *_table(table)]
    return "\n".join(lines) + "\n"


def overview(
    results: Results,
    audit: Sequence[audits.Row] = (),
    kept: Sequence[traces.Row] = (),
    fidelity: Sequence[others.Row] = (),
) -> str:
    """Return what fits a document: scores by budget, the best methods, depths, the audit, kvpress
    beside ours, what is kept of one document, fidelity.
    """
    return "\n".join([*_overview(results, audit), *_others(results, kept, fidelity)]) + "\n"


def _others(
    results: Results, kept: Sequence[traces.Row], fidelity: Sequence[others.Row]
) -> Iterator[str]:
    best = others.winners(results)
    if best is not None:
        yield "\n### The best of kvsieve and of kvpress\n"
        yield from _table(best)
    beside = others.peers(results)
    if beside is not None:
        yield "\n### kvpress on the same prompts\n"
        yield from _table(beside)
    if kept:
        yield "\n### Kept of one document\n"
        yield from _table(traces.table(kept))
    if fidelity:
        yield "\n### Fidelity\n"
        yield from _table(others.fidelity(fidelity))


def _overview(results: Results, audit: Sequence[audits.Row]) -> Iterator[str]:
    found = sections(results.rows)
    for matrix in summary.matrices(found):
        yield f"\n### {escape(matrix.name)}\n"
        yield from _table(matrix.table)
    if found:
        yield "\n### The best of each\n"
        yield from _table(summary.winners(found))
    for name, table in depths.by_length(found):
        yield f"\n### By length: {escape(name)}\n"
        yield from _table(table)
    for name, table in depths.by_depth(found):
        yield f"\n### By depth: {escape(name)}\n"
        yield from _table(table)
    found = audits.tables(audit)
    for name, table in found:
        yield "\n### Audit" + (f": {escape(name)}\n" if len(found) > 1 else "\n")
        yield from _table(table)


def _lines(results: Results, audit: Sequence[audits.Row]) -> Iterator[str]:
    yield "# Results"
    yield ""
    yield "Made by `kvsieve report DIR --markdown FILE` from measured rows; not edited by hand."
    yield "Scores are shares of prompts, with intervals; differences are paired, to the full cache."
    for remark in results.remarks():
        yield f"\n{escape(remark)}"
    yield "\n## Overview"
    yield from _overview(results, audit)
    for section in sections(results.rows):
        yield f"\n## {escape(tables.heading(section))}\n"
        meaning = SETTINGS.get(section.head["setting"])
        yield escape(tables.setup(section)) + (f": {meaning}." if meaning else ".")
        for panel in section.panels:
            yield f"\n### {tables.length(panel)}\n" if panel.length is not None else ""
            yield from _table(tables.points(panel))
    if results.failed:
        yield "\n## Refused or failed\n"
        yield from _table(tables.failed(results.failed))
    yield "\n## Where the numbers come from\n"
    yield from _table(tables.origins(results))


def _table(table: Table) -> Iterator[str]:
    yield _line([escape(name) for name in table.columns])
    yield _line(["---:" if number else "---" for number in table.columns.values()])
    for row in table.rows:
        yield _line([escape(cell.text) for cell in row])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escape(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", text)
