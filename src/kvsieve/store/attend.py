"""Attention over stored slots: grouped queries are folded, keys and values are never repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Upper bound on the elements of one block of scores or masks: long prompts are done in blocks of
# queries, so that nothing of size T x S is ever held.
BLOCK_ELEMENTS = 1 << 24

# From this many slots on, over all rows, fp32 decode attention on a CPU is done by matrix products.
LONG = 2048

Answer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""What is known of slots that are no more: queries ``[B, H, G, t, D]`` -> N further logits for each
of them ``[B, H, G, t, N]``, and values ``[B, H, G, t, N, Dv]``."""

Visible = Callable[[int, int], Tensor]
"""``visible(t0, t1)``: which slots queries t0..t1 may see, bool ``[B, 1 or H, t1 - t0, S]``."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    visible: Visible | None = None,
    causal: bool = False,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    answer: Answer | None = None,
) -> Tensor:
    """Return the attention output ``[B, H, G, T, Dv]`` of ``query [B, H, G, T, D]``.

    Args:
        query, keys, values: ``[B, H, G, T, D]``, ``[B, H, S, D]``, ``[B, H, S, Dv]``, one dtype.
        scale: factor on the dot products.
        visible: mask by blocks of queries; None when every slot is visible to every query.
        causal: query t sees slots 0..t; needs S == T and no ``visible``.
        sinks: one extra logit per query head ``[H, G]`` that takes mass and gives no value.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        answer: further logits and values, which depend on the query.
    """
    if sinks is not None or softcap is not None or answer is not None:
        return _attend_plain(query, keys, values, scale, visible, causal, sinks, softcap, answer)
    B, H, G, T, _ = query.shape
    if T == 1:
        mask = None if visible is None else visible(0, 1)
        return attend_one(query[:, :, :, 0], keys, values, scale, mask).unsqueeze(3)
    out = query.new_empty(B, H, G, T, values.shape[-1])
    for t0, t1 in [(0, T)] if visible is None else query_blocks(T, B * H * keys.shape[2]):
        mask = None if visible is None else visible(t0, t1)
        for g in range(G):
            out[:, :, g, t0:t1] = F.scaled_dot_product_attention(
                query[:, :, g, t0:t1],
                keys,
                values,
                attn_mask=mask,
                is_causal=causal and mask is None,
                scale=scale,
            )
    return out


def attend_one(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Attention of one query per head, ``[B, H, G, D]`` -> ``[B, H, G, Dv]``.

    The group takes the place of the query axis, so that each key is read once. Long fp32 tables
    on a CPU are read by two matrix products, which use the memory's bandwidth better.
    """
    long = keys.shape[0] * keys.shape[2] >= LONG
    if long and query.device.type == "cpu" and query.dtype is torch.float32:
        # Keys on the left read fastest; the copy is small and makes the softmax as fast.
        logits = (keys @ (query * scale).transpose(-1, -2)).transpose(-1, -2).contiguous()
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        return logits.softmax(-1) @ values
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)


def _attend_plain(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    visible: Visible | None,
    causal: bool,
    sinks: Tensor | None,
    softcap: float | None,
    answer: Answer | None,
) -> Tensor:
    """The same written out, softmax in fp32: for sinks, soft-capped logits and answers."""
    B, H, G, T, _ = query.shape
    S = keys.shape[2]
    out = query.new_empty(B, H, G, T, values.shape[-1])
    for t0, t1 in query_blocks(T, B * H * G * S):
        logits = torch.einsum("bhgtd,bhsd->bhgts", query[:, :, :, t0:t1], keys).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if visible is not None:
            logits = logits.masked_fill(~visible(t0, t1)[:, :, None], -torch.inf)
        elif causal:
            t = torch.arange(t0, t1, device=query.device)
            future = torch.arange(S, device=query.device) > t[:, None]
            logits = logits.masked_fill(future, -torch.inf)
        if sinks is not None:
            extra = sinks.float().view(1, H, G, 1, 1).expand(B, H, G, t1 - t0, 1)
            logits = torch.cat([logits, extra], -1)
        if answer is None:
            weights = logits.softmax(-1)[..., :S].to(values.dtype)
            out[:, :, :, t0:t1] = torch.einsum("bhgts,bhsd->bhgtd", weights, values)
            continue
        more, theirs = answer(query[:, :, :, t0:t1])  # [B, H, G, t, N], [B, H, G, t, N, Dv]
        weights = torch.cat([logits, more], -1).softmax(-1)
        held = weights[..., :S].to(values.dtype)
        added = (weights[..., -more.shape[-1] :, None] * theirs).sum(-2)
        out[:, :, :, t0:t1] = torch.einsum("bhgts,bhsd->bhgtd", held, values) + added
    return out


def query_blocks(
    T: int, elements_per_query: int, limit: int | None = None
) -> Iterator[tuple[int, int]]:
    """Cut T queries into blocks whose scores stay within ``limit`` (``BLOCK_ELEMENTS``)."""
    size = max(1, (BLOCK_ELEMENTS if limit is None else limit) // max(1, elements_per_query))
    for start in range(0, T, size):
        yield start, min(T, start + size)


def layer_block(table: Tensor) -> int:
    """Limit a block to a quarter of ``table``'s elements, so that it is small beside a layer."""
    return min(BLOCK_ELEMENTS, max(1 << 20, table.numel() // 4))
