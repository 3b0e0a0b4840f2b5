"""Rows of paged caches in the layouts of vLLM's GPU backends: torch, and Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged import ascending, bits, caches, fill
from torch import Tensor
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvsieve.engines.vllm.gather import Mover, TorchMover, TritonMover, compact
from kvsieve.engines.vllm.layouts import Strided
from kvsieve.errors import EngineError

BLOCKS = torch.tensor([[5, 0, 3, 1], [7, 2, 6, 4]])
"""Two requests of four blocks, in no order."""


@pytest.fixture(params=[TorchMover, TritonMover])
def mover(request: pytest.FixtureRequest) -> Mover:
    """Return either implementation."""
    return request.param()


def naive(cache: Tensor, blocks: Tensor, slots: Tensor) -> Tensor:
    """Compact one layer by loops that read all before they write; return the new cache."""
    new, b = cache.clone(), cache.shape[2]
    for request, head, row in torch.cartesian_prod(*map(torch.arange, slots.shape)).tolist():
        slot = int(slots[request, head, row])
        old = cache[blocks[request, slot // b], head, slot % b]
        new[blocks[request, row // b], head, row % b] = old
    return new


SHAPES: list[dict[str, Any]] = [
    {"dtype": torch.float32, "size": 64, "block": 16},
    {"dtype": torch.bfloat16, "size": 128, "block": 32},
    {"dtype": torch.float16, "size": 80, "block": 48},
    {"dtype": torch.float32, "size": 32, "block": 128, "heads": 1},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['dtype']}-{s['size']}-{s['block']}")
@pytest.mark.parametrize("layout", KVCacheLayout, ids=lambda layout: layout.name)
def test_compaction_in_place(mover: Mover, layout: KVCacheLayout, shape: dict[str, Any]) -> None:
    """Sources and destinations overlap; NaN where nothing is read; other blocks are left alone."""
    views = caches(layout, layers=2, blocks=9, **shape)
    fill(views)
    views[0][8] = views[1][8] = torch.nan  # nobody's
    H, b = views[0].shape[1:3]
    slots = ascending((2, 2, H, 2 * b), 4 * b)
    for layer, chosen in zip(views, slots, strict=True):
        read = torch.zeros(2, H, 4 * b, dtype=torch.bool).scatter_(2, chosen, True)
        unread = ~read.view(2, H, 4, b).transpose(1, 2).flatten(0, 1)
        layer[BLOCKS.flatten()] = layer[BLOCKS.flatten()].masked_fill(unread[..., None], torch.nan)
    wanted = [naive(v, BLOCKS, s) for v, s in zip(views, slots, strict=True)]
    compact(mover, views, BLOCKS, slots)
    for view, want in zip(views, wanted, strict=True):
        assert torch.equal(bits(view), bits(want))
        assert not bool(view[BLOCKS[:, :2]].isnan().any()), "what is kept was never poison"


def test_rows_that_move_by_less_than_a_program_holds(mover: Mover) -> None:
    """Each row moves onto one that is still to be read."""
    [view] = caches(KVCacheLayout.LBNHC, block=16, size=64)
    fill([view])
    slots = torch.arange(1, 64).expand(1, 2, 3, 63)
    want = naive(view, BLOCKS, slots[0])
    compact(mover, [view], BLOCKS, slots)
    assert torch.equal(view, want)


@pytest.mark.parametrize("layout", KVCacheLayout, ids=lambda layout: layout.name)
def test_tiles_read_what_backends_write(mover: Mover, layout: KVCacheLayout) -> None:
    """Both backends take a cache apart by ``transpose(1, 2).split(D)``, and index slots so."""
    _, view = caches(layout, layers=2, size=80, dtype=torch.bfloat16)
    tiles, blocks = Strided(80, mover), BLOCKS[0]
    tiles.check(view)
    key, value = torch.randn(2, 64, 3, 80).bfloat16()
    at = (blocks[:, None] * 16 + torch.arange(16)).flatten()
    for own, new in zip(view.transpose(1, 2).split(80, -1), (key, value), strict=True):
        own[at // 16, at % 16] = new
    got = tiles.read(view, blocks)
    assert torch.equal(got[0][0], key.transpose(0, 1))
    assert torch.equal(got[1][0], value.transpose(0, 1))
    _, again = caches(layout, layers=2, size=80, dtype=torch.bfloat16)
    again.fill_(7.0)
    tiles.write(again, blocks, *got)
    assert torch.equal(again[blocks], view[blocks])
    rest = BLOCKS[1]
    assert bool((again[rest] == 7).all()), "other blocks are left alone"
    tiles.poison(again, rest)
    assert bool(again[rest].isnan().all()) and not bool(again[blocks].isnan().any())


def test_caches_that_hold_something_else_are_refused() -> None:
    tiles = Strided(64, TorchMover())
    for wrong in (
        torch.zeros(4, 2, 16, 2 * 64 + 8, dtype=torch.bfloat16),  # scales packed behind
        torch.zeros(4, 2, 16, 2 * 64, dtype=torch.uint8),  # quantized
        torch.zeros(2, 4, 16, 2, 64),  # vLLM before 0.31
    ):
        with pytest.raises(EngineError, match="--kv-cache-dtype"):
            tiles.check(wrong)


def test_layers_of_unequal_layout_are_not_moved_together() -> None:
    mixed = [caches(KVCacheLayout.LBHNC)[0], caches(KVCacheLayout.LBNHC)[0]]
    with pytest.raises(ValueError, match="equal shapes, strides"):
        TritonMover().take(mixed, BLOCKS)
