"""FINCH: what the question attends to stays, and moves together ("FINCH: Prompt-guided Key-Value
Cache Compression for Large Language Models", arXiv 2408.00167).

    score_i = mean over the group, mean over the question's queries t of n_t A[t, i]
    the question's ``window`` tokens stay; of each ``chunk`` of slots the same share stays, the best
    kept keys are re-rotated to stand side by side

A: softmax attention over all slots; n_t: slots before query t, so that late queries, whose
attention is spread over more slots, count alike. A chunk is of slots in their order, the question's
included; 0: all are one. O(W S D) per event in time, in blocks in memory.

The paper's way: give the question's token ids (``question``) and feed the document in parts. After
each part the question is fed behind it, its attention scores what is cached, and what it stored is
dropped again; so no more than the budget and one part is ever held. Then feed the question itself.
Without ``question``, it is what the prompt ends with, ``window`` tokens, and the whole prompt has
been read when its chunks are compressed, as in kvpress.

Differs from the paper: with ``question``, the last tokens of every part, as many as the question
has, stay: the question's own at the end. kvpress finds the question by a delimiter; here its length
is given. Keys move up to what comes next, instead of down to position 0: the same distances. The
paper compresses to a number; here the budget is what the row may hold. ``normalise=False`` leaves
n_t out, ``rerotate=False`` the re-rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Column, ScorerDefaults, Signal
from kvsieve.packing import live_slots, pick, put_back, real_first
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill
from kvsieve.scoring import before_window, rank
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.attend import layer_block, query_blocks


@dataclass(frozen=True, kw_only=True)
class QuestionAttention(ScorerDefaults):
    """Attention of the question's queries, or its rank in a chunk, ``[B, H, S]``.

    ``queries``: the question's length; ``repeat_ids``: its tokens, if it is to be fed anew;
    ``length`` of chunks.
    """

    queries: int = 32
    length: int = 0
    normalise: bool = True
    repeat_ids: tuple[int, ...] = ()
    chunk: int = 0  # of the context, nothing is repeated
    overlap: int = 0

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise RecipeError(f"finch: window={self.queries}; a question has 1 token or more.")
        if self.length < 0:
            raise RecipeError(f"finch: chunk={self.length}; it is 0 (all are one) or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.REPLAY}) if self.repeat_ids else frozenset()

    @property
    def columns(self) -> tuple[Column, ...]:
        return (Column(name="asked"),) if self.repeat_ids else ()

    @property
    def window(self) -> int:
        return 0 if self.repeat_ids else self.queries

    def observe(self, step: Step, store: Store) -> None:
        """Note the attention of a question that was fed anew."""
        if step.replay:
            valid = torch.ones_like(step.positions).bool() if step.live is None else step.live
            new = self._attention(step, store, step.query, step.positions, valid)
            # A row that isn't asked this time keeps what it has.
            store["asked"] = torch.where(valid.any(1)[:, None, None], new, store["asked"])

    def score(self, step: Step, store: Store) -> Tensor:
        if self.repeat_ids:
            attention = store["asked"].expand(*store.counts.shape, -1)
        else:
            attention = self._attention(step, store, *step.window(self.queries))
        return self._ranked(attention, store) if self.length else attention

    def _attention(
        self, step: Step, store: Store, queries: Tensor, positions: Tensor, valid: Tensor
    ) -> Tensor:
        B, H, G, W, _ = queries.shape
        slot, inside = store["position"][:, :, None], live_slots(store)[:, :, None]
        total = torch.zeros(B, H, store.slots, device=queries.device)
        for w0, w1 in query_blocks(W, B * H * G * store.slots, layer_block(store.keys)):
            asked = positions[:, w0:w1]
            weights = step.weights(store, queries[:, :, :, w0:w1], asked, valid[:, w0:w1])
            if self.normalise:
                before = (inside & (slot < asked[:, None, :, None])).sum(-1)  # [B, 1 or H, w]
                weights = weights * before[:, :, None, :, None]
            total += weights.sum(3).mean(2)
        return total / valid.sum(1).clamp_min(1)[:, None, None]

    def _ranked(self, attention: Tensor, store: Store) -> Tensor:
        """Rank scores in their chunks, the question first: the best of n is 1, the last 1 / n."""
        B, H, S = attention.shape
        inside = live_slots(store).expand(B, H, S)
        question = inside & ~before_window(store, self.queries)
        order = real_first(inside, H)
        packed = pick(attention.masked_fill(question, torch.inf), order)
        extra = -S % self.length
        packed, there = F.pad(packed, (0, extra)), F.pad(pick(inside, order), (0, extra))
        chunks = (B, -1, self.length)
        ranked = rank(packed.reshape(chunks), there.reshape(chunks)).view(B, H, -1)
        return put_back(ranked[..., :S], order)


@method(
    name="finch",
    paper="FINCH",
    year=2024,
    arxiv="2408.00167",
    certainty="code",
    oracle="kvpress 0.5.5",
)
def finch(
    *,
    window: int = 32,
    question: Sequence[int] = (),
    chunk: int = 0,
    normalise: bool = True,
) -> Recipe:
    """``window``: tokens of the question at the prompt's end, or ``question``: its token ids, to be
    asked after each part of the prompt; ``chunk``: slots that compete with one another (0: all);
    ``normalise``: queries count by the slots before them.
    """
    ids = tuple(question)
    queries = len(ids) or window
    scorer = QuestionAttention(queries=queries, length=chunk, normalise=normalise, repeat_ids=ids)
    return Recipe(
        method="finch", scorer=scorer, schedule=AfterPrefill(), recent=queries, rerotate=True
    )
