"""Random sketches, and leverage scores of sketched rows."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsieve.keys import unrotated_keys
from kvsieve.scoring import standardise
from kvsieve.step import Step
from kvsieve.store import Store


def gaussian(rows: int, columns: int, *, seed: int, heads: int = 0) -> Tensor:
    """Draw a sketch ``[rows, columns]``, or ``[heads, rows, columns]``, of variance 1 / columns.

    On the CPU, from a generator of its own: the same on every device and in every run.
    """
    made = torch.Generator().manual_seed(seed)
    shape = (heads, rows, columns) if heads else (rows, columns)
    return torch.randn(shape, generator=made) / columns**0.5


def leverage(x: Tensor, inside: Tensor, sketch: Tensor, ridge: float = 0.01) -> Tensor:
    """Return ridge leverage scores of the rows of ``x [B, H, S, D]``, ``[B, H, S]`` in fp32.

    ``X``: rows ``inside [B, 1 or H, S]``, centred, times ``sketch [H, D, R]``;
    ``score_i = x_i (X^T X + ridge I)^-1 x_i^T``, in [0, 1]. Time O(S R (D + R)).
    """
    outside = ~inside[..., None]
    x = x.float().masked_fill(outside, 0.0)
    count = inside.sum(-1).clamp_min(1)[..., None, None]
    centred = (x - x.sum(2, keepdim=True) / count) @ sketch
    # In fp64: rounding of a large Gram matrix is larger than the ridge that keeps it invertible.
    rows = centred.masked_fill(outside, 0.0).double()
    gram = rows.transpose(-1, -2) @ rows
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor = torch.linalg.cholesky_ex(gram).L
    solved = torch.linalg.solve_triangular(factor, rows.transpose(-1, -2), upper=False)
    return solved.square().sum(2).float()


def key_leverage(step: Step, store: Store, inside: Tensor, width: int, seed: int) -> Tensor:
    """Return the standardised leverage of cached keys before rotation, ``[B, H, S]`` in fp32.

    Over the slots ``inside [B, 1 or H, S]``; the sketch of ``width`` columns is
    drawn from ``seed``, layer and head.
    """
    keys = unrotated_keys(step, store)
    _, H, _, D = keys.shape
    layer_seed = seed * 1_000_003 + step.layer.ordinal
    drawn = gaussian(D, width, seed=layer_seed, heads=H).to(keys.device)
    return standardise(leverage(keys, inside, drawn), inside, dim=(1, 2), correction=1)


_MIX = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)


def uniform(position: Tensor, layer: int, heads: int, seed: int, first: int = 0) -> Tensor:
    """Return numbers in [0, 1) drawn for (seed, layer, head, position), ``[B, H, S]`` in fp32.

    ``position [B, 1 or H, S]``; heads are numbered from ``first``. From an integer hash: alone, in
    a batch and in parts they are the same.
    """
    head = torch.arange(first, first + heads, device=position.device)[:, None] + 1
    x = position.long() * _MIX[0] + head * _MIX[1] + (layer + 1) * _MIX[2] + seed
    for factor in (0x7FEB352D, 0x846CA68B):
        x = x & 0xFFFFFFFF
        x = (x ^ (x >> 16)) * factor
    x = x & 0xFFFFFFFF
    # 24 bits: what fp32 holds exactly, so that 1 is never reached.
    return ((x ^ (x >> 16)) >> 8).float() / 2**24
