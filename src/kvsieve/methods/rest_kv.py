"""ReST-KV: a token is worth what the layer's output changes without it ("ReST-KV", output
reconstruction with spatial and temporal smoothing, arXiv 2605.08840).

    I(a)_i = a_i / (1 - a_i) * || o W_O - v_i W_O ||_2 ** power,   o = sum_j a_j v_j
    form "code":   I_i = I(E)_i,   E = smoothed A, slots before the window only
    form "paper":  I_i = smoothed I(A_t)_i, A_t over all slots
    smoothed over the last W queries, oldest first:  E <- alpha x_t + (1 - alpha) E,  E = x at first
    Delta = mean place of the b - W best slots of the first half of these queries - of the second
    k = max(kernel, 2 floor(|Delta| / beta) + 1),   s = trunc(Delta / beta)
    score_i = mean over the group of  mean of I over the slots i + s - k // 2 .. i + s + k // 2

A: softmax attention; v: value; W window (stays); b: mean budget; beyond the ends of the part before
the window its first and last slot are repeated. For one query head ``I(A_t)_i`` is exactly how far
the output moves if token i is dropped. Importance that moves to earlier slots (Delta > 0) is read
from later ones: the motion goes on. ``pyramid``: the layer budgets of PyramidKV.

Cost per event and query head: O(W S (D + log S) + S D^2) time ("paper": W S D more), in blocks of
queries and of slots: beside the layer no more memory than a block and a few numbers a slot.

Differs from the paper: the group rule and fp32 throughout are ours (the released code stores one
cache per query head). "code" is the form behind the reported results. The paper writes Delta with
the other sign; the shift's direction here is the code's, in both forms. The code takes the drift
from the first row of a batch, and shifts by one less where Delta is a negative multiple of beta;
here each row has its own and s is rounded towards zero. In turns after the first, places count the
slots that are left. With ``pyramid``, b is still the mean budget. Ties go to the earlier slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvsieve.allocators import Pyramid, Uniform
from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import ScorerDefaults, Signal
from kvsieve.packing import live_slots
from kvsieve.reconstruction import output_distance
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill
from kvsieve.scoring import before_window
from kvsieve.smoothing import (
    average_weights,
    drift_of_halves,
    moving_mean,
    ordered_window,
    places_of_best,
)
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.attend import layer_block, query_blocks


@dataclass(frozen=True, kw_only=True)
class Reconstruction(ScorerDefaults):
    """Change of the output without the token, smoothed over queries and slots, ``[B, H, S]``."""

    queries: int
    alpha: float
    beta: float
    kernel: int
    form: Literal["code", "paper"]
    gqa: Literal["mean", "max"]
    projected: bool
    power: float

    def __post_init__(self) -> None:
        if self.queries < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise RecipeError("rest-kv: window must be 1 or more, kernel odd and positive.")
        if not 0 < self.alpha <= 1 or self.beta <= 0 or self.power < 0:
            raise RecipeError("rest-kv: alpha must be in (0, 1], beta > 0 and power >= 0.")
        if self.form not in ("code", "paper") or self.gqa not in ("mean", "max"):
            raise RecipeError(
                f"rest-kv: form={self.form!r}, gqa={self.gqa!r}; possible: form code or paper, "
                "gqa mean or max."
            )

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.VALUES} | ({Signal.W_O} if self.projected else set()))

    @property
    def window(self) -> int:
        return self.queries

    def score(self, step: Step, store: Store) -> Tensor:
        queries, positions, valid = ordered_window(step, self.queries)
        share = average_weights(valid, self.alpha)  # [B, W]
        B, H, G, W, _ = queries.shape
        smoothed, places = torch.zeros(B, H, G, store.slots, device=queries.device), []
        for w0, w1 in query_blocks(W, B * H * G * store.slots, layer_block(store.keys)):
            block = step.weights(
                store, queries[:, :, :, w0:w1], positions[:, w0:w1], valid[:, w0:w1]
            )  # [B, H, G, w, S]
            places.append(places_of_best(block, live_slots(store), self._best(step, store)))
            each = block if self.form == "code" else self._lost(step, store, block)
            smoothed += torch.einsum("bw,bhgws->bhgs", share[:, w0:w1], each)
        inside = before_window(store, self.queries)
        if self.form == "code":
            past = smoothed.masked_fill(~inside[:, :, None], 0.0)
            smoothed = self._lost(step, store, past[:, :, :, None])[:, :, :, 0]
        drift = drift_of_halves(torch.cat(places, -1), valid) / self.beta  # [B, H, G]
        reach, shift = drift.abs().long().clamp_min(self.kernel // 2), drift.long()
        heads = [
            moving_mean(smoothed[:, :, g], inside, reach[:, :, g], shift[:, :, g]) for g in range(G)
        ]
        together = torch.stack(heads, 2)
        return together.amax(2) if self.gqa == "max" else together.mean(2)

    def _lost(self, step: Step, store: Store, weights: Tensor) -> Tensor:
        """Return I of ``weights [B, H, G, w, S]``, in their shape."""
        distance = output_distance(step, store, weights, self.projected)
        return weights / (1 - weights).clamp_min(1e-6) * distance.pow_(self.power)

    def _best(self, step: Step, store: Store) -> Tensor:
        """Return how many slots of a query count for the drift, ``[B, H]``."""
        assert step.budgets is not None, "a layer is scored under a budget"
        return torch.minimum(step.budgets[:, None] - self.queries, store.counts).clamp_min(1)


@method(
    name="rest-kv",
    paper="ReST-KV",
    year=2026,
    arxiv="2605.08840",
    certainty="code",
    oracle="an-yongqi/rest-kv",
)
def rest_kv(
    *,
    window: int = 32,
    alpha: float = 0.3,
    beta: float = 2000.0,
    kernel: int = 5,
    form: Literal["code", "paper"] = "code",
    gqa: Literal["mean", "max"] = "mean",
    projected: bool = True,
    power: float = 1.0,
    pyramid: bool = False,
) -> Recipe:
    """``alpha``: weight of the newest query; ``beta``: drift per slot of shift; ``kernel``: least
    smoothing over slots (21 for long prompts); ``projected``: through W_O."""
    scorer = Reconstruction(
        queries=window,
        alpha=alpha,
        beta=beta,
        kernel=kernel,
        form=form,
        gqa=gqa,
        projected=projected,
        power=power,
    )
    allocator = Pyramid() if pyramid else Uniform()
    schedule = AfterPrefill()
    return Recipe(
        method="rest-kv", scorer=scorer, allocator=allocator, schedule=schedule, recent=window
    )
