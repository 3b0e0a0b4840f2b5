"""Measure prefill, decode, compression and bytes of methods, side by side with stock caches.

For every cell the stock cache, the stock cache of a context as short as the budget, and the method
decode in turns, so that whatever else the machine does strikes all of them alike; ratios are taken
within a cell. The stock caches are filled once per group and rewound for each cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set

import torch

from kvsieve.bench import rows
from kvsieve.bench.cell import Bench
from kvsieve.bench.plan import Group, Settings, Spec
from kvsieve.bench.remote import Peer
from kvsieve.bench.rows import Row


def measure(
    settings: Settings,
    done: Set[str] = frozenset(),
    peer: Peer | None = None,
    on_cell: Callable[[Group, Spec], None] = lambda group, spec: None,
) -> Iterator[Row]:
    """Yield one row per cell as it finishes; cells whose ``rows.key`` is in ``done`` are skipped.

    ``on_cell`` hears of every cell before it starts, skipped ones included.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for group in settings.groups():
            bench: Bench | None = None
            for spec in group.specs():
                on_cell(group, spec)
                row = identity(group, spec, peer)
                if rows.key(row) not in done:
                    bench = bench or Bench(group, peer)
                    yield row | bench.cell(spec)
    finally:
        torch.set_num_threads(before)


def identity(group: Group, spec: Spec, peer: Peer | None = None) -> Row:
    """Return the part of a row that says what it is of."""
    settings = group.settings
    versions = rows.versions()
    if spec.engine == "kvpress":
        assert peer is not None, "kvpress cells need its process"
        # The stock caches run here, the press there.
        versions |= {f"peer_{name}": number for name, number in peer.versions.items()}
        versions["kvpress"] = versions.pop("peer_kvpress")
    return {
        "kind": rows.KIND,
        "version": rows.VERSION,
        "engine": spec.engine,
        "method": spec.method,
        "budget": spec.budget,
        "options": spec.options,
        "model": settings.shape.name,
        "context": group.context,
        "batch": group.batch,
        "dtype": group.dtype,
        "device": settings.device,
        "threads": settings.threads,
        "steps": settings.steps,
        "cpu": rows.cpu(),
        "versions": versions,
        "commit": rows.commit(),
    }
