"""Plots as SVG for a page: no data text inside, colours that the page's style sheet sets."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvsieve.bench.report import aggregate
from kvsieve.bench.report.aggregate import FULL, Panel

COLOURS = 8
"""How many `--series-N` the style sheet has."""

MARKERS = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
    "s": "M-4-4H4V4H-4Z",
    "^": "M0-5L5 4H-5Z",
    "D": "M0-5L5 0L0 5L-5 0Z",
    "v": "M0 5L5-4H-5Z",
    "P": "M-2-5H2V-2H5V2H2V5H-2V2H-5V-2H-2Z",
    "X": "M-5-3L-3-5L0-2L3-5L5-3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0Z",
}
"""Matplotlib's markers, and the same as SVG paths for the legend. Seven of them beside eight
colours: 56 methods differ."""

_DASHES = {"-": "", "--": "5 3", ":": "1 3"}

# Stand-ins, replaced by the style sheet's colours.
_TEXT, _SERIES = "#fe0001", "#fd00{:02x}"
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_ASIDE = 0.01
"""How far lines stand apart, as a share of their place, so that their intervals can be seen."""

_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Style:
    """How a method is drawn, the same in all plots of a page."""

    number: int

    @property
    def colour(self) -> int:
        """The number of its colour."""
        return self.number % COLOURS

    @property
    def marker(self) -> str:
        """Matplotlib's name of its marker."""
        return list(MARKERS)[self.number % len(MARKERS)]

    @property
    def line(self) -> str:
        """Matplotlib's name of its line."""
        return list(_DASHES)[self.number // COLOURS % len(_DASHES)]

    @property
    def path(self) -> str:
        """Its marker as an SVG path."""
        return MARKERS[self.marker]

    @property
    def dashes(self) -> str:
        """Its line as SVG dashes."""
        return _DASHES[self.line]


def draw(panel: Panel, styles: Mapping[str, Style], name: str) -> str:
    """Return score against share of bytes kept as an SVG element; ids begin with ``name``."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colours = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(dict.fromkeys(colours, _TEXT))
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kvsieve"})
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        _frame(axes, panel)
        _front(axes, panel)
        for place, (label, style) in enumerate(styles.items()):
            aside = 1 + _ASIDE * (place - (len(styles) - 1) / 2)
            _line(axes, panel, label, style, aside)
        made = io.StringIO()
        FigureCanvasSVG(figure).print_svg(made, metadata=_NO_METADATA)
    return _for_page(made.getvalue(), name)


def _frame(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

    shares = [aggregate.share(point.rows) for point in panel.points]
    full = aggregate.full_score(panel.rows)
    axes.set_xscale("log")
    axes.set_xlim(min(0.04, 0.8 * min(shares)), max(1.25, 1.1 * max(shares)))
    axes.set_ylim(-0.04, 1.04)
    axes.xaxis.set_major_locator(FixedLocator(_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("bytes kept, share of the full cache")
    axes.set_ylabel("score")
    axes.grid(color=_TEXT, alpha=0.15, linewidth=0.6)
    axes.axhspan(full.low, full.high, color=_TEXT, alpha=0.12, linewidth=0)
    axes.axhline(full.mean, color=_TEXT, linewidth=1, linestyle="-.")
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)


def _front(axes: Any, panel: Panel) -> None:
    """Draw the best that any method reaches with so many bytes, as a step line behind all."""
    best = aggregate.front(panel)
    places = [aggregate.share(point.rows) for point in best]
    scores = [aggregate.score(point.rows).mean for point in best]
    drawn = axes.plot(
        places, scores, drawstyle="steps-post", color=_TEXT, alpha=0.25, linewidth=5, zorder=0
    )
    drawn[0].set_gid("front")


def _line(axes: Any, panel: Panel, label: str, style: Style, aside: float) -> None:
    points = [p for p in panel.points if p.label == label and p.method != FULL]
    if not points:
        return
    scores = [aggregate.score(point.rows) for point in points]
    ends = [
        [max(0.0, s.mean - s.low) for s in scores],
        [max(0.0, s.high - s.mean) for s in scores],
    ]
    drawn = axes.errorbar(
        [aside * aggregate.share(point.rows) for point in points],
        [s.mean for s in scores],
        yerr=ends,
        color=_SERIES.format(style.colour),
        marker=style.marker,
        linestyle=style.line,
        markersize=6,
        linewidth=1.6,
        elinewidth=1,
    )
    for part, artist in enumerate(drawn.get_children()):
        artist.set_gid(f"series{style.number}-{part}")


def _for_page(svg: str, name: str) -> str:
    """Return the element alone: ids unique on the page, colours from it, as wide as it has room."""
    element = svg[svg.index("<svg") :].strip()
    element = re.sub(r"<style.*?</style>", "", element, count=1, flags=re.DOTALL)
    return re.sub(r"<[^>]+>", lambda tag: _tag(tag.group(), name), element)


def _tag(tag: str, name: str) -> str:
    tag = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    tag = tag.replace(_TEXT, "currentColor")
    tag = re.sub(r"#fd00([0-9a-f]{2})", lambda m: f"var(--series-{int(m[1], 16)})", tag)
    if tag.startswith("<svg"):
        return re.sub(r'\s(?:width|height)="[^"]*"', "", tag)
    return tag
