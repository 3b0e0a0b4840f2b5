"""Running mean and covariance of a prompt's queries before rotation, over all of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsieve.store.attend import layer_block, query_blocks
from kvsieve.store.rope import rotate

if TYPE_CHECKING:
    from kvsieve.step import Step
    from kvsieve.store import Store


@dataclass(kw_only=True)
class QueryMoments:
    """Moments of one layer's queries, per row and query head, in fp32.

    ``count [B]`` queries; ``mean [B, H, G, D]``; ``spread [B, H, G, D, D]``: their sum of squared
    deviations. Parts are joined pairwise (Chan et al.), so that it makes no difference in how many
    parts the prompt came.
    """

    count: Tensor
    mean: Tensor
    spread: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> QueryMoments:
        """Return the moments of no queries, for queries shaped like ``[B, H, G, T, D]``."""
        B, H, G, _, D = like.shape
        kind = {"dtype": torch.float32, "device": like.device}
        return cls(
            count=torch.zeros(B, **kind),
            mean=torch.zeros(B, H, G, D, **kind),
            spread=torch.zeros(B, H, G, D, D, **kind),
        )

    def take_in(self, step: Step, leave_out: int, rotated: bool = False) -> None:
        """Add a forward's real queries, but those of the first ``leave_out`` positions.

        ``rotated``: as they are, and not before rotation. In blocks of queries.
        """
        valid = step.positions >= leave_out
        if step.live is not None:
            valid = valid & step.live
        T = step.query.shape[3]
        for t0, t1 in query_blocks(T, step.query.numel() // T, layer_block(step.query)):
            block = step.query[:, :, :, t0:t1]
            plain = block.float() if rotated else step.unrotated(block, step.positions[:, t0:t1])
            self.join(*moments(plain, valid[:, t0:t1]))

    def join(self, count: Tensor, mean: Tensor, spread: Tensor) -> None:
        """Add the moments of further queries."""
        total = self.count + count
        share = (count / total.clamp_min(1))[:, None, None, None]
        apart = mean - self.mean
        outer = apart[..., :, None] * apart[..., None, :]
        self.spread = (
            self.spread + spread + outer * (self.count[:, None, None, None] * share)[..., None]
        )
        self.mean = self.mean + apart * share
        self.count = total

    def drop(self, rows: Tensor) -> None:
        """Forget the queries of some ``rows [B]`` (bool)."""
        kept = (~rows).float().to(self.count.device)
        self.count = self.count * kept
        self.mean = self.mean * kept[:, None, None, None]
        self.spread = self.spread * kept[:, None, None, None, None]

    def covariance(self) -> Tensor:
        """Return the (biased) covariance ``[B, H, G, D, D]``."""
        return self.spread / self.count.clamp_min(1)[:, None, None, None, None]

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index`` of them."""
        self.count = self.count.index_select(0, index)
        self.mean = self.mean.index_select(0, index)
        self.spread = self.spread.index_select(0, index)

    def tensors(self) -> list[Tensor]:
        """Return everything stored, for counting bytes."""
        return [self.count, self.mean, self.spread]


def moments(queries: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return count ``[B]``, mean and sum of squared deviations of ``queries [B, H, G, W, D]``.

    Only those that are ``valid [B, W]`` count.
    """
    count = valid.sum(1).float()
    weight = valid.float()
    mean = torch.einsum("bhgwd,bw->bhgd", queries, weight)
    mean = mean / count.clamp_min(1)[:, None, None, None]
    centred = (queries - mean[:, :, :, None]) * weight[:, None, None, :, None]
    return count, mean, centred.transpose(-1, -2) @ centred


def ahead(
    step: Step, store: Store, mean: Tensor, spread: Tensor, future: int
) -> tuple[Tensor, Tensor]:
    """Apply the mean rotation of the next ``future`` positions to moments before rotation.

    ``mean [B, H, G, D]`` and ``spread [B, H, G, D, D]``; the next position is the true one.
    """
    places = store.seen.to(mean.device)[:, None] + torch.arange(future, device=mean.device)
    cos, sin = (x.mean(1)[:, None, None] for x in step.rotation(places))  # [B, 1, 1, R]
    mean = rotate(mean, cos, sin)
    cos, sin = cos[:, :, :, None], sin[:, :, :, None]
    spread = rotate(spread, cos, sin)  # rows: Sigma R^T
    return mean, rotate(spread.transpose(-1, -2), cos, sin)
