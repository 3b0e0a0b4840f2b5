"""InfiniPot-V: a stream under a cap, kept by what is new in time and by the size of its values
("InfiniPot-V: Memory-Constrained KV Cache Compression for Streaming Video Understanding", arXiv
2506.15745). For any stream of tokens that comes in parts; a video front end is not included.

    TaR_i = - mean over the last ``frames`` frames f of cos(k_i, k_f,place(i))
    VaN_i = ||v_i||_2, averaged over ``kernel`` neighbours
    keep the tokens of the last frames, the best by TaR up to alpha C, and the best by VaN up to C

A frame is ``frame`` tokens in a row (after the ``sinks``), place(i) a token's place in its frame: a
patch of a video. With ``frame=1`` any token is compared with all of the last ``frames`` tokens: the
reading for text. alpha: ``share``; C: the budget, to which every part of a prompt is cut when it
has passed, or with ``trigger`` = M when M slots are held: a head never holds more than that and a
part, however long the stream. A question, in a later part, can be answered at any time. No
attention and no queries: O(S D) per event, beside the layer O(frame D).

Differs from the paper: frames and places are those of a token's position, so that they stay true
after eviction (the code cuts what is left into frames anew). The code pools VaN in the grid of
patches, the deeper the layer the less, but leaves that off by default; here neighbours are
neighbouring slots. It sets the last frames as a share of those held (a quarter). Text parts, too,
are cut when they have passed; ``protect`` or a later schedule spares them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvsieve.allocators import top_mask
from kvsieve.compose import Recipe
from kvsieve.compressors import keep_best
from kvsieve.errors import RecipeError
from kvsieve.interfaces import ScorerDefaults, Signal
from kvsieve.packing import live_slots
from kvsieve.registry import method
from kvsieve.schedules import Above, AfterPrefill
from kvsieve.scoring import before_window, check_kernel, pool, value_norm
from kvsieve.step import Step
from kvsieve.store import Store
from kvsieve.store.attend import layer_block, query_blocks


@dataclass(frozen=True, kw_only=True)
class TemporalRedundancy(ScorerDefaults):
    """TaR: how unlike a key is to those of its place in the last frames, ``[B, H, S]``."""

    frame: int
    frames: int
    sinks: int

    def __post_init__(self) -> None:
        if self.frame < 1 or self.frames < 1:
            raise RecipeError("infinipot-v: frame and frames count tokens and frames, from 1 on.")

    def score(self, step: Step, store: Store) -> Tensor:
        keys = store.keys
        B, H, S, D = keys.shape
        recent = live_slots(store) & ~before_window(store, self.frame * self.frames)
        recent = recent.expand(B, H, -1)
        place = ((store["position"] - self.sinks) % self.frame).long().expand(B, H, -1)
        blocks = list(query_blocks(S, B * H * D, layer_block(keys)))
        anchor = torch.zeros(B, H, self.frame, D, device=keys.device)
        for s0, s1 in blocks:
            unit = F.normalize(keys[:, :, s0:s1].float(), dim=-1)
            unit.masked_fill_(~recent[:, :, s0:s1, None], 0.0)
            anchor.scatter_add_(2, place[:, :, s0:s1, None].expand_as(unit), unit)
        seen = anchor.new_zeros(B, H, self.frame).scatter_add_(2, place, recent.float())
        anchor /= seen.clamp_min(1)[..., None]
        out = torch.empty(B, H, S, device=keys.device)
        for s0, s1 in blocks:
            unit = F.normalize(keys[:, :, s0:s1].float(), dim=-1)
            like = anchor.gather(2, place[:, :, s0:s1, None].expand_as(unit))
            out[:, :, s0:s1] = -unit.mul_(like).sum(-1)
        return out


@dataclass(frozen=True, kw_only=True)
class FillByValues:
    """Keep a first share by score, the rest by the norm of the values (VaN)."""

    share: float
    kernel: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise RecipeError(f"infinipot-v: share={self.share}; it goes from 0 to 1.")
        check_kernel(self.kernel)

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({Signal.VALUES})

    def compress(self, step: Step, store: Store, scores: Tensor, counts: Tensor) -> None:
        """Keep ``counts [B, H]`` slots; protected ones (+inf) count to the first share."""
        first = counts - (counts * (1 - self.share)).round().long()
        chosen = top_mask(scores, first.to(scores.device)) & ~scores.isneginf()
        norms = pool(value_norm(store), live_slots(store), self.kernel, "avg")
        norms = torch.where(scores.isinf(), scores, norms)
        keep_best(store, norms.masked_fill(chosen, torch.inf), counts)


@method(
    name="infinipot-v",
    paper="InfiniPot-V",
    year=2025,
    arxiv="2506.15745",
    certainty="code",
)
def infinipot_v(
    *,
    frame: int = 1,
    frames: int = 128,
    share: float = 0.5,
    kernel: int = 1,
    sinks: int = 4,
    trigger: int = 0,
) -> Recipe:
    """``frame``: tokens of a frame; ``frames``: last ones, which stay; ``share``: alpha, of the
    budget for them and TaR; ``kernel``: pooling of VaN (1: none); ``sinks``: first tokens that stay
    (a system prompt); ``trigger``: M, slots at which it is cut (0: after every part).
    """
    if trigger < 0 or trigger == 1:
        raise RecipeError(f"infinipot-v: trigger={trigger}; give 0, or 2 slots or more.")
    return Recipe(
        method="infinipot-v",
        scorer=TemporalRedundancy(frame=frame, frames=frames, sinks=sinks),
        compressor=FillByValues(share=share, kernel=kernel),
        schedule=Above(trigger - 1) if trigger else AfterPrefill(),
        sinks=sinks,
        recent=frame * frames,
    )
