"""What a layer's output loses without a slot, as pieces of scores: how far values stand apart from
the output, and how much of them a summary of dropped slots can't give back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvsieve.packing import live_slots
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.attend import layer_block, query_blocks
from kvsieve.store.summary import Summary


def output_distance(step: Step, store: Store, weights: Tensor, projected: bool) -> Tensor:
    """Return ``|| o - v_i ||_2`` with ``o = sum_j a_j v_j``, in fp32, in the shape of the weights.

    ``weights [B, H, G, w, S]`` in fp32 are the attention of w queries (0 for slots that don't
    exist). ``projected``: ``|| o W_O - v_i W_O ||_2``. In blocks of slots, so that neither fp32
    values nor projected ones are ever held for the whole layer.
    """
    output = mean_value(store, weights)  # [B, H, G, w, Dv]
    root = step.layer.root() if projected else None
    distance = torch.empty_like(weights)
    for s0, s1, block in value_blocks(store):
        for g in range(weights.shape[2]):
            there, here = output[:, :, g], block
            if root is not None:
                there, here = there @ root[:, g], here @ root[:, g]
            for w in range(weights.shape[3]):
                distance[:, :, g, w, s0:s1] = (there[:, :, w, None] - here).norm(dim=-1)
    return distance


def mean_value(store: Store, weights: Tensor) -> Tensor:
    """Return ``sum_i weights_i v_i``, ``[B, H, G, w, Dv]`` in fp32, of ``[B, H, G, w, S]``."""
    folded = weights.flatten(2, 3)  # [B, H, G w, S]: each value is read once
    output = folded.new_zeros(*folded.shape[:3], store.values.shape[-1])
    for s0, s1, block in value_blocks(store):
        output += folded[..., s0:s1] @ block
    return output.view(*weights.shape[:4], -1)


Residual = Literal["subspace", "centre", "cosine"]


def unexplained(store: Store, kind: Residual, rank: int) -> Tensor:
    """Return what the store's summary leaves of each value, ``[B, H, S]`` in fp32.

    With mu and C of the part of the summary to which a slot would go, and u_1 .. u_r the first
    ``rank`` left singular vectors of C (those of singular values above 1e-5 of the largest):
    "subspace": ``|| v - U U^T v ||`` with U spanning mu, u_1 .. u_r; "centre": the same of
    ``v - mu``, with U spanning u_1 .. u_r; "cosine": ``1 - |cos(v, mu)|``. While nothing was
    dropped: ``|| v ||`` (cosine: 1).
    """
    out = torch.empty(store.values.shape[:3], device=store.device)
    summary = store.summary
    if summary is None:
        for s0, s1, block in value_blocks(store):
            out[:, :, s0:s1] = 1.0 if kind == "cosine" else block.norm(dim=-1)
        return out
    part = summary.part_of(store["position"])
    spans = [_span(summary, n, rank) for n in range(summary.how.parts)]
    for s0, s1, block in value_blocks(store):
        for n, (mean, basis) in enumerate(spans):
            left = _left(block, mean[:, :, None], basis, kind)
            here = part[:, :, s0:s1] == n
            out[:, :, s0:s1] = torch.where(here, left, out[:, :, s0:s1])
    return out


def _span(summary: Summary, n: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return mu ``[B, H, Dv]`` and u_1 .. u_r ``[B, H, Dv, r]`` (zero where left out) of a part."""
    left, values, _ = torch.linalg.svd(summary.covariance()[:, :, n], full_matrices=False)
    left, values = left[..., :rank], values[..., :rank]
    # Below that, directions are rounding: those of few slots would differ from run to run.
    kept = values > 1e-5 * values[..., :1]
    return summary.value[:, :, n], left * kept[..., None, :]


def _left(values: Tensor, mean: Tensor, basis: Tensor, kind: Residual) -> Tensor:
    if kind == "cosine":
        return 1 - F.cosine_similarity(values, mean, dim=-1).abs()
    if kind == "centre":
        return _outside(values - mean, basis).norm(dim=-1)
    # One more direction completes the span: what the others leave of the mean.
    more = F.normalize(_outside(mean, basis), dim=-1)
    apart = _outside(values, basis)
    return (apart - (apart * more).sum(-1, keepdim=True) * more).norm(dim=-1)


def _outside(x: Tensor, basis: Tensor) -> Tensor:
    """Return ``x - U U^T x`` of ``x [B, H, s, Dv]``, for orthonormal ``U [B, H, Dv, r]``."""
    return x - (x @ basis) @ basis.transpose(-1, -2)


def value_blocks(store: Store) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(s0, s1, values [B, H, s1 - s0, Dv])`` in fp32; slots that don't exist are zero."""
    values, live = store.values, live_slots(store)
    B, H, S, D = values.shape
    for s0, s1 in query_blocks(S, B * H * D, layer_block(values)):
        # Memory of slots that don't exist may hold anything, and 0 times NaN is NaN.
        missing = ~live[:, :, s0:s1, None]
        yield s0, s1, values[:, :, s0:s1].float().masked_fill(missing, 0.0)
