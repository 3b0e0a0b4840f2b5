"""Statistics given by hand, for layers without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsieve.statistics import Statistics


def given(**tensors: Tensor) -> Statistics:
    """Return statistics of those tensors ``[L, ...]``, of no model in particular."""
    return Statistics(tensors=tensors, identity=None, source="given")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
