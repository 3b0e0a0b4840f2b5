"""Blocks of vLLM's CPU backend: read and written exactly, and by strided copies."""

from __future__ import annotations

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from kvsieve.engines.vllm.cpu import CPUTiles, permutations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128])
def test_what_vllm_wrote_is_read_and_written_back(dtype: torch.dtype, size: int, D: int) -> None:
    isa, H, P = _get_attn_isa(dtype, size, D, "auto"), 3, 4
    key, value = torch.randn(2, P * size, H, D).to(dtype)
    cache = torch.zeros(P + 2, H, size, 2 * D, dtype=dtype)
    keys, values = cache.view(P + 2, H, 2 * size, D).chunk(2, dim=2)
    blocks = torch.tensor([5, 0, 3, 1])
    slots = (blocks[:, None] * size + torch.arange(size)).flatten()
    ops.cpu_attn_reshape_and_cache(
        key, value, keys, values, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    tiles = CPUTiles(D, isa)
    got = tiles.read(cache, blocks)
    assert torch.equal(got[0][0], key.transpose(0, 1))
    assert torch.equal(got[1][0], value.transpose(0, 1))
    again = torch.full_like(cache, 7.0)
    tiles.write(again, blocks, *got)
    assert torch.equal(again[blocks], cache[blocks])
    rest = torch.tensor([2, 4])
    assert bool((again[rest] == 7).all()), "other blocks are left alone"
    tiles.poison(again, rest)
    assert bool(again[rest].isnan().all()) and not bool(again[blocks].isnan().any())
    assert all(order.axes is not None for order in permutations(dtype, size, D, isa))
