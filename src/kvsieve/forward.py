"""Records of a session: the forward in progress, a layer's state, a layer that waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvsieve.interfaces import Scorer
from kvsieve.moments import QueryMoments
from kvsieve.prediction import Prediction
from kvsieve.queries import QueryWindow, newest
from kvsieve.step import LayerInfo, Step
from kvsieve.store import Arrival, Store
from kvsieve.store.rows import storage_bytes


@dataclass(kw_only=True)
class Forward:
    """What one forward brings to all layers: T tokens per row, which of them are real."""

    T: int
    live: Tensor | None = None
    offset: Tensor | None = None
    prefill: bool = True
    first_part: bool = True  # of a prompt: nothing came before, or decoding did
    turns: int = 0  # complete prompts that came before
    due: bool = False
    rows: Tensor | None = None  # [B] or [1] (all alike) bool, CPU: where the schedule is due
    owing: Tensor | None = None  # [B] bool, CPU: those of them from which something may go
    replayed: Tensor | None = None
    arrival: Arrival | None = None
    budgets: Tensor | None = None
    prediction: Prediction | None = None


@dataclass(kw_only=True)
class LayerState:
    """One compressed layer: its table, and what its scorer wants remembered beside it."""

    info: LayerInfo
    store: Store
    recent: QueryWindow | None = None
    moments: QueryMoments | None = None
    positions: Tensor | None = None
    mark: tuple[Tensor, int | Tensor] | None = None
    logical: int = 0
    version: int = -1
    nbytes: int = 0

    def step(self, forward: Forward, query: Tensor, scale: float, **attention: Any) -> Step:
        """Return what this layer shows in a forward; ``attention``: keys, sinks, softcap."""
        assert self.positions is not None, "append comes before attend"
        return Step(
            layer=self.info,
            query=query,
            scale=scale,
            positions=self.positions,
            live=forward.live,
            prefill=forward.prefill,
            offset=forward.offset,
            recent=self.recent,
            replayed=forward.replayed,
            **attention,
        )

    def remember(self, step: Step, scorer: Scorer, first_part: bool, soon: bool) -> None:
        """Keep what later forwards will ask for: the prompt's moments, the newest queries.

        ``soon``: whether this step's queries will still be among the last W when the schedule
        is due next while decoding. Parts of a prompt keep theirs for the next part.
        """
        if scorer.moments is not None and step.prefill:
            if self.moments is None or first_part:
                self.moments = QueryMoments.empty(step.query)
            self.moments.take_in(step, leave_out=scorer.moments)
            step.moments = self.moments
        if soon or (step.prefill and scorer.window and scorer.moments is None):
            if self.recent is None:
                self.recent = step.recent = QueryWindow.empty(step.query, scorer.window)
            elif step.prefill:
                # What is pushed below overwrites the queries of earlier parts.
                step.earlier = self.recent.copied()
            queries, positions, valid = newest(step.query, step.positions, step.live, scorer.window)
            if self.recent.push(queries, positions, None if step.live is None else valid):
                self.version = -1  # bytes have changed
        elif not step.prefill:
            self.forget()

    def decided(self, rows: Tensor) -> None:
        """The prompts of these ``rows [B]`` (bool) have no more use for their moments."""
        if self.moments is not None and not bool(rows.all()):
            self.moments.drop(rows)
        else:
            self.moments = None

    def forget(self) -> None:
        """Drop what was remembered."""
        if self.recent is not None or self.moments is not None:
            self.recent = self.moments = None
            self.version = -1

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index`` of them."""
        for part in (self.store, self.recent, self.moments):
            if part is not None:
                part.select_rows(index)

    def state_bytes(self) -> int:
        """Bytes held beside the table: remembered queries and their moments."""
        window = [] if self.recent is None else self.recent.tensors()
        moments = [] if self.moments is None else self.moments.tensors()
        return storage_bytes([*window, *moments])


@dataclass(kw_only=True)
class Pending:
    """A layer that was scored and waits for the decision."""

    ordinal: int
    scores: Tensor
    step: Step
