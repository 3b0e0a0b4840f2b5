"""HashEvict: the cached token that points farthest away from the new one makes room for it, before
anything is attended to ("HashEvict: A Pre-Attention KV Cache Eviction Strategy using
Locality-Sensitive Hashing", arXiv 2412.16187; earlier "LSH Tells You What To Discard").

    h(x) = [x R >= 0] in {0, 1}^L,   R ~ N(0, 1), D x L, fixed per layer
    D_i = sum over the group's queries of the number of bits in which h(k_i) and h(q_t) differ
    score_i = max_j D_j - D_i          the lowest goes, ties: the oldest

q_t: the new token's queries (``source="query"``, the paper) or its key (``source="key"``, the
code). Codes of keys, as cached, are a column. Sinks and the ``recent`` last tokens are protected.
The number of bits that differ estimates the angle; the norm of a key has no part in it.

A decode step costs L D per head to hash its token and S codes to compare, beside the copy of the
table that any eviction makes: no attention, and the step itself reads no more than the budget. A
prompt is cut to its first and most recent tokens, as in the code. To feed a prompt's rest with
eviction, give it token by token (and no ``prompt_length``).

Differs from the paper: D sums over grouped queries (the paper has none). Among equal scores, which
are frequent, the oldest goes (the code: the first slot). Slots stay in the order of their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError, UnsupportedSignal
from kvsieve.hashing import code_dtype, hamming, packed, sign_bits
from kvsieve.interfaces import Column, ScorerDefaults
from kvsieve.packing import live_slots
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, BeforeAttend
from kvsieve.sketch import gaussian
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.attend import layer_block, query_blocks

Source = Literal["query", "key"]


@dataclass(frozen=True, kw_only=True)
class HashDistance(ScorerDefaults):
    """How much nearer than the farthest slot each is, in bits, ``[B, H, S]``; column ``code``."""

    bits: int = 16
    source: Source = "query"
    seed: int = 0

    def __post_init__(self) -> None:
        code_dtype(self.bits)
        if self.source not in ("query", "key"):
            raise RecipeError(f"hash-evict: source={self.source!r}; possible: query, key.")

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(name="code", dtype=code_dtype(self.bits), of_key=True),)

    def projection(self, step: Step, like: Tensor) -> Tensor:
        """Return R ``[D, L]`` of the layer, for vectors ``like [..., D]``."""

        def draw() -> Tensor:
            layer_seed = self.seed * 1_000_003 + step.layer.ordinal
            return gaussian(like.shape[-1], self.bits, seed=layer_seed).to(like.device)

        return step.layer.once(f"hash {self.bits} {self.seed} {like.device}", draw)

    def observe(self, step: Step, store: Store) -> None:
        """Hash what is new: of a decode step one key per head, after a prompt part all keys."""
        if step.keys is not None and self.source == "query":
            raise UnsupportedSignal(
                "hash-evict compares queries with cached keys, but this model caches latents. "
                "Use source='key'."
            )
        if step.positions.shape[1] == 1:
            slot, key = newest(store)
            code = packed(sign_bits(key, self.projection(step, key)))  # [B, H, 1]
            codes = store["code"].expand(*store.counts.shape, -1)
            store["code"] = codes.scatter(-1, slot, code)
            return
        keys = store.keys
        B, H, S, D = keys.shape
        codes = keys.new_empty(B, H, S, dtype=code_dtype(self.bits))
        for s0, s1 in query_blocks(S, B * H * D, layer_block(keys)):
            block = keys[:, :, s0:s1]
            codes[:, :, s0:s1] = packed(sign_bits(block, self.projection(step, block)))
        store["code"] = codes

    def score(self, step: Step, store: Store) -> Tensor:
        position = store["position"].expand(*store.counts.shape, -1)
        if step.prefill:
            return position.float()
        vectors = step.query[..., -1, :] if self.source == "query" else newest(store)[1]
        asked = packed(sign_bits(vectors, self.projection(step, vectors)))  # [B, H, G or 1]
        distance = sum(hamming(store["code"], code[..., None]) for code in asked.unbind(2))
        assert isinstance(distance, Tensor), "a group has one query at least"
        # The new token must see itself, and has no code yet.
        new = position == (store.seen - 1).to(position.device)[:, None, None]
        cached = live_slots(store) & ~new
        nearer = distance.masked_fill(~cached, 0).amax(-1, keepdim=True) - distance
        # Slots are in the order of their tokens: less than a bit in favour of the later one.
        age = torch.arange(store.slots, device=nearer.device) / store.slots
        return (nearer + age).masked_fill(new, torch.inf)


def newest(store: Store) -> tuple[Tensor, Tensor]:
    """Return each head's newest slot, ``[B, H, 1]``, and its key ``[B, H, 1, D]``."""
    last = (store.seen - 1).to(store.device)[:, None, None]
    found = (store["position"] == last) & live_slots(store)
    slot = found.byte().argmax(-1, keepdim=True).expand(*store.counts.shape, 1)
    keys = store.keys
    return slot, keys.gather(2, slot[..., None].expand(-1, -1, 1, keys.shape[-1]))


@method(
    name="hash-evict",
    paper="HashEvict",
    year=2024,
    arxiv="2412.16187",
    certainty="code",
    oracle="minghui-liu/cold-compress",
)
def hash_evict(
    *, bits: int = 16, source: Source = "query", sinks: int = 4, recent: int = 10, seed: int = 0
) -> Recipe:
    """``bits``: L, of a code (1 to 64); ``source``: what the new token is compared by; ``sinks``,
    ``recent``: protected first and last tokens; ``seed`` of the projections.
    """
    return Recipe(
        method="hash-evict",
        scorer=HashDistance(bits=bits, source=source, seed=seed),
        schedule=AfterPrefill() | BeforeAttend(),
        sinks=sinks,
        recent=recent,
    )
