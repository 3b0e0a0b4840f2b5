"""Expected Attention: the weight a key will get from future queries, in closed form ("Expected
Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution", arXiv
2510.00636).

    q ~ N(mu, Sigma): moments of the queries before rotation
    R: mean rotation over the next F positions;  mu <- R mu,  Sigma <- R Sigma R^T
    l_i = mu . k_i / sqrt d + k_i^T Sigma k_i / (2 d)        (= log E[exp(q . k_i / sqrt d)])
    score_i = (mean over the group of softmax_i(l) + epsilon) * ||v_i||_2

The first ``sinks`` tokens stay and their queries are left out of the moments. Heads share the
layer's budget as in AdaKV (floor 0.2, epsilon 0.01): the configuration that the paper evaluates;
``adaptive=False`` gives every head the same number.

Differs from the paper: queries are un-rotated by their true positions instead of projected again
from hidden states; while decoding, the future starts at the true position (the released code
starts at the length of its buffer of 256 hidden states). ``||v W_O||`` would be the principled
factor; the paper's code uses ``||v||``, and so does this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.allocators import TopK, Uniform
from kvsieve.compose import Recipe
from kvsieve.interfaces import Scope, ScorerDefaults, Signal
from kvsieve.moments import moments
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.rope import half_turn


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(ScorerDefaults):
    """Expected future attention times value norm, ``[B, H, S]``."""

    sinks: int = 4
    future: int = 512
    epsilon: float = 0.0
    covariance: bool = True
    value_norm: bool = True
    memory: int = 256

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.PRE_ROPE, Signal.VALUES})

    @property
    def window(self) -> int:
        return self.memory

    @property
    def moments(self) -> int | None:
        return self.sinks

    def score(self, step: Step, store: Store) -> Tensor:
        mean, spread = self._moments(step)  # [B, H, G, D], [B, H, G, D, D]
        mean, spread = self._rotate(step, store, mean, spread)
        keys = store.keys.float()  # [B, H, S, D]
        logits = torch.einsum("bhgd,bhsd->bhgs", mean, keys) * step.scale
        if self.covariance:
            spread_keys = torch.einsum("bhgde,bhse->bhgsd", spread, keys)
            quadratic = (spread_keys * keys[:, :, None]).sum(-1)
            logits = logits + quadratic * step.scale**2 / 2
        future = store["position"] >= self.sinks
        if store.live is not None:
            future = future & store.live
        weights = logits.masked_fill(~future[:, :, None], -torch.inf).softmax(-1)
        # A row of nothing but sinks has no softmax.
        weights = weights.masked_fill(~future[:, :, None], 0.0).mean(2)
        if not self.value_norm:
            return weights
        return (weights + self.epsilon) * store.values.float().norm(dim=-1)

    def _moments(self, step: Step) -> tuple[Tensor, Tensor]:
        """Mean and covariance of un-rotated queries: of the whole prompt, or of the last 256."""
        if step.moments is not None:
            mean, spread = step.moments.mean, step.moments.covariance()
            return mean, spread
        queries, positions, valid = step.window(self.memory)
        beyond = valid & (positions >= self.sinks)
        count, mean, spread = moments(step.unrotated(queries, positions), beyond)
        return mean, spread / count.clamp_min(1)[:, None, None, None, None]

    def _rotate(
        self, step: Step, store: Store, mean: Tensor, spread: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply the mean rotation of the next ``future`` positions to both moments."""
        ahead = store.seen.to(mean.device)[:, None] + torch.arange(self.future, device=mean.device)
        cos, sin = (x.mean(1)[:, None, None] for x in step.rotation(ahead))  # [B, 1, 1, R]
        mean = _turn(mean, cos, sin)
        cos, sin = cos[:, :, :, None], sin[:, :, :, None]
        spread = _turn(spread, cos, sin)  # rows: Sigma R^T
        return mean, _turn(spread.transpose(-1, -2), cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply a (mean) rotation to the last axis; dimensions that don't rotate stay."""
    R = cos.shape[-1]
    turned = x[..., :R] * cos + half_turn(x[..., :R]) * sin
    return torch.cat([turned, x[..., R:]], -1)


@method(
    name="expected-attention",
    paper="Expected Attention",
    year=2025,
    arxiv="2510.00636",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
)
def expected_attention(
    *,
    sinks: int = 4,
    future: int = 512,
    epsilon: float = 0.01,
    covariance: bool = True,
    value_norm: bool = True,
    adaptive: bool = True,
    interval: int = 512,
) -> Recipe:
    """``future``: positions averaged over; ``adaptive``: heads share unevenly (AdaKV)."""
    return Recipe(
        method="expected-attention",
        scorer=ExpectedAttention(
            sinks=sinks,
            future=future,
            epsilon=epsilon,
            covariance=covariance,
            value_norm=value_norm,
        ),
        allocator=TopK(scope=Scope.LAYER, floor=0.2) if adaptive else Uniform(),
        schedule=AfterPrefill() | Every(interval),
        layout="ragged" if adaptive else "dense",
        sinks=sinks,
    )
