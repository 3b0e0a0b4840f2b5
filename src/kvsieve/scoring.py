"""Pieces of scores that several methods use unchanged."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvsieve.errors import RecipeError
from kvsieve.packing import pick, put_back, real_first
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.attend import layer_block, query_blocks

Pooling = Literal["avg", "max", "none"]

# Keys that are compared with all others at once; a tile that stays in the processor's cache.
REDUNDANCY_TILE = 128


def window_mean(step: Step, store: Store, window: int) -> Tensor:
    """Return the mean attention of the last ``window`` real queries, ``[B, H, G, S]`` in fp32."""
    weights = step.attention(store, window)  # [B, H, G, W, S]
    valid = step.window(window)[2].sum(1).clamp_min(1)
    return weights.sum(3) / valid[:, None, None, None]


def before_window(store: Store, window: int) -> Tensor:
    """Mark live slots older than each row's last ``window`` tokens, bool ``[B, 1 or H, S]``."""
    first = (store.seen - window).to(store.device)[:, None, None]
    older = store["position"] < first
    live = store.live
    return older if live is None else older & live


def check_kernel(kernel: int) -> None:
    """Refuse pooling kernels that have no middle.

    Raises:
        RecipeError: an even kernel, or none.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise RecipeError(f"kernel={kernel}: the pooling kernel must be odd.")


def pool(scores: Tensor, inside: Tensor, kernel: int, pooling: Pooling) -> Tensor:
    """Smooth non-negative ``scores [B, H, S]`` over neighbouring slots of the part ``inside``.

    Slots outside count as zero, as the zero padding at the ends of that part; stride 1, same
    length. What comes out for slots outside is meaningless.
    """
    if pooling == "none" or kernel == 1:
        return scores
    masked = scores.masked_fill(~inside, 0.0)
    apply = F.avg_pool1d if pooling == "avg" else F.max_pool1d
    # Neighbours are real tokens: padding of a later turn, between two of them, is passed over.
    order = real_first(inside, scores.shape[1])
    pooled = apply(pick(masked, order), kernel, stride=1, padding=kernel // 2)
    return put_back(pooled, order)


def smooth(scores: Tensor, inside: Tensor, kernel: int) -> Tensor:
    """Average ``scores [B, H, S]`` of any sign over the neighbouring slots of the part ``inside``.

    At the ends of that part the mean goes over fewer slots: nothing is padded, so that scores may
    be negative. What comes out for slots outside is meaningless.
    """
    if kernel == 1:
        return scores
    order = real_first(inside, scores.shape[1])
    masked = pick(scores.masked_fill(~inside, 0.0), order)
    there = pick(inside.expand_as(scores), order).float()
    total, share = (F.avg_pool1d(x, kernel, 1, kernel // 2) for x in (masked, there))
    mean = total / share.clamp_min(1 / (2 * kernel))
    return put_back(mean, order)


def rank(scores: Tensor, inside: Tensor) -> Tensor:
    """Return each slot's rank within its head: 1 for the best of n slots ``inside``, 1/n the last.

    ``scores [B, H, S]`` -> ``[B, H, S]``; ties go to the earlier slot.
    """
    order = (
        scores.masked_fill(~inside, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    )
    count = inside.sum(-1, keepdim=True).clamp_min(1).expand(*scores.shape[:2], 1)
    place = torch.arange(scores.shape[-1], device=scores.device)
    return torch.empty_like(scores).scatter(-1, order, (count - place) / count)


def standardise(
    scores: Tensor, inside: Tensor, dim: tuple[int, ...] = (-1,), correction: int = 0
) -> Tensor:
    """Shift and scale ``scores [B, H, S]`` to mean 0 and deviation 1 over the slots ``inside``.

    ``dim``: the axes over which they go: the slots of each head, or (1, 2), all of a row;
    ``correction``: 1 for the deviation of a sample. What comes out elsewhere is meaningless.
    """
    inside = inside.expand_as(scores)
    count = inside.sum(dim, keepdim=True)
    mean = scores.masked_fill(~inside, 0.0).sum(dim, keepdim=True) / count.clamp_min(1)
    centred = (scores - mean).masked_fill(~inside, 0.0)
    variance = centred.square().sum(dim, keepdim=True) / (count - correction).clamp_min(1)
    # Where all scores are equal, rounding would be blown up to whole deviations.
    return centred / variance.sqrt().clamp_min(1e-6)


def redundancy(store: Store, threshold: float) -> Tensor:
    """Return how much each key repeats others, ``[B, H, S]`` in fp32, a softmax over live slots.

    Mean cosine with all other keys; for every key j the *latest* other key i with
    ``cos(i, j) > threshold`` is forgiven j, so that of near-duplicates the newest stays
    (R-KV, arXiv 2505.24133). Tiled: never n x n in memory.
    """
    keys = store.keys.float()
    unit = keys / (keys.norm(dim=-1, keepdim=True) + 1e-6)  # [B, H, S, D]
    live = store.live
    if live is not None:
        unit = unit.masked_fill(~live[..., None], 0.0)
    B, H, S, _ = unit.shape
    forgiven = torch.zeros(B, H, S, device=unit.device)
    # From 1 on, in fp32 (exact up to 2^24 slots): one product and one maximum find the latest.
    slots = torch.arange(1, S + 1, dtype=torch.float32, device=unit.device)
    for j0 in range(0, S, REDUNDANCY_TILE):
        cos = unit[:, :, j0 : j0 + REDUNDANCY_TILE] @ unit.transpose(-1, -2)  # [B, H, J, S]
        cos.diagonal(j0, -2, -1).fill_(-2.0)  # a key doesn't repeat itself
        latest = ((cos > threshold) * slots).amax(-1).long() - 1  # [B, H, J]; -1: none
        value = cos.gather(-1, latest.clamp_min(0)[..., None])[..., 0]
        forgiven.scatter_add_(2, latest.clamp_min(0), value.masked_fill(latest < 0, 0.0))
    # The sum over all other keys needs no pairs: cosines are linear in the second key.
    total = (unit * unit.sum(2, keepdim=True)).sum(-1) - unit.square().sum(-1)
    count = store.counts.to(unit.device)[..., None]
    mean = (total - forgiven) / count
    if live is not None:
        mean = mean.masked_fill(~live, -torch.inf)
    return mean.softmax(-1)


def divide_by_peak(scores: Tensor, inside: Tensor) -> Tensor:
    """Divide ``scores [B, H, S]`` by each head's largest value among the slots ``inside``."""
    peak = scores.masked_fill(~inside, 0.0).amax(-1, keepdim=True)
    return scores / peak.clamp_min(torch.finfo(torch.float32).tiny)


def column_norm(step: Step, store: Store, window: int, grouped: bool) -> Tensor:
    """Return ``||A[last W, i]||_2`` in fp32: ``[B, H, G, S]`` per query head, or with ``grouped``
    that of the group's mean attention ``[B, H, 1, S]``; in blocks of queries.
    """
    queries, positions, valid = step.window(window)
    B, H, G, W, _ = queries.shape
    total = torch.zeros(B, H, 1 if grouped else G, store.slots, device=queries.device)
    for w0, w1 in query_blocks(W, B * H * G * store.slots, layer_block(store.keys)):
        block = step.weights(
            store, queries[:, :, :, w0:w1], positions[:, w0:w1], valid[:, w0:w1]
        )  # [B, H, G, w, S]
        if grouped:
            block = block.mean(2, keepdim=True)
        total += block.square_().sum(3)
    return total.sqrt_()


def value_norm(store: Store) -> Tensor:
    """Return ``||v||_2``, ``[B, H, S]`` in fp32, in blocks of slots."""
    values = store.values
    B, H, S, Dv = values.shape
    out = torch.empty(B, H, S, device=values.device)
    for s0, s1 in query_blocks(S, B * H * Dv, layer_block(values)):
        out[:, :, s0:s1] = values[:, :, s0:s1].float().norm(dim=-1)
    return out


def projected_norm(step: Step, store: Store, summed: bool = False) -> Tensor:
    """Return ``||v W_O||_2`` in fp32: ``[B, H, G, S]`` per query head, or with ``summed`` that of
    the group's summed output matrices ``[B, H, 1, S]``.

    In Gram form ``sqrt(v^T (W_O W_O^T) v)``, in blocks of slots: the projected values, of C
    numbers a slot, are never built.
    """
    gram, values = step.layer.gram(summed), store.values  # [H, 1|G, Dv, Dv]
    B, H, S, Dv = values.shape
    out = torch.empty(B, H, gram.shape[1], S, device=values.device)
    for s0, s1 in query_blocks(S, B * H * Dv, layer_block(values)):
        block = values[:, :, s0:s1].float()
        for g in range(gram.shape[1]):
            squared = (block @ gram[:, g]).mul_(block).sum(-1)
            out[:, :, g, s0:s1] = squared.clamp_min_(0).sqrt_()
    return out


def projected_l1(step: Step, store: Store) -> Tensor:
    """Return the group mean of ``||v W_O||_1``, ``[B, H, S]`` in fp32, in blocks of slots."""
    w_o, values = step.w_o.float(), store.values  # [H, G, Dv, C]
    B, H, S, _ = values.shape
    out = torch.empty(B, H, S, device=values.device)
    for s0, s1 in query_blocks(S, B * H * w_o.shape[-1], layer_block(values)):
        block = values[:, :, s0:s1].float()
        norms = [(block @ w_o[:, g]).abs_().sum(-1) for g in range(w_o.shape[1])]
        out[:, :, s0:s1] = torch.stack(norms).mean(0)
    return out
