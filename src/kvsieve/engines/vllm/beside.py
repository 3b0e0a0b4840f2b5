"""What a layer keeps beside vLLM's blocks, per request: positions, columns, queries, moments.

Blocks hold keys and values only. Where slots came from and what a scorer carries with them is kept
here, for the requests in flight and for compacted slots only: an uncompacted slot's position is its
place, and its columns are as new.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvsieve.engines.vllm.plan import Event, Plan, Row
from kvsieve.errors import EngineError
from kvsieve.interfaces import Scorer
from kvsieve.moments import QueryMoments
from kvsieve.queries import QueryWindow
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.dense import Dense
from kvsieve.store.rows import storage_bytes


@dataclass(kw_only=True)
class Request:
    """One request in one layer: columns ``[1, H, N]`` of its first N slots, prompt moments."""

    columns: dict[str, Tensor] = field(default_factory=dict)
    moments: QueryMoments | None = None


class Places:
    """Which place of the query rings each request has; shared by all layers of a worker."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        self.free: list[int] = []

    @property
    def size(self) -> int:
        """Places in use or free: what a ring must hold."""
        return len(self.of) + len(self.free)

    def take(self, key: str) -> int:
        """Return the request's place, a new one if it has none."""
        if key not in self.of:
            self.of[key] = self.free.pop() if self.free else len(self.of)
        return self.of[key]

    def drop(self, key: str) -> None:
        """Give the request's place to others."""
        if key in self.of:
            self.free.append(self.of.pop(key))


@dataclass(kw_only=True)
class Writes:
    """Which queries of a forward go where in the rings: two index tensors ``[N]`` int64."""

    tokens: Tensor
    places: Tensor

    @classmethod
    def of(cls, plan: Plan, places: Places, window: int, device: torch.device) -> Writes:
        """The last ``window`` queries of every row."""
        tokens: list[int] = []
        where: list[int] = []
        for row in plan.rows:
            base = places.take(row.key) * window
            first = max(row.n0, row.n1 - window)
            tokens += range(row.start + first - row.n0, row.stop)
            where += [base + p % window for p in range(first, row.n1)]
        made = torch.tensor([tokens, where], dtype=torch.int64)
        return cls(tokens=made[0].to(device), places=made[1].to(device))


class Beside:
    """One layer's state: what ``scorer`` wants kept for a layer of ``heads`` KV heads."""

    def __init__(self, scorer: Scorer, heads: int) -> None:
        self.scorer, self.heads = scorer, heads
        self.requests: dict[str, Request] = {}
        self.ring: Tensor | None = None  # [places, W, Hq, D]

    # -- every forward ---------------------------------------------------------------------------

    def forget(self, keys: Collection[str]) -> None:
        """Drop requests that ended, or start again."""
        for key in keys:
            self.requests.pop(key, None)

    def push(self, query: Tensor, writes: Writes, size: int) -> None:
        """Take in the newest of ``query [tokens, Hq, D]``; ``size``: places in use."""
        window = self.scorer.window
        had = 0 if self.ring is None else self.ring.shape[0]
        if self.ring is None or had < size:
            grown = query.new_zeros(max(size, 2 * had), window, *query.shape[1:])
            if self.ring is not None:
                grown[:had] = self.ring
            self.ring = grown
        self.ring.view(-1, *query.shape[1:])[writes.places] = query[writes.tokens]

    def remembered(self, row: Row, place: int) -> QueryWindow:
        """Return the request's last queries, this forward's included."""
        assert self.ring is not None, "pushed before"
        window = self.scorer.window
        positions = torch.arange(max(0, row.n1 - window), row.n1, device=self.ring.device)
        queries = grouped(self.ring[place][positions % window], self.heads)
        return QueryWindow(
            window=window,
            queries=queries,
            positions=positions[None],
            valid=torch.ones_like(positions, dtype=torch.bool)[None],
            pushed=len(positions),
        )

    def observe(self, row: Row, step: Step) -> None:
        """Add a prompt part's queries to the request's moments, if the scorer wants any."""
        if self.scorer.moments is None or not row.prefill:
            return
        request = self.requests.setdefault(row.key, Request())
        if request.moments is None or row.n0 == 0:
            request.moments = QueryMoments.empty(step.query)
        request.moments.take_in(step, leave_out=self.scorer.moments)
        step.moments = request.moments

    # -- at an event -----------------------------------------------------------------------------

    def store(self, event: Event, keys: Tensor, values: Tensor) -> Store:
        """Return a request's slots as a table: the first of ``keys``, ``values [1, H, P b, D]``.

        Raises:
            EngineError: the positions of compacted slots are lost: a fault of the plugin.
        """
        row, S = event.row, event.slots
        store = Store(self.scorer.columns)
        old = self.requests[row.key].columns if row.key in self.requests else {}
        if S < row.n1 and not old:
            raise EngineError(f"Request {row.key!r}: the positions of its kept slots are lost.")
        position = torch.arange(row.n1 - S, row.n1, dtype=torch.int32, device=keys.device)
        new = {"position": position.expand(1, self.heads, S).clone()}
        for column in self.scorer.columns:
            shape = (1, self.heads, S)
            new[column.name] = torch.full(
                shape, column.fill, dtype=column.dtype, device=keys.device
            )
        for name, known in old.items():
            new[name][:, :, : known.shape[2]] = known
        store.table = _dense(keys, values, new, S)
        store.seen = torch.tensor([row.n1])
        return store

    def keep(self, event: Event, store: Store) -> None:
        """Take over the columns of what a compaction left, and forget the prompt's moments."""
        request = self.requests.setdefault(event.row.key, Request())
        request.columns = {name: store[name].clone() for name in ("position", *store.schema)}
        request.moments = None

    def nbytes(self) -> int:
        """Bytes held: rings, columns and moments of all requests."""
        held = [x for request in self.requests.values() for x in request.columns.values()]
        for request in self.requests.values():
            held += request.moments.tensors() if request.moments is not None else []
        return storage_bytes(held if self.ring is None else [*held, self.ring])


def grouped(query: Tensor, heads: int) -> Tensor:
    """Turn ``[T, Hq, D]`` into ``[1, H, G, T, D]``."""
    T, Hq, D = query.shape
    return query.reshape(T, heads, Hq // heads, D).permute(1, 2, 0, 3)[None]


def _dense(keys: Tensor, values: Tensor, columns: dict[str, Tensor], size: int) -> Dense:
    table = Dense()
    table.keys, table.values, table.columns = keys, values, columns
    table.size = size
    table.counts = torch.full(keys.shape[:2], size, dtype=torch.int64)
    table.version = 1
    return table
