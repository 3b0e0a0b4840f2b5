"""What a run kept, event by event: lists of positions, not masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class Event:
    """One compression of one layer.

    ``layer``: ordinal among the compressed layers; ``decoded``: decode steps since the last part of
    a prompt (0: at the part itself); ``seen[row]``: tokens that had passed; ``kept[row][head]``:
    positions that stayed, ascending, int32 ``[n]`` on the CPU. Tokens from ``seen`` on are held
    until the layer's next event.
    """

    layer: int
    decoded: int
    seen: list[int]
    kept: list[list[Tensor]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        kept = [[head.tolist() for head in row] for row in self.kept]
        return {"layer": self.layer, "decoded": self.decoded, "seen": self.seen, "kept": kept}


@dataclass(kw_only=True)
class Trace:
    """All events of a run, in order: 4 bytes for each slot kept, event by event.

    Rows are numbered as they were at the event: beam search and batch selection move them.
    """

    events: list[Event] = field(default_factory=list)

    def record(self, layer: int, decoded: int, store: Store) -> None:
        """Note what a layer holds now."""
        B, H = store.counts.shape
        position = store["position"].expand(B, H, -1).cpu()
        live = store.live
        there = torch.ones_like(position, dtype=torch.bool) if live is None else live.cpu()
        there = there.expand(B, H, -1)
        kept = [[position[b, h][there[b, h]].int() for h in range(H)] for b in range(B)]
        seen = store.seen.tolist()
        self.events.append(Event(layer=layer, decoded=decoded, seen=seen, kept=kept))

    def of(self, layer: int) -> list[Event]:
        """Return the events of one layer, in order."""
        return [event for event in self.events if event.layer == layer]

    def visible(self, layer: int, row: int, head: int) -> Tensor:
        """Return which tokens' queries could see which tokens' keys, bool ``[n, n]``.

        n: tokens seen at the layer's last event. Query t sees itself and what came before it,
        but for what events before it dropped. For drawing and for training with masks; it is as
        large as the attention of a full cache.
        """
        events = self.of(layer)
        n = events[-1].seen[row] if events else 0
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        for event in events:
            dropped = torch.ones(event.seen[row], dtype=torch.bool)
            dropped[event.kept[row][head].long()] = False
            mask[event.seen[row] :, : event.seen[row]].masked_fill_(dropped, False)
        return mask
