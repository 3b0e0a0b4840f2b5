"""The figures of fidelity: divergence, agreement, layer errors, and intervals over texts."""

from __future__ import annotations

import torch
from torch import Tensor

RESAMPLES = 2000


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """Return KL(full || other) = sum_v p_v (ln p_v - ln q_v) in nats, fp64, of logits ``[..., V]``.

    ``p`` and ``q`` are the softmax of ``full`` and ``other``; a token with p_v = 0 adds nothing.
    """
    p = full.double().log_softmax(-1)
    q = other.double().log_softmax(-1)
    terms = p.exp() * (p - q)
    # It is never negative, but for rounding.
    return torch.where(p.isneginf(), 0.0, terms).sum(-1).clamp_min(0)


def agreement(full: Tensor, other: Tensor) -> Tensor:
    """Return whether the likeliest token is the same, for logits ``[..., V]``, as fp64 0 or 1."""
    return (full.argmax(-1) == other.argmax(-1)).double()


def loss(logits: Tensor, token: Tensor) -> Tensor:
    """Return -ln p of ``token [...]`` under logits ``[..., V]`` in nats, fp64."""
    return -logits.double().log_softmax(-1).gather(-1, token[..., None]).squeeze(-1)


def relative_error(full: Tensor, other: Tensor) -> Tensor:
    """Return ``|other - full| / |full|`` (Euclidean) over the last dimension, fp64; 0 for 0 / 0."""
    apart = (other.double() - full.double()).norm(dim=-1)
    return (apart / full.double().norm(dim=-1)).nan_to_num(nan=0.0, posinf=torch.inf)


def mean_where(x: Tensor, where: Tensor, dim: int) -> Tensor:
    """Return the mean of ``x`` over ``dim``, of the places that ``where`` (same shape) marks."""
    return (x * where).sum(dim) / where.sum(dim)


def with_interval(per_text: Tensor) -> dict[str, float | None]:
    """Return the mean of ``per_text [N]`` and its 95 % percentile-bootstrap interval.

    Texts are drawn again, not tokens: those of one text depend on each other. One text has no
    interval.
    """
    mean = per_text.mean().item()
    if len(per_text) < 2:
        return {"mean": mean, "low": None, "high": None}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(per_text), (RESAMPLES, len(per_text)), generator=generator)
    means = per_text[drawn].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    # Rounding must not put the mean of equal texts outside its own interval.
    return {"mean": mean, "low": min(low, mean), "high": max(high, mean)}
