"""Statistics that fit every tiny model, whatever its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsieve.statistics import TENSORS, Identity, Statistics

SIZES = {"heads": 2, "group": 2, "head_dim": 16}


class Drawn(Statistics):
    """The same random numbers each time, for any layer; ``sizes``: unlike a tiny model's."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(tensors={}, identity=None, source="drawn")
        object.__setattr__(self, "sizes", SIZES | sizes)

    def require(self, *names: str) -> None:
        """Have everything."""

    def of(self, name: str, ordinal: int, device: torch.device) -> Tensor:
        made = torch.Generator().manual_seed(100 * ordinal + list(TENSORS).index(name))
        shape = [self.sizes[size] for size in TENSORS[name]]
        x = torch.randn(shape, generator=made)
        if name == "query_covariance":
            x = x @ x.transpose(-1, -2) / 16
        return (x.sigmoid() if name == "head_gate" else x).to(device)

    def check(self, model: Identity) -> None:
        """Fit every model."""
