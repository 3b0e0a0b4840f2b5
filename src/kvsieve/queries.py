"""The newest queries of a layer: of one forward, and remembered over several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(kw_only=True)
class QueryWindow:
    """The last W queries of a layer, kept across forwards; their order is not kept.

    ``queries [B, H, G, N, D]``, ``positions [B, N]``, ``valid [B, N]``, with N <= W as large as has
    been needed so far (a slot that was never filled, or holds padding, is not valid).
    """

    window: int
    queries: Tensor
    positions: Tensor
    valid: Tensor
    pushed: int = 0

    @classmethod
    def empty(cls, like: Tensor, window: int) -> QueryWindow:
        """Return a window without queries, for queries shaped like ``[B, H, G, T, D]``."""
        B, H, G, _, D = like.shape
        return cls(
            window=window,
            queries=like.new_zeros(B, H, G, 0, D),
            positions=torch.zeros(B, 0, dtype=torch.int64, device=like.device),
            valid=torch.zeros(B, 0, dtype=torch.bool, device=like.device),
        )

    def push(self, queries: Tensor, positions: Tensor, valid: Tensor | None) -> bool:
        """Take in the newest ``queries [B, H, G, T, D]``, T at most the window.

        ``valid [B, T]`` marks padding (None: none). Returns whether tables were allocated anew.
        """
        if valid is not None:
            return self._push_padded(queries, positions, valid)
        T = queries.shape[3]
        grown = self._reserve(self.pushed + T)
        size = self.queries.shape[3]
        start = self.pushed % size
        if start + T <= size:
            at: slice | Tensor = slice(start, start + T)
        else:
            at = torch.arange(start, start + T, device=queries.device) % size
        self.queries[:, :, :, at] = queries
        self.positions[:, at] = positions
        self.valid[:, at] = True
        self.pushed += T
        return grown

    def _push_padded(self, queries: Tensor, positions: Tensor, valid: Tensor) -> bool:
        """Padding takes no place: each row keeps its own newest real queries, oldest first."""
        queries = torch.cat([self.queries, queries], 3)
        positions = torch.cat([self.positions, positions], 1)
        valid = torch.cat([self.valid, valid], 1)
        order = positions.masked_fill(~valid, -1).argsort(dim=1)[:, -self.window :]
        self.queries = pick_queries(queries, order)
        self.positions, self.valid = positions.gather(1, order), valid.gather(1, order)
        self.pushed = order.shape[1]
        return True

    def _reserve(self, needed: int) -> bool:
        size = self.queries.shape[3]
        if size == self.window or needed <= size:
            return False
        extra = min(self.window, max(needed, 2 * size)) - size
        self.queries = F.pad(self.queries, (0, 0, 0, extra))
        self.positions = F.pad(self.positions, (0, extra))
        self.valid = F.pad(self.valid, (0, extra))
        return True

    def copied(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, positions and validity as they are now, whatever is pushed later."""
        return self.queries.clone(), self.positions.clone(), self.valid.clone()

    def tensors(self) -> list[Tensor]:
        """Return everything stored, for counting bytes."""
        return [self.queries, self.positions, self.valid]

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index`` of them."""
        self.queries = self.queries.index_select(0, index)
        self.positions = self.positions.index_select(0, index)
        self.valid = self.valid.index_select(0, index)


def newest(
    query: Tensor, positions: Tensor, live: Tensor | None, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's last ``size`` real queries, whichever side its padding is on."""
    B, T = query.shape[0], query.shape[3]
    W = min(size, T)
    if live is None:
        valid = torch.ones(B, W, dtype=torch.bool, device=query.device)
        return query[:, :, :, T - W :], positions[:, T - W :], valid
    # Padding sorts first, real tokens keep their order: the last W are the newest real ones.
    order = live.long().argsort(dim=1, stable=True)[:, T - W :]
    return pick_queries(query, order), positions.gather(1, order), live.gather(1, order)


def pick_queries(queries: Tensor, order: Tensor) -> Tensor:
    """Return ``queries [B, H, G, T, D]`` at ``order [B, W]`` as ``[B, H, G, W, D]``."""
    B, H, G, _, D = queries.shape
    return queries.gather(3, order[:, None, None, :, None].expand(B, H, G, -1, D))
