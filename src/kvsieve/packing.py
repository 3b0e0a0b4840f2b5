"""Real slots side by side, for scores that cut a head's slots into chunks.

Padding may lie before, between and behind real tokens, and heads may hold unequal numbers of slots:
a chunk is of slots that exist, in their order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvsieve.store import Store


def live_slots(store: Store) -> Tensor:
    """Return which slots exist, bool ``[B, 1 or H, S]``."""
    live = store.live
    return torch.ones_like(store["position"], dtype=torch.bool) if live is None else live


def real_first(inside: Tensor, heads: int) -> Tensor:
    """Return the order ``[B, H, S]`` that puts the slots ``inside [B, 1 or H, S]`` first."""
    order = (~inside).byte().argsort(dim=-1, stable=True)
    return order.expand(-1, heads, -1)


def pick(x: Tensor, order: Tensor) -> Tensor:
    """Return ``x [B, H, S]`` or ``[B, H, S, D]`` in an ``order [B, H, S]``."""
    if x.dim() == 4:
        order = order[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, order)


def put_back(packed: Tensor, order: Tensor) -> Tensor:
    """Undo ``pick`` for ``packed [B, H, S]``."""
    return torch.empty_like(packed).scatter(2, order, packed)


def lay_out(x: Tensor, place: Tensor, width: int) -> Tensor:
    """Put ``x [B, H, N(, D)]`` at its ``place [B, H, N]`` (-1: none) of ``width``; zeros else."""
    out = x.new_zeros(*x.shape[:2], width + 1, *x.shape[3:])
    index = place.masked_fill(place < 0, width)
    if x.dim() == 4:
        index = index[..., None].expand_as(x)
    return out.scatter(2, index, x)[:, :, :width]
