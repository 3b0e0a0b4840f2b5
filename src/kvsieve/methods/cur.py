"""CurDKV: large keys and values, compared with their neighbours; no attention needed ("Value-Guided
KV Compression for LLMs via Approximated CUR Decomposition", arXiv 2509.15038).

    a_i = ||k_i||_2^2 / its sum over the window of i,   b_i = the same of the value
    score_i = a_i b_i / (sum of a b over the head's slots)

Windows of ``local`` slots follow one another from the first slot on; ``local=0`` is one window over
all slots. ``combine`` takes "product", "average", "key" or "value" of the two. With ``sketch`` > 0
keys and values are first multiplied by a Gaussian matrix of that many columns. The first ``sinks``
tokens stay. O(S D) in time, O(S) in memory per event.

Differs from the paper: this is the released proxy for leverage scores, as kvpress has it, not the
decomposition itself. The sketch is drawn once from ``seed``, so that runs repeat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import ScorerDefaults, Signal
from kvsieve.packing import live_slots, pick, put_back, real_first
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.sketch import gaussian
from kvsieve.step import Step
from kvsieve.store import Store

Combine = Literal["product", "average", "key", "value"]
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class SquaredNorms(ScorerDefaults):
    """Squared key and value norms as shares of their windows, combined, ``[B, H, S]``."""

    local: int = 16
    combine: Combine = "product"
    sketch: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.combine not in get_args(Combine):
            possible = ", ".join(get_args(Combine))
            raise RecipeError(f"cur: combine={self.combine!r}; possible: {possible}.")
        if self.local < 0 or self.sketch < 0:
            raise RecipeError("cur: local and sketch are 0 (off) or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.VALUES})

    def score(self, step: Step, store: Store) -> Tensor:
        inside = live_slots(store)
        key = self._share(self._square(store.keys), inside)
        value = self._share(self._square(store.values), inside)
        made = {"product": key * value, "average": (key + value) / 2, "key": key, "value": value}
        both = made[self.combine]
        return both / both.sum(-1, keepdim=True).clamp_min(_TINY)

    def _square(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.sketch:
            x = x @ gaussian(x.shape[-1], self.sketch, seed=self.seed).to(x.device)
        return x.square().sum(-1)

    def _share(self, x: Tensor, inside: Tensor) -> Tensor:
        """Divide ``x [B, H, S]`` by the sums of its windows of real slots; zero elsewhere."""
        x = x.masked_fill(~inside, 0.0)
        if not self.local:
            return x
        order = real_first(inside, x.shape[1])
        S = x.shape[-1]
        windows = F.pad(pick(x, order), (0, -S % self.local)).unflatten(2, (-1, self.local))
        share = windows / windows.sum(-1, keepdim=True).clamp_min(_TINY)
        return put_back(share.flatten(2)[..., :S].contiguous(), order)


@method(
    name="cur",
    paper="CurDKV",
    year=2025,
    arxiv="2509.15038",
    certainty="code",
    oracle="kvpress 0.5.5",
)
def cur(
    *,
    sinks: int = 4,
    local: int = 16,
    combine: Combine = "product",
    sketch: int = 0,
    seed: int = 0,
    interval: int = 128,
) -> Recipe:
    """``local``: slots of a window; ``combine``: of key and value; ``sketch``: columns (20)."""
    scorer = SquaredNorms(local=local, combine=combine, sketch=sketch, seed=seed)
    schedule = AfterPrefill() | Every(interval)
    return Recipe(method="cur", scorer=scorer, schedule=schedule, sinks=sinks)
