"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from kvsieve.bench.report import (
    audits,
    depths,
    others,
    public,
    speed,
    summary,
    tables,
    traces,
    words,
)
from kvsieve.bench.report.aggregate import Section, sections
from kvsieve.bench.report.plots import Style, draw
from kvsieve.bench.report.reading import Results


def render(
    results: Results,
    audit: Sequence[audits.Row] = (),
    kept: Sequence[traces.Row] = (),
    fidelity: Sequence[others.Row] = (),
    tasks: Sequence[public.Row] = (),
    timed: Sequence[speed.Row] = (),
) -> str:
    """Return the page of all kinds of rows; equal rows give equal bytes."""
    found = sections(results.rows)
    matrices = summary.matrices(found)
    cells = [len(matrix.table.rows) * len(matrix.table.columns) for matrix in matrices]
    labels = sorted({label for section in found for label in section.labels})
    styles = {label: Style(number) for number, label in enumerate(labels)}
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_file("page.html")).render(
        style=Markup(_file("style.css")),
        script=Markup(_file("script.js")),
        words=words,
        sections=[_shown(section, styles, index) for index, section in enumerate(found)],
        matrices=matrices,
        widest=cells.index(max(cells)) if cells else 0,
        winners=summary.winners(found),
        depths=depths.by_depth(found),
        lengths=depths.by_length(found),
        public=public.tables(tasks),
        speed=speed.tables(timed),
        audits=audits.tables(audit),
        chat=any(map(audits.is_chat, audit)),
        kept=traces.table(kept) if kept else None,
        pictures=[(traces.title(row), Markup(traces.picture(row))) for row in kept],
        others={
            "The best of kvsieve and of kvpress": others.winners(results),
            "kvpress on the same prompts": others.peers(results),
            "Fidelity": others.fidelity(fidelity) if fidelity else None,
        },
        measured=len(results.rows),
        failed=tables.failed(results.failed),
        origins=tables.origins(results),
        remarks=results.remarks(),
    )


def _shown(section: Section, styles: Mapping[str, Style], index: int) -> dict[str, Any]:
    own = {label: styles[label] for label in section.labels}
    return {
        "id": f"s{index}",
        "heading": tables.heading(section),
        "setup": tables.setup(section),
        "meaning": words.SETTINGS.get(section.head["setting"]),
        "legend": own,
        "panels": [
            {
                "length": tables.length(panel),
                "plot": Markup(draw(panel, own, f"s{index}-{number}")),
                "table": tables.points(panel),
            }
            for number, panel in enumerate(section.panels)
        ],
    }


def _file(name: str) -> str:
    return resources.files(__package__ or "").joinpath(name).read_text("utf-8")
