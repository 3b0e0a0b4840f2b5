"""Fair eviction: each part of a prompt loses the same share ("The Pitfalls of KV Cache
Compression", arXiv 2510.00231).

For spans j of token indices, and all tokens outside them as one more span, a head that may keep n
slots keeps ``n_j`` of span j with ``n_j`` proportional to the span's number of tokens, rounded by
largest remainder; inside a span the score decides. What a span can't fill goes to the best of the
others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvsieve.allocators import top_mask

Span = tuple[int, int]


def fair_scores(
    scores: Tensor, position: Tensor, seen: Tensor, counts: Tensor, spans: Sequence[Span]
) -> Tensor:
    """Return scores ``[B, H, S]`` whose best ``counts [B, H]`` are a fair choice.

    ``scores [B, H, S]``: +inf protects, -inf is no slot; both stay. ``position [B, 1 or H, S]``:
    token indices; ``seen [B]``: tokens so far. Protected slots count in their span's share.
    """
    quotas = fair_quotas(span_tokens(seen, spans), counts).to(scores.device)
    member = _members(position, spans).expand(-1, scores.shape[1], -1)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for span in range(len(spans) + 1):
        inside = scores.masked_fill(member != span, -torch.inf)
        chosen |= top_mask(inside, quotas[..., span]) & (member == span)
    # Ranks instead of scores: whatever the scores are, what is chosen comes before what is not.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    slots = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float32)
    rank = torch.empty_like(scores).scatter(-1, order, -slots.expand_as(scores))
    fair = rank + chosen * float(scores.shape[-1])
    return torch.where(scores.isinf(), scores, fair)


def span_tokens(seen: Tensor, spans: Sequence[Span]) -> Tensor:
    """Return how many of each row's ``seen [B]`` tokens lie in each span, and outside of all.

    ``[B, J + 1]`` int64 on the CPU.
    """
    inside = [seen.clamp_max(end) - seen.clamp_max(start) for start, end in spans]
    return torch.stack([*inside, seen - sum(inside)], dim=-1).cpu()


def fair_quotas(tokens: Tensor, counts: Tensor) -> Tensor:
    """Share out ``counts [B, H]`` by ``tokens [B, J]``: ``[B, H, J]``, by largest remainder.

    Ties go to the earlier span; the sums are exact.
    """
    total = tokens.sum(-1).clamp_min(1)[:, None, None]
    product = counts.cpu()[..., None] * tokens[:, None]
    quotas, remainder = product // total, product % total
    missing = counts.cpu() - quotas.sum(-1)
    order = remainder.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(order.shape[-1]).expand_as(order)
    extra = torch.zeros_like(quotas).scatter(-1, order, (place < missing[..., None]).long())
    return quotas + extra


def _members(position: Tensor, spans: Sequence[Span]) -> Tensor:
    """Return in which span each slot's token lies, the last number for none of them."""
    member = torch.full_like(position, len(spans), dtype=torch.int64)
    for number, (start, end) in enumerate(spans):
        member = member.masked_fill((position >= start) & (position < end), number)
    return member
