"""Leverage scores: keys that the others can't replace, from a random sketch of them ("Compactor:
Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores", arXiv 2507.08143).

    X = (K - mean over slots of K) Phi,   Phi: Gaussian, D x ``sketch``
    l_i = x_i (X^T X + 0.01 I)^-1 x_i^T;   score = (l - mean of l) / deviation of l

K: cached keys before rotation; x_i: row i of X; mean and deviation over a row's heads and slots.
The geometric half of Compactor, by itself. With R = ``sketch``: O(S R (D + R)) in time and
O(S (D + R)) in memory per event.

Differs from the paper: Cholesky in place of the paper's solver, as in kvpress. Keys are un-rotated
by their positions instead of projected again from hidden states. The sketch is drawn from ``seed``,
layer and head, so that runs repeat. kvpress standardises over the whole batch; here each row is by
itself. The paper has no decode phase; give a schedule for one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import ScorerDefaults, Signal
from kvsieve.packing import live_slots
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill
from kvsieve.sketch import key_leverage
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class KeyLeverage(ScorerDefaults):
    """Standardised leverage of keys before rotation, ``[B, H, S]``."""

    sketch: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sketch < 1:
            raise RecipeError(f"leverage: sketch={self.sketch}; it needs 1 column or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.PRE_ROPE})

    def score(self, step: Step, store: Store) -> Tensor:
        return key_leverage(step, store, live_slots(store), self.sketch, self.seed)


@method(
    name="leverage",
    paper="Compactor's leverage scores",
    year=2025,
    arxiv="2507.08143",
    certainty="code",
    oracle="kvpress 0.5.5",
)
def leverage_scores(*, sketch: int = 48, seed: int = 0) -> Recipe:
    """``sketch``: columns of the random sketch; ``seed``: of its numbers."""
    scorer = KeyLeverage(sketch=sketch, seed=seed)
    return Recipe(method="leverage", scorer=scorer, schedule=AfterPrefill())
