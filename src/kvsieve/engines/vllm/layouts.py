"""How a backend lays slots out inside its blocks: read them, write them, make them unusable.

``cpu.CPUTiles`` is the CPU backend's, ``Strided`` that of FlashAttention and of Triton attention.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvsieve.engines.vllm.gather import Mover, compact
from kvsieve.errors import EngineError


class Tiles(Protocol):
    """A layer's blocks. Symbols: P blocks of b slots, H heads, D dimensions."""

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[1, H, P b, D]`` of ``blocks [P]``."""
        ...

    def write(self, cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put ``keys`` and ``values [1, H, P b, D]`` into ``blocks [P]``, whole blocks."""
        ...

    def poison(self, cache: Tensor, blocks: Tensor) -> None:
        """Make ``blocks [P]`` unusable: whoever reads them gets NaN."""
        ...


class Strided:
    """A slot of a head is its key, then its value: ``[blocks, H, b, 2 D]`` with any strides.

    Since vLLM 0.31 FlashAttention and Triton attention both take this view apart by
    ``cache.transpose(1, 2).split(D, -1)``. What lies next to what in memory (heads inside slots or
    slots inside heads, layers inside blocks or blocks inside layers) is in the tensor's strides and
    nowhere else: nothing here assumes an order. ``D``: dimensions of a head; ``mover``: what copies
    rows.
    """

    def __init__(self, D: int, mover: Mover) -> None:
        self.D, self.mover = D, mover

    def check(self, cache: Tensor) -> None:
        """Refuse caches that hold anything else.

        Raises:
            EngineError: quantized, packed with scales, or values of another size than keys.
        """
        if cache.dim() != 4 or cache.shape[3] != 2 * self.D or cache.dtype.itemsize < 2:
            raise EngineError(
                f"kvsieve reads caches [blocks, heads, slots, {2 * self.D}] of 16 or 32 bits; this "
                f"backend's is {list(cache.shape)} of {cache.dtype}. Leave --kv-cache-dtype out."
            )

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[1, H, P b, D]`` of ``blocks [P]``, views of one table."""
        keys, values = self.mover.take([cache], blocks[None])[0].split(self.D, -1)
        return keys, values

    def write(self, cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put ``keys`` and ``values [1, H, P b, D]`` into ``blocks [P]``, whole blocks."""
        self.mover.put([cache], blocks[None], torch.cat([keys, values], -1)[None])

    def compact(self, cache: Tensor, blocks: Tensor, slots: Tensor) -> None:
        """Move ``slots [E, H, N]`` of each request's ``blocks [E, P]`` to the front of them."""
        compact(self.mover, [cache], blocks, slots[None])

    def poison(self, cache: Tensor, blocks: Tensor) -> None:
        """Fill ``blocks [P]`` with NaN."""
        cache.index_fill_(0, blocks, torch.nan)
