"""Pieces of scores that look at keys alone: un-rotated keys, and how far they stand apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.attend import layer_block, query_blocks
from kvsieve.store.rope import unrotate


def distinctness(keys: Tensor, store: Store, normalise: bool = True) -> Tensor:
    """Return ``-cos(k_i, m)``, ``[B, H, S]`` in fp32, of fp32 ``keys [B, H, S, D]`` of a store.

    m: mean of the head's live keys, each of length 1 (``normalise``) or as long as it is.
    """
    unit = F.normalize(keys, dim=-1)
    counted = unit if normalise else keys
    if store.live is not None:
        counted = counted.masked_fill(~store.live[..., None], 0.0)
        unit = unit.masked_fill(~store.live[..., None], 0.0)
    count = store.counts.to(keys.device)[..., None, None]
    anchor = counted.sum(2, keepdim=True) / count  # [B, H, 1, D]
    return -F.cosine_similarity(unit, anchor, dim=-1)


def unrotated_keys(step: Step, store: Store) -> Tensor:
    """Return the cached keys before rotation, ``[B, H, S, D]`` in fp32, in blocks of slots.

    Each slot is turned back from where it stands, so that this holds after any eviction.
    """
    keys, position = store.keys, store.standing
    B, H, S, D = keys.shape
    out = torch.empty(keys.shape, dtype=torch.float32, device=keys.device)
    for s0, s1 in query_blocks(S, B * H * D, layer_block(keys)):
        cos, sin = step.rotation(position[:, :, s0:s1])
        out[:, :, s0:s1] = unrotate(keys[:, :, s0:s1].float(), cos, sin)
    return out
