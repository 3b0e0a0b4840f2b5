"""What a layer's output loses without a slot, as pieces of scores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvsieve.packing import live_slots
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.attend import layer_block, query_blocks


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


def value_blocks(store: Store) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ``(s0, s1, values [B, H, s1 - s0, Dv])`` in fp32; slots that don't exist are zero."""
    values, live = store.values, live_slots(store)
    B, H, S, D = values.shape
    for s0, s1 in query_blocks(S, B * H * D, layer_block(values)):
        # Memory of slots that don't exist may hold anything, and 0 times NaN is NaN.
        missing = ~live[:, :, s0:s1, None]
        yield s0, s1, values[:, :, s0:s1].float().masked_fill(missing, 0.0)
