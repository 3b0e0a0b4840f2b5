"""Expected Attention: the weight a key will get from future queries, in closed form ("Expected
Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution", arXiv
2510.00636).

    q ~ N(mu, Sigma): moments of the queries before rotation
    R: mean rotation over the next F positions;  mu <- R mu,  Sigma <- R Sigma R^T
    l_i = mu . k_i / sqrt d + k_i^T Sigma k_i / (2 d)        (= log E[exp(q . k_i / sqrt d)])
    score_i = (mean over the group of softmax_i(l) + epsilon) * ||v_i||_2

The first ``sinks`` tokens stay and their queries are left out of the moments. Heads share the
layer's budget as in AdaKV (floor 0.2, epsilon 0.01): the configuration that the paper evaluates;
``adaptive=False`` gives every head the same number. mu and Sigma are those of the whole prompt, and
while decoding of the last 256 queries; or, with ``stats=FILE``, those of calibration text (`kvsieve
calibrate`), and then no query is looked at. O(T D^2) a query head for the moments of a prompt, and
O(S D^2) an event, in blocks: in memory O(D^2) a query head and what one block of slots takes.

Differs from the paper: queries are un-rotated by their true positions instead of projected again
from hidden states; while decoding, the future starts at the true position (the released code
starts at the length of its buffer of 256 hidden states). ``||v W_O||`` would be the principled
factor; the paper's code uses ``||v||``, and so does this file. Calibration text is the user's; the
paper's was 100 starts of books of 1000 characters each.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from kvsieve.allocators import TopK, Uniform
from kvsieve.compose import Recipe
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Scope, ScorerDefaults, Signal
from kvsieve.moments import ahead, moments
from kvsieve.registry import method
from kvsieve.schedules import AfterPrefill, Every
from kvsieve.statistics import Statistics, read
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.attend import layer_block, query_blocks


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(ScorerDefaults):
    """Expected future attention times value norm, ``[B, H, S]``."""

    sinks: int = 4
    future: int = 512
    epsilon: float = 0.0
    covariance: bool = True
    value_norm: bool = True
    memory: int = 256
    statistics: Statistics | None = None

    def __post_init__(self) -> None:
        if self.future < 1:
            raise RecipeError(f"expected-attention: future={self.future}; it is 1 or more.")
        if not 0 <= self.epsilon < math.inf:
            raise RecipeError(f"expected-attention: epsilon={self.epsilon}; it is 0 or more.")

    @property
    def needs(self) -> frozenset[Signal]:
        given = set() if self.statistics is None else {Signal.STATISTICS}
        return frozenset({Signal.PRE_ROPE, Signal.VALUES, *given})

    @property
    def window(self) -> int:
        return self.memory if self.statistics is None else 0

    @property
    def moments(self) -> int | None:
        return self.sinks if self.statistics is None else None

    def score(self, step: Step, store: Store) -> Tensor:
        mean, spread = ahead(step, store, *self._moments(step), self.future)
        logits = self._logits(store, mean * step.scale, spread * step.scale**2 / 2)
        future = store["position"] >= self.sinks
        if store.live is not None:
            future = future & store.live
        weights = logits.masked_fill_(~future[:, :, None], -torch.inf).softmax(-1)
        # A row of nothing but sinks has no softmax.
        weights = weights.masked_fill_(~future[:, :, None], 0.0).mean(2)
        if not self.value_norm:
            return weights
        return (weights + self.epsilon) * vector_norm(store.values, dim=-1, dtype=torch.float32)

    def _logits(self, store: Store, mean: Tensor, spread: Tensor) -> Tensor:
        """Return ``mu . k + k^T Sigma k`` in fp32, ``[B, H, G, S]``, in blocks of slots."""
        keys = store.keys
        B, H, S, D = keys.shape
        G = mean.shape[2]
        logits = torch.empty(B, H, G, S, device=keys.device)
        for s0, s1 in query_blocks(S, B * H * G * D, layer_block(keys)):
            block = keys[:, :, None, s0:s1].float()  # [B, H, 1, s, D]
            # In Horner form: (mu + Sigma k) . k
            linear = mean[:, :, :, None].expand(B, H, G, s1 - s0, D)
            if self.covariance:
                linear = linear + block @ spread
            logits[..., s0:s1] = (linear * block).sum(-1)
        return logits

    def _moments(self, step: Step) -> tuple[Tensor, Tensor]:
        """Mean and covariance of un-rotated queries: calibrated, of the prompt, or of the last."""
        if self.statistics is not None:
            B, where = step.query.shape[0], (step.layer.ordinal, step.query.device)
            mean = self.statistics.of("query_mean", *where)
            spread = self.statistics.of("query_covariance", *where)
            return mean.expand(B, *mean.shape), spread.expand(B, *spread.shape)
        if step.moments is not None:
            return step.moments.mean, step.moments.covariance()
        queries, positions, valid = step.window(self.memory)
        beyond = valid & (positions >= self.sinks)
        count, mean, spread = moments(step.unrotated(queries, positions), beyond)
        return mean, spread / count.clamp_min(1)[:, None, None, None, None]


@method(
    name="expected-attention",
    paper="Expected Attention",
    year=2025,
    arxiv="2510.00636",
    certainty="paper and code",
    oracle="kvpress 0.5.5",
    engines=("transformers", "vllm"),
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
    stats: str | os.PathLike[str] | Statistics | None = None,
) -> Recipe:
    """``future``: positions averaged over; ``adaptive``: heads share unevenly (AdaKV); ``stats``: a
    file of `kvsieve calibrate`, whose moments then take the place of the prompt's own.
    """
    return Recipe(
        method="expected-attention",
        scorer=ExpectedAttention(
            sinks=sinks,
            future=future,
            epsilon=epsilon,
            covariance=covariance,
            value_norm=value_norm,
            statistics=read(stats, "query_mean", "query_covariance"),
        ),
        allocator=TopK(scope=Scope.LAYER, floor=0.2) if adaptive else Uniform(),
        schedule=AfterPrefill() | Every(interval),
        layout="ragged" if adaptive else "dense",
        sinks=sinks,
    )
