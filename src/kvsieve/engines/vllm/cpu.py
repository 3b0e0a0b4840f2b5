# pyright: reportMissingImports=false
"""vLLM's CPU backend: its three classes with the mix-ins, and its layout inside a block.

A layer's cache is ``[blocks, H, b, 2 D]``, seen as ``[blocks, H, 2 b, D]``: first the key tile,
then the value tile of a (block, head). Inside a tile elements are permuted as the processor likes
it (transposed keys, pairs interleaved for AMX). Which permutation it is is found out by writing a
pattern through vLLM's own function.
"""

from __future__ import annotations

from functools import cache as cached
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops  # type: ignore[attr-defined]
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from kvsieve.engines.vllm.backend import SieveBackend, SieveBuilder, SieveImpl
from kvsieve.engines.vllm.tiles import Permutation


class Impl(SieveImpl, CPUAttentionBackendImpl):
    """CPU attention, then compaction."""

    def make_tiles(self, layer: Any) -> CPUTiles:
        """Return the layout of this layer's blocks."""
        return CPUTiles(self.head_size, layer.isa)


class Builder(SieveBuilder, CPUAttentionMetadataBuilder):
    """CPU metadata of what is left of each request."""


class Backend(SieveBackend, CPUAttentionBackend):
    """vLLM's CPU backend under a recipe, or exactly itself without one."""

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder


class CPUTiles:
    """Reads and writes tiles of ``D`` dimensions packed for ``isa``."""

    def __init__(self, D: int, isa: str) -> None:
        self.D, self.isa = D, isa

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[1, H, P b, D]`` of ``blocks [P]``."""
        keys, values = self._split(cache)
        order = permutations(cache.dtype, cache.shape[2], self.D, self.isa)
        return tuple(
            one.unpack(tile.index_select(0, blocks))[None]
            for one, tile in zip(order, (keys, values), strict=True)
        )  # type: ignore[return-value]

    def write(self, cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put ``keys`` and ``values [1, H, P b, D]`` into ``blocks [P]``, whole blocks."""
        order = permutations(cache.dtype, cache.shape[2], self.D, self.isa)
        for one, tile, new in zip(order, self._split(cache), (keys, values), strict=True):
            tile.index_copy_(0, blocks, one.pack(new[0]))

    def poison(self, cache: Tensor, blocks: Tensor) -> None:
        """Fill ``blocks [P]`` with NaN."""
        cache.index_fill_(0, blocks, torch.nan)

    def _split(self, cache: Tensor) -> tuple[Tensor, Tensor]:
        blocks, heads, size, _ = cache.shape
        both = cache.view(blocks, heads, 2 * size, -1)
        return both[:, :, :size], both[:, :, size:]


@cached
def permutations(dtype: torch.dtype, size: int, D: int, isa: str) -> tuple[Permutation, ...]:
    """Return the orders of elements in key and value tiles of ``size`` slots, found by trying."""
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    pattern = torch.arange(1, size * D + 1, dtype=torch.int32).to(bits).view(size, 1, D)
    both = torch.zeros(1, 1, 2 * size, D, dtype=dtype)
    keys, values = both.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        pattern.view(dtype),
        pattern.view(dtype),
        keys,
        values,
        torch.arange(size),
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    mask = (1 << (8 * dtype.itemsize)) - 1
    return tuple(
        Permutation.of((tile.contiguous().view(bits).reshape(-1).long() & mask) - 1, size, D)
        for tile in (keys, values)
    )
