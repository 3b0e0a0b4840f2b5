# pyright: reportMissingImports=false
"""What happened: plain counters in this process, and the same for Prometheus where it is there.

vLLM's /metrics shows the counters of the process that answers; those of the engine and its
workers are added when ``PROMETHEUS_MULTIPROC_DIR`` names an empty folder before anything starts,
which is what ``kvsieve serve`` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Protocol

METRICS = {
    "kvsieve_blocks_held": "KV cache blocks that requests hold",
    "kvsieve_blocks_freed": "KV cache blocks freed by compaction, of requests still running",
    "kvsieve_compactions": "Compactions: one request, all layers",
    "kvsieve_compaction_seconds": "Seconds spent compacting, all layers",
    "kvsieve_tokens_evicted": "Slots removed from each head, over all requests",
    "kvsieve_side_bytes": "Bytes kept beside the blocks: positions, scores, remembered queries",
}


class Sized(Protocol):
    """Something that knows its bytes."""

    def nbytes(self) -> int: ...


@dataclass(kw_only=True)
class Tally:
    """Counters of one process; ``compactions`` and ``evicted`` are counted by the first layer.

    ``published``: also for Prometheus. Of several workers that share a model's heads all compact
    at the same time, so that only the ``first`` counts; bytes beside the blocks are everybody's.
    """

    published: bool = False
    first: bool = True
    compactions: int = 0
    evicted: int = 0
    seconds: float = 0.0
    blocks_freed: int = 0
    blocks_held: int = 0
    side_bytes: int = 0
    _beside: dict[int, int] = field(default_factory=dict, repr=False)

    def compacted(self, ordinal: int, removed: int, seconds: float, beside: Sized) -> None:
        """Count one request in one layer."""
        self._beside[ordinal] = beside.nbytes()
        if ordinal == 0:
            self.side_bytes = sum(self._beside.values())
            self._set("kvsieve_side_bytes", self.side_bytes)
        if not self.first:
            return
        self.seconds += seconds
        self._add("kvsieve_compaction_seconds", seconds)
        if ordinal == 0:
            self.compactions += 1
            self.evicted += removed
            self._add("kvsieve_compactions", 1)
            self._add("kvsieve_tokens_evicted", removed)

    def freed(self, blocks: int) -> None:
        """Count blocks that compaction gave back to the pool."""
        self.blocks_freed += blocks
        self._add("kvsieve_blocks_freed", blocks)
        self.taken(-blocks)

    def taken(self, blocks: int) -> None:
        """Count blocks that requests took (or, negative, gave back)."""
        if blocks:
            self.blocks_held += blocks
            self._set("kvsieve_blocks_held", self.blocks_held)

    def _add(self, name: str, amount: float) -> None:
        if self.published:
            _metric(name).inc(amount)

    def _set(self, name: str, value: float) -> None:
        if self.published:
            _metric(name).set(value)

    def to_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return {name: value for name, value in asdict(self).items() if name[0] != "_"}


TALLY = Tally()
"""This process's counters."""


def names() -> Iterable[str]:
    """Return the Prometheus names, as they are exposed."""
    gauges = ("kvsieve_blocks_held", "kvsieve_side_bytes")
    return [name if name in gauges else f"{name}_total" for name in METRICS]


@cache
def _metric(name: str) -> Any:
    from prometheus_client import Counter, Gauge

    if name in ("kvsieve_blocks_held", "kvsieve_side_bytes"):
        return Gauge(name, METRICS[name], multiprocess_mode="livesum")
    return Counter(name, METRICS[name])
