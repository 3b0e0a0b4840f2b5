"""Caches as vLLM makes them on GPUs, here on the CPU."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheTensor, create_kv_cache_views
from vllm.v1.kv_cache_layout import KVCacheLayout


def caches(
    layout: KVCacheLayout,
    *,
    layers: int = 1,
    blocks: int = 8,
    heads: int = 3,
    block: int = 16,
    size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """Return one view ``[blocks, heads, block, 2 size]`` per layer by vLLM's own function."""
    spec = FullAttentionSpec(block_size=block, num_kv_heads=heads, head_size=size, dtype=dtype)
    page = heads * block * 2 * size * dtype.itemsize
    order = layout.stride_order
    sizes = dict(enumerate((layers, blocks, heads, block, 2 * size * dtype.itemsize)))
    strides, inner = {}, 1
    for axis in reversed(order):
        strides[axis], inner = inner, inner * sizes[axis]
    placed = KVCacheTensor(
        size=inner,
        layers=[str(i) for i in range(layers)],
        layer_stride=strides[0],
        block_stride=strides[1],
    )
    assert inner == layers * blocks * page
    raw = torch.zeros(inner, dtype=torch.int8)
    return create_kv_cache_views(raw, spec, blocks, layout, placed)


def fill(views: list[Tensor], seed: int = 0) -> None:
    """Fill caches with numbers that don't repeat."""
    generator = torch.Generator().manual_seed(seed)
    for view in views:
        view.copy_(torch.randn(view.shape, generator=generator))


def bits(x: Tensor) -> Tensor:
    """Return the bytes of a tensor: NaN equals NaN."""
    return x.contiguous().view(torch.uint8)


def ascending(shape: tuple[int, ...], among: int, seed: int = 0) -> Tensor:
    """Return ascending slots ``shape`` below ``among``, as a compaction chooses them."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(*shape[:-1], among, generator=generator)
    slots = keys.argsort(-1)[..., : shape[-1]].sort(-1).values
    assert all(bool((a < b).all()) for a, b in pairwise(slots.unbind(-1)))
    return slots
