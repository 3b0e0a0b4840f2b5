"""Bit codes of vectors (signs of random projections), packed into integers, and their distance."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsieve.errors import RecipeError

_WIDTHS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}
_BYTE = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
_POPCOUNT = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


def code_dtype(bits: int) -> torch.dtype:
    """Return the narrowest integer type that holds a code of so many bits.

    Raises:
        RecipeError: no bits, or more than 64.
    """
    for width, dtype in _WIDTHS.items():
        if 1 <= bits <= width:
            return dtype
    raise RecipeError(f"bits={bits}: a code has 1 to 64 bits.")


def sign_bits(x: Tensor, projection: Tensor) -> Tensor:
    """Return ``x R >= 0``, bool ``[..., L]``, of ``x [..., D]`` and ``projection [D, L]``."""
    return x.float() @ projection >= 0


def packed(bits: Tensor) -> Tensor:
    """Pack ``bits [..., L]`` (bool) into one integer each, ``[...]``."""
    dtype = code_dtype(bits.shape[-1])
    width = next(w for w, d in _WIDTHS.items() if d is dtype)
    padding = bits.new_zeros(*bits.shape[:-1], width - bits.shape[-1])
    by_byte = torch.cat([bits, padding], -1).unflatten(-1, (width // 8, 8))
    bytes_ = (by_byte * _BYTE.to(bits.device)).sum(-1, dtype=torch.uint8)
    return bytes_.view(dtype)[..., 0]


def hamming(a: Tensor, b: Tensor) -> Tensor:
    """Return in how many bits codes differ, int64; shapes are broadcast."""
    apart = (a ^ b)[..., None].view(torch.uint8)  # [..., bytes]
    table = _POPCOUNT.to(a.device)
    return table.index_select(0, apart.flatten().int()).view(apart.shape).sum(-1)
