"""Rows of paged caches, moved as they are: into a plain table, back, or within their blocks.

A layer's cache is seen as ``[blocks, H, b, C]`` with any strides: b slots in a block, C numbers in
a slot (key, then value). Slot s of a request whose blocks are p_0, p_1, ... is row s mod b of block
p_(s div b). Symbols: L layers (of equal shape and strides), E requests, P columns (blocks) of a
request, H heads, N rows of each head.

Compaction goes through a table of the rows that stay: all are read before any is written. It so
doesn't matter that sources and destinations overlap, nor in which order a device runs things. The
table costs ``L E H N C`` numbers for the time of the call; every row is read and written twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Mover(Protocol):
    """Two functions with two implementations: torch (the reference) and Triton."""

    def take(self, caches: Sequence[Tensor], blocks: Tensor, slots: Tensor | None = None) -> Tensor:
        """Return rows ``[L, E, H, N, C]`` of ``caches``, L times ``[blocks, H, b, C]``.

        ``blocks [E, P]`` int64: each request's blocks in order; ``slots [L, E, H, N]`` int64: which
        slots (None: all, N = P b).
        """
        ...

    def put(self, caches: Sequence[Tensor], blocks: Tensor, rows: Tensor) -> None:
        """Make ``rows [L, E, H, N, C]`` the first N slots of ``blocks [E, P]``; N <= P b."""
        ...


def compact(mover: Mover, caches: Sequence[Tensor], blocks: Tensor, slots: Tensor) -> None:
    """Move ``slots [L, E, H, N]`` of each request's ``blocks [E, P]`` to the front of them."""
    mover.put(caches, blocks, mover.take(caches, blocks, slots))


class TorchMover:
    """Plain indexing, on any device."""

    def take(self, caches: Sequence[Tensor], blocks: Tensor, slots: Tensor | None = None) -> Tensor:
        """See ``Mover``."""
        if slots is None:
            slots = _first(caches, blocks, blocks.shape[1] * caches[0].shape[2])
        return torch.stack(
            [cache[_places(cache, blocks, s)] for cache, s in zip(caches, slots, strict=True)]
        )

    def put(self, caches: Sequence[Tensor], blocks: Tensor, rows: Tensor) -> None:
        """See ``Mover``."""
        slots = _first(caches, blocks, rows.shape[3])
        for cache, s, new in zip(caches, slots, rows, strict=True):
            cache[_places(cache, blocks, s)] = new


def _first(caches: Sequence[Tensor], blocks: Tensor, N: int) -> Tensor:
    slots = torch.arange(N, device=blocks.device)
    return slots.expand(len(caches), blocks.shape[0], caches[0].shape[1], N)


def _places(cache: Tensor, blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return block, head and row of ``slots [E, H, N]``, each broadcastable to that shape."""
    _, H, b, _ = cache.shape
    requests = torch.arange(blocks.shape[0], device=blocks.device)[:, None, None]
    heads = torch.arange(H, device=blocks.device)[None, :, None]
    return blocks[requests, slots // b], heads, slots % b


class TritonMover:
    """One Triton kernel, whose program moves some rows of one head of one request of one layer.

    Tested in Triton's interpreter, on CPU tensors; not yet run on a GPU.
    """

    def take(self, caches: Sequence[Tensor], blocks: Tensor, slots: Tensor | None = None) -> Tensor:
        """See ``Mover``."""
        _, H, b, C = caches[0].shape
        E, P = blocks.shape
        N = P * b if slots is None else slots.shape[3]
        rows = caches[0].new_empty(len(caches), E, H, N, C)
        self._launch(caches, blocks, rows, slots, take=True)
        return rows

    def put(self, caches: Sequence[Tensor], blocks: Tensor, rows: Tensor) -> None:
        """See ``Mover``."""
        self._launch(caches, blocks, rows, None, take=False)

    def _launch(
        self,
        caches: Sequence[Tensor],
        blocks: Tensor,
        rows: Tensor,
        slots: Tensor | None,
        take: bool,
    ) -> None:
        from kvsieve.engines.vllm import kernels  # Triton is no dependency of CPU installs

        kernels.move(
            caches[0], _offsets(caches), rows.contiguous(), blocks.contiguous(), slots, take=take
        )


def _offsets(caches: Sequence[Tensor]) -> Tensor:
    """How far each cache begins behind the first, in elements, ``[L]`` int64."""
    first = caches[0]
    if len(caches) == 1:  # made on the device: nothing is copied there
        return torch.zeros(1, dtype=torch.int64, device=first.device)
    for cache in caches:
        same = (cache.shape, cache.stride(), cache.dtype) == (
            *(first.shape, first.stride(), first.dtype),
        )
        if not same:
            raise ValueError("The caches of one call must have equal shapes, strides and dtypes.")
    apart = [(cache.data_ptr() - first.data_ptr()) // first.element_size() for cache in caches]
    return torch.tensor(apart, dtype=torch.int64, device=first.device)
