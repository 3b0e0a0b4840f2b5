"""Running mean and covariance of a prompt's queries before rotation, over all of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvsieve.step import Step


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

    def take_in(self, step: Step, leave_out: int) -> None:
        """Add a forward's real queries, but those of the first ``leave_out`` positions."""
        valid = step.positions >= leave_out
        if step.live is not None:
            valid = valid & step.live
        self.join(*moments(step.unrotated(step.query, step.positions), valid))

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
