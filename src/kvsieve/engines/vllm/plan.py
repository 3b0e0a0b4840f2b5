"""What one forward of vLLM means to a compressed cache: pure arithmetic on lengths, no tensors.

A row is a request's share of the forward: tokens n0 .. n1 - 1 of a request, at ``start .. stop`` of
the flat batch. With C0 columns compacted before it, attention sees the columns 0 .. B - 1 and those
from C0 on; if C1 > C0 columns are to be compacted after it, an event follows in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvsieve.columns import Columns


@dataclass(frozen=True, kw_only=True)
class Row:
    """One request in one forward. ``index``: its row in the batch; ``key``: the request's id."""

    index: int
    key: str
    n0: int
    n1: int
    prompt: int
    start: int

    @property
    def tokens(self) -> int:
        return self.n1 - self.n0

    @property
    def stop(self) -> int:
        return self.start + self.tokens

    @property
    def prefill(self) -> bool:
        """Whether this is a part of a prompt, in the sense of ``kvsieve.session``."""
        return self.tokens > 1 or self.n0 < max(1, self.prompt)


@dataclass(frozen=True, kw_only=True)
class Event:
    """A compaction that is due after a row's attention.

    ``sources``: the logical columns that hold the request's ``slots`` slots now, in order; into the
    first ``kept_columns`` of them it is compacted; ``vacated``: those that hold nothing afterwards.
    """

    row: Row
    slots: int
    kept_columns: int
    sources: tuple[int, ...]
    vacated: tuple[int, ...]


@dataclass(kw_only=True)
class Plan:
    """What the rows of a forward call for, in any layer.

    ``seen``: per row, the logical columns that attention sees (None: all, as without compression);
    ``lengths``: per row, the slots that attention sees.
    """

    columns: Columns
    rows: list[Row]
    seen: list[tuple[int, ...] | None] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


def plan(columns: Columns, rows: Sequence[Row]) -> Plan:
    """Work out a forward."""
    made = Plan(columns=columns, rows=list(rows))
    for row in rows:
        before, after = (columns.dropped(n, row.prompt) for n in (row.n0, row.n1))
        held = columns.held(row.n1, row.prompt, since=row.n0)
        sources = holding(columns, before, row.n1)
        made.seen.append(sources if before else None)
        made.lengths.append(held)
        if after > before:
            made.events.append(
                Event(
                    row=row,
                    slots=held,
                    kept_columns=columns.kept,
                    sources=sources,
                    vacated=tuple(c for c in sources if columns.kept <= c < after),
                )
            )
    return made


def holding(columns: Columns, dropped: int, n: int) -> tuple[int, ...]:
    """Return the logical columns that hold ``n`` tokens of which ``dropped`` are compacted."""
    last = -(-n // columns.block)
    kept = range(columns.kept) if dropped else range(0)
    return (*kept, *range(dropped, last))
