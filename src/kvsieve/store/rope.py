"""Rotary positions: turning and un-turning vectors in the rotate-half layout.

With ``cos, sin [..., R]`` (R <= D rotated dimensions, the two halves equal) and
``P(x1, x2) = (-x2, x1)``: ``rotate(x) = x cos + P(x) sin``. A scaled table (cos² + sin² = m²,
as in YaRN) is undone with the factor ``1 / m²``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def half_turn(x: Tensor) -> Tensor:
    """Return ``(-x2, x1)`` for ``x = (x1, x2)`` along the last axis."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R dimensions of ``x [..., D]`` by ``cos, sin [..., R]``."""
    R = cos.shape[-1]
    turned = x[..., :R] * cos + half_turn(x[..., :R]) * sin
    return turned if x.shape[-1] == R else torch.cat([turned, x[..., R:]], -1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo ``rotate`` exactly (up to rounding), scaled tables included."""
    R = cos.shape[-1]
    norm = cos.square() + sin.square()
    turned = (x[..., :R] * cos - half_turn(x[..., :R]) * sin) / norm
    return turned if x.shape[-1] == R else torch.cat([turned, x[..., R:]], -1)
