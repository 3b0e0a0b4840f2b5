"""SurfaceLogicKV: heads that copy and heads that gather evidence keep more ("SurfaceLogicKV:
Surface and Logic Attention Behaviors are All You Need for Robust KV Cache Compression", arXiv
2508.15806).

    I_h = surface S_h / sum S + (1 - surface) L_h / sum L
    layers:  B_l = H b_min + P ((1 - mu) / layers + mu I_l),   P = layers H (b - b_min)
    heads:   b_h = b_min + (B_l - H b_min) ((1 - nu) / H + nu I_h / I_l)
    tokens:  the window, and the best of the window's attention, max-pooled, as in snapkv

S: attention with which a head copies tokens into the answer (surface memorisation); L: attention
with which it reads evidence that isn't copied (logic construction); I_l: sum of I over a layer;
b_min: max(protected, b / ``least``). ``heads``: a file of S and L that was measured on probes with
``kvsieve.engines.transformers.heads.measure_heads``, or "prompt": both are taken from the prompt
itself, S as a head's highest score and L as the sum of the next eight. ``aware``: heads with S > L
choose single tokens, without pooling (needs a file).

Costs as snapkv; all layers stay whole until the last one is scored. Measuring takes one forward a
probe, once per model.

Differs from the paper: in the style of the paper. Only its abstract was at hand: the two
behaviours, layer- and head-wise integration, two stages. How S and L are measured, both formulas,
the choice of tokens and all constants are ours, after published head-wise budgets; "prompt" is
ours altogether.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.behaviours import Behaviours
from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill
from kvsieve.scorers import WindowAttention
from kvsieve.scoring import window_mean
from kvsieve.shares import Shares, Table
from kvsieve.step import Step
from kvsieve.store import Store


@dataclass(frozen=True, kw_only=True)
class BehaviourAttention(WindowAttention):
    """Window attention, ``[B, H, S]``; not pooled in heads that copy more than they gather."""

    surface: Table
    logic: Table

    def score(self, step: Step, store: Store) -> Tensor:
        n = step.layer.ordinal
        pairs = zip(self.surface[n], self.logic[n], strict=True)
        copies = torch.tensor([s > g for s, g in pairs], device=store.device)[:, None]
        single = window_mean(step, store, self.queries).mean(2)
        return torch.where(copies, single, super().score(step, store))


@method(
    name="surface-logic-kv",
    paper="SurfaceLogicKV",
    year=2025,
    arxiv="2508.15806",
    certainty="in the style of",
)
def surface_logic_kv(
    *,
    heads: str = "prompt",
    window: int = 32,
    kernel: int = 7,
    surface: float = 0.5,
    mu: float = 0.5,
    nu: float = 0.9,
    least: float = 4.0,
    aware: bool = False,
) -> Recipe:
    """``heads``: "prompt", or a file of head scores; ``surface``: weight of S, the rest is L's;
    ``mu``, ``nu``: how far layers and heads follow I; ``least``: b / b_min; ``aware``: pool by it.
    """
    found = None if heads == "prompt" else Behaviours.load(heads)
    shares = Shares(
        surface=None if found is None else found.surface,
        logic=None if found is None else found.logic,
        weight=surface,
        mu=mu,
        nu=nu,
        least=least,
    )
    scorer = WindowAttention(queries=window, kernel=kernel, pooling="max")
    if aware and found is None:
        raise RecipeError("surface-logic-kv: aware=True needs measured heads (heads=FILE).")
    if aware and found is not None:
        scorer = BehaviourAttention(
            queries=window,
            kernel=kernel,
            pooling="max",
            surface=found.surface,
            logic=found.logic,
        )
    return Recipe(
        method="surface-logic-kv",
        scorer=scorer,
        allocator=shares,
        schedule=AfterPrefill(),
        layout="ragged",
        recent=window,
    )
