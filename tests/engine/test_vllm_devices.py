"""On a device of its own, vLLM's side never mixes tensors, and decides as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvsieve
from kvsieve.engines.vllm.beside import Places, Writes
from kvsieve.engines.vllm.effective import ENGINE, effective
from kvsieve.engines.vllm.gather import TorchMover
from kvsieve.engines.vllm.layer import Work
from kvsieve.engines.vllm.layouts import Strided
from kvsieve.engines.vllm.metrics import Tally
from kvsieve.engines.vllm.moving import MovingSieve
from kvsieve.engines.vllm.plan import Row, plan
from kvsieve.registry import methods
from kvsieve.step import LayerInfo

from .elsewhere import elsewhere

BLOCK, H, G, D = 16, 2, 2, 16
OWN: dict[str, dict[str, Any]] = {
    "g-kv": {"interval": 32},
    "r-kv": {"interval": 32},
    "expected-attention": {"adaptive": False, "interval": 32, "future": 64},
    "laprox": {"scope": "head", "schedule": "after-prefill|every:32"},
    "distinct-keys": {"adaptive": False, "history": 0, "schedule": "after-prefill|every:32"},
}
METHODS = sorted(name for name, entry in methods().items() if ENGINE in entry.engines)
FORWARDS = [(50, 30), (20, 40), *[(1, 1)] * 40]
"""Two requests: tokens of each in every forward."""
PROMPTS = (70, 60)


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation tables made where the positions are."""
    speeds = 0.1 ** torch.arange(D // 2, device=positions.device).float()
    angles = positions.float()[..., None] * speeds
    return angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)


def served(name: str, device: torch.device) -> dict[str, Any]:
    """Follow two requests over all forwards on ``device``; return the positions kept."""
    torch.manual_seed(0)
    options = OWN.get(name, {"schedule": "after-prefill|every:32"})
    made = effective(kvsieve.recipe(name, budget=48, **options), BLOCK)
    assert made.recipe.scorer is not None
    window, places = made.recipe.scorer.window, Places()
    projection = torch.randn(H, G, D, 24).to(device)
    info = LayerInfo(ordinal=0, heads=H, output_projection=lambda: projection, rotary=rotary)
    layer = MovingSieve(
        made.recipe, info, Strided(D, TorchMover()), Tally(), heads=H, scale=D**-0.5
    )
    cache = torch.randn(24, H, BLOCK, 2 * D).to(device)
    table = torch.randperm(24).view(2, 12).int().to(device)
    done = [0, 0]
    for counts in FORWARDS:
        rows = [
            Row(
                index=i, key=str(i), n0=done[i], n1=done[i] + counts[i], prompt=PROMPTS[i],
                start=i * counts[0],
            )
            for i in range(2)
        ]  # fmt: skip
        done = [row.n1 for row in rows]
        query = torch.randn(sum(counts), H * G, D).to(device)
        work = Work(plan=plan(made.columns, rows), table=table, gone=[])
        if window:
            work.writes = Writes.of(work.plan, places, window, query.device)
            work.place, work.places = dict(places.of), places.size
        layer.after_attention(query, cache, work)
    assert layer.tally.evicted > 0
    held = layer.beside.requests
    return {key: one.columns["position"].cpu().tolist() for key, one in held.items()} | {
        "cache": cache.cpu().tolist()
    }


@pytest.mark.parametrize("name", METHODS)
def test_decided_elsewhere_as_here(name: str) -> None:
    here = served(name, torch.device("cpu"))
    with elsewhere() as device:
        there = served(name, device)
    assert here == there


def test_mixed_devices_would_be_noticed() -> None:
    here = torch.arange(3)
    with elsewhere() as device:
        there = here.to(device)
        for mixed in (
            lambda: there + here,
            lambda: here.index_select(0, there),
            lambda: torch.cat([there, here]),
            lambda: here[there],
        ):
            with pytest.raises(RuntimeError, match="meets one that is elsewhere"):
                mixed()
        there[here] = 7  # allowed, as on CUDA
        assert (there + torch.tensor(1)).cpu().tolist() == [8, 8, 8]
        assert there.device != here.device and bool((there == 7).all())
