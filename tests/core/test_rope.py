"""Rotary positions: turning is complex multiplication, and un-turning undoes it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvsieve.store.rope import half_turn, rotate, unrotate


def tables(length: int, R: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cos and sin ``[length, R]`` of positions 0, 1, ... with both halves equal."""
    angle = torch.arange(length)[:, None] * 10.0 ** (-torch.arange(R // 2) / 2)
    angle = torch.cat([angle, angle], -1)
    return angle.cos() * scale, angle.sin() * scale


@pytest.mark.parametrize("R", [8, 4], ids=["whole", "partial"])
@pytest.mark.parametrize("scale", [1.0, 1.37], ids=["plain", "scaled"])
def test_unrotate_undoes_rotate(R: int, scale: float) -> None:
    x = torch.randn(2, 3, 50, 8)
    cos, sin = tables(50, R, scale)
    turned = rotate(x, cos, sin)
    assert not torch.allclose(turned[:, :, 1:, :R], x[:, :, 1:, :R], atol=0.1)
    torch.testing.assert_close(unrotate(turned, cos, sin), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(unrotate(x, cos, sin), cos, sin), x, atol=1e-5, rtol=1e-5)


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    x = torch.randn(5, 4)
    cos, sin = tables(5, 4, 1.2)
    turned = rotate(x, cos, sin)
    for t in range(5):
        for i, rate in enumerate((1.0, 10**-0.5)):
            a, b = x[t, i].item(), x[t, i + 2].item()
            c, s = 1.2 * math.cos(t * rate), 1.2 * math.sin(t * rate)
            assert turned[t, i].item() == pytest.approx(a * c - b * s, abs=1e-5)
            assert turned[t, i + 2].item() == pytest.approx(b * c + a * s, abs=1e-5)


def test_dimensions_beyond_the_rotated_ones_stay() -> None:
    x = torch.randn(3, 10)
    cos, sin = tables(3, 4, 2.0)
    assert torch.equal(rotate(x, cos, sin)[:, 4:], x[:, 4:])
    assert torch.equal(unrotate(x, cos, sin)[:, 4:], x[:, 4:])


def test_half_turn_twice_is_the_negative() -> None:
    assert half_turn(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-3.0, -4.0, 1.0, 2.0]
    x = torch.randn(6)
    assert torch.equal(half_turn(half_turn(x)), -x)
