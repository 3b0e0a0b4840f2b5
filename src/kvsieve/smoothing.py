"""Pieces of scores that follow a value over queries in order of time, and over slots that move."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvsieve.allocators import top_mask
from kvsieve.packing import pick, put_back, real_first
from kvsieve.queries import pick_queries
from kvsieve.step import Step


def ordered_window(step: Step, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``step.window(size)`` in order of time; what is not valid comes first."""
    queries, positions, valid = step.window(size)
    order = positions.masked_fill(~valid, -1).argsort(dim=1)
    return pick_queries(queries, order), positions.gather(1, order), valid.gather(1, order)


def average_weights(valid: Tensor, alpha: float) -> Tensor:
    """Return each query's weight in ``E <- alpha x + (1 - alpha) E``, ``[B, W]`` in fp32.

    ``valid [B, W]``, in order of time, what is not valid first: its weight is 0. E starts as the
    oldest valid x.
    """
    age = torch.arange(valid.shape[1] - 1, -1, -1, device=valid.device)
    oldest = age == valid.sum(1, keepdim=True) - 1
    kept = (1 - alpha) ** age.float()
    return torch.where(oldest, kept, alpha * kept).masked_fill(~valid, 0.0)


def places_of_best(attention: Tensor, live: Tensor, count: Tensor) -> Tensor:
    """Return the mean place of each query's ``count [B, H]`` best slots, ``[B, H, G, W]`` in fp64.

    ``attention [B, H, G, W, S]``; places count the ``live [B, 1 or H, S]`` slots from 0 on.
    """
    place = (live.long().cumsum(-1) - 1).double()[:, :, None]
    count = count.to(attention.device)[:, :, None]
    means = []
    for row in attention.unbind(3):  # [B, H, G, S]: one query at a time bounds memory
        chosen = top_mask(row.masked_fill(~live[:, :, None], -1.0), count)
        means.append((place * chosen).sum(-1) / count)
    return torch.stack(means, -1)


def drift_of_halves(places: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of the earlier half of ``places [B, H, G, W]`` minus that of the later one.

    ``valid [B, W]`` says which queries count, in order of time; ``[B, H, G]``, 0 where one half is
    empty.
    """
    half = valid.sum(1, keepdim=True) // 2
    early = valid & (valid.cumsum(1) <= half)
    front, rear = (x.double()[:, None, None] for x in (early, valid & ~early))
    first, second = ((places * x).sum(-1) / x.sum(-1).clamp_min(1) for x in (front, rear))
    return (first - second).masked_fill(half[:, :, None] == 0, 0.0)


def moving_mean(scores: Tensor, inside: Tensor, reach: Tensor, shift: Tensor) -> Tensor:
    """Return the mean of ``scores`` over slots ``n + shift - reach .. n + shift + reach``, each n.

    ``scores [B, H, S]``, ``inside [B, 1 or H, S]``, ``reach`` and ``shift [B, H]`` int64. Only
    slots ``inside`` count, in their order; beyond their ends the first and last are repeated. By
    running sums: O(S) whatever the reach. What comes out for slots outside is meaningless.
    """
    order = real_first(inside, scores.shape[1])
    packed = pick(scores.masked_fill(~inside, 0.0), order).double()
    count = inside.sum(-1, keepdim=True).expand(*scores.shape[:2], 1)
    start = torch.arange(scores.shape[-1], device=scores.device) + (shift - reach)[..., None]
    width = 2 * reach[..., None] + 1
    end, zero = start + width, torch.zeros_like(count)
    total = F.pad(packed.cumsum(-1), (1, 0))
    within = total.gather(-1, end.clamp(zero, count)) - total.gather(-1, start.clamp(zero, count))
    before = torch.minimum((-start).clamp_min(0), width) * packed[..., :1]
    last = packed.gather(-1, (count - 1).clamp_min(0))
    behind = torch.minimum((end - count).clamp_min(0), width) * last
    return put_back(((before + within + behind) / width).to(scores.dtype), order)
