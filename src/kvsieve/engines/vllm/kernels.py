# pyright: reportMissingImports=false
"""The Triton kernel behind ``gather.TritonMover``."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Numbers that one program holds at a time, about."""


@triton.jit
def _move(
    cache,  # the first layer's cache, [blocks, H, b, C] with the strides below
    offsets,  # [L] int64: where each layer's begins, behind the first
    rows,  # [L, E, H, N, C], contiguous
    blocks,  # [E, P] int64
    slots,  # [L, E, H, N] int64; read only if CHOSEN
    E,
    P,
    H,
    N,
    C,
    b,
    block_stride: tl.int64,
    head_stride: tl.int64,
    slot_stride: tl.int64,
    number_stride: tl.constexpr,
    TAKE: tl.constexpr,
    CHOSEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    h = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)  # layer and request
    layer = pair // E
    request = pair % E
    inside = n < N
    row = (pair * H + h) * N + n
    if CHOSEN:
        slot = tl.load(slots + row, mask=inside, other=0)
    else:
        slot = n
    block = tl.load(blocks + request * P + slot // b, mask=inside, other=0)
    place = tl.load(offsets + layer) + block * block_stride + h * head_stride
    place += (slot % b) * slot_stride
    c = tl.arange(0, COLS)
    stored = cache + place[:, None] + c[None, :] * number_stride
    plain = rows + row[:, None] * C + c[None, :]
    mask = inside[:, None] & (c < C)[None, :]
    if TAKE:
        tl.store(plain, tl.load(stored, mask=mask), mask=mask)
    else:
        tl.store(stored, tl.load(plain, mask=mask), mask=mask)


def move(
    cache: Tensor,
    offsets: Tensor,
    rows: Tensor,
    blocks: Tensor,
    slots: Tensor | None,
    *,
    take: bool,
) -> None:
    """Copy between ``cache [blocks, H, b, C]`` (any strides) and ``rows [L, E, H, N, C]``.

    ``take``: from the cache to the rows; else back. Layer l begins ``offsets[l]`` elements behind
    ``cache``. ``blocks [E, P]`` and ``slots [L, E, H, N]`` are int64; slots None: the first N.
    """
    L, E, H, N, C = rows.shape
    cols = triton.next_power_of_2(C)
    height = max(1, TILE // cols)
    if rows.numel() == 0:
        return
    _move[(triton.cdiv(N, height), H, L * E)](  # type: ignore[index]
        cache,
        offsets,
        rows,
        blocks,
        blocks if slots is None else slots.contiguous(),
        E,
        blocks.shape[1],
        H,
        N,
        C,
        cache.shape[2],
        *cache.stride(),
        TAKE=take,
        CHOSEN=slots is not None,
        ROWS=height,
        COLS=cols,
    )
