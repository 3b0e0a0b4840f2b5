"""Re-rotating kept keys, so that they stand side by side in front of what comes next.

    slot j of the n that a head keeps, in order, moves to position  m - n + j

m: tokens that have passed. Attention with rotary positions depends on distances alone, so that this
is the same as moving them to 0 .. n - 1 and going on from n (as in FINCH, and in StreamingLLM's
cache), but later tokens keep the positions that the engine gives them. Time O(S D) an event, in
blocks; one int32 column. Each time a key moves it is rounded to its dtype anew.
"""

from __future__ import annotations

import torch

from kvsieve.interfaces import Column
from kvsieve.packing import live_slots
from kvsieve.step import Step
from kvsieve.store import MOVED, Store
from kvsieve.store.attend import layer_block, query_blocks
from kvsieve.store.rope import rotate, unrotate

COLUMN = Column(name=MOVED, dtype=torch.int32)
"""How far a slot's key stands from the position of its token."""


def rerotate(step: Step, store: Store) -> None:
    """Move the keys of every head up to one another; queries and values stay as they are."""
    inside, before = live_slots(store), store.standing
    count, seen = store.counts.to(before.device)[..., None], store.seen.to(before.device)
    after = seen[:, None, None] - count + inside.long().cumsum(-1) - 1
    after = torch.where(inside, after, before)
    keys = store.keys
    B, H, S, D = keys.shape
    before, after = before.expand(B, H, S), after.expand(B, H, S)
    for s0, s1 in query_blocks(S, B * H * D, layer_block(keys)):
        old, new, block = before[:, :, s0:s1], after[:, :, s0:s1], keys[:, :, s0:s1]
        plain = unrotate(block.float(), *step.rotation(old))
        moved = rotate(plain, *step.rotation(new)).to(keys.dtype)
        # What stays where it is must not be rounded again.
        keys[:, :, s0:s1] = torch.where((old == new)[..., None], block, moved)
    store["keys"] = keys
    store[MOVED] = (after - store["position"]).int()
