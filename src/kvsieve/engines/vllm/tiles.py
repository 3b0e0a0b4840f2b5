"""Order of the elements in a tile of ``size`` slots by ``D`` dimensions, and fast ways through it.

Layouts for vector units are digit permutations: split slot and dimension into factors, and they
are a transposition of those axes. Where that is so, a tile is unpacked by one strided copy instead
of one index per element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsieve.errors import EngineError


@dataclass(frozen=True, eq=False)
class Permutation:
    """``where [size, D]``: place of each element in its tile; ``source``: the other way round.

    ``axes``: sizes of the tile's axes as stored and their order when unpacked, or None where an
    index per element is needed.
    """

    size: int
    D: int
    where: Tensor
    source: Tensor
    axes: tuple[tuple[int, ...], tuple[int, ...]] | None

    @classmethod
    def of(cls, tile: Tensor, size: int, D: int) -> Permutation:
        """Read a tile that holds the plain index of each element at its place, ``[size * D]``.

        Raises:
            EngineError: elements are lost or doubled: not a layout that can be compacted.
        """
        if not tile.sort().values.equal(torch.arange(size * D)):
            raise EngineError(
                "This backend's blocks don't hold each key and value once; they can't be compacted."
            )
        where = torch.empty_like(tile)
        where[tile] = torch.arange(size * D)
        return cls(size=size, D=D, where=where, source=tile, axes=digits(tile, size * D))

    def unpack(self, tiles: Tensor) -> Tensor:
        """Turn ``[P, H, size, D]`` as stored into plain ``[H, P size, D]``."""
        P, H = tiles.shape[:2]
        if self.axes is None:
            plain = tiles.reshape(P, H, -1).index_select(2, self.where)
        else:
            stored, order = self.axes
            plain = tiles.reshape(P, H, *stored).permute(0, 1, *(2 + a for a in order))
        out = tiles.new_empty(H, P, self.size * self.D)
        out.view(H, P, *plain.shape[2:]).copy_(plain.transpose(0, 1))
        return out.view(H, P * self.size, self.D)

    def pack(self, plain: Tensor) -> Tensor:
        """Turn plain ``[H, P size, D]`` into ``[P, H, size, D]`` as stored."""
        H = plain.shape[0]
        tiles = plain.reshape(H, -1, self.size * self.D).transpose(0, 1)  # [P, H, size * D]
        P = tiles.shape[0]
        if self.axes is None:
            return tiles.index_select(2, self.source).view(P, H, self.size, self.D)
        stored, order = self.axes
        back = [order.index(a) for a in range(len(order))]
        unpacked = tiles.unflatten(2, [stored[a] for a in order])
        packed = unpacked.permute(0, 1, *(2 + a for a in back))
        return packed.reshape(P, H, self.size, self.D)


def digits(tile: Tensor, count: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Find axes so that ``tile.view(stored).permute(order)`` counts 0, 1, 2, ...; None: none do.

    ``tile [count]`` holds plain indices in stored order. Read from the innermost axis outwards: an
    axis goes on as long as its steps are equal and what lies inside it repeats.
    """
    stored: list[tuple[int, int]] = []  # (length, stride in the plain index), innermost first
    inner = 1
    while inner < count:
        stride = int(tile[inner] - tile[0])
        length = 1
        while inner * length < count and int(tile[inner * length] - tile[0]) == stride * length:
            length += 1
        while count % (inner * length):
            length -= 1
        if length < 2:
            return None
        stored.append((length, stride))
        inner *= length
    stored.reverse()
    order = sorted(range(len(stored)), key=lambda a: -stored[a][1])
    lengths = tuple(length for length, _ in stored)
    plain = tile.view(lengths).permute(order).reshape(-1)
    return (lengths, tuple(order)) if plain.equal(torch.arange(count)) else None
