"""Timing of prefill and decode steps: the same loop for everything that runs in this process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One decode step; ``event``: the cache was compressed in it."""

    seconds: float
    event: bool = False


@contextmanager
def quiet() -> Iterator[None]:
    """No gradients, and no garbage collection, which would strike at some steps only."""
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            yield
    finally:
        gc.enable()


def forward(model: Any, ids: Tensor, cache: Any, positions: Tensor | None) -> tuple[Tensor, float]:
    """Run ``ids [B, T]`` and return the greedy tokens ``[B, 1]`` and the seconds it took."""
    drain(ids.device)
    start = time.perf_counter()
    out = model(
        input_ids=ids,
        past_key_values=cache,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    token = out.logits[:, -1:].argmax(-1)
    drain(ids.device)
    return token, time.perf_counter() - start


def drain(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def typical(steps: Sequence[Step]) -> float:
    """Seconds of a step: the median, and where compression strikes at some steps only, what
    those take above the median spread over all steps."""
    plain = [s.seconds for s in steps if not s.event]
    if 2 * len(plain) <= len(steps):
        return statistics.median(s.seconds for s in steps)
    median = statistics.median(plain)
    return median + sum(max(0.0, s.seconds - median) for s in steps if s.event) / len(steps)


def summary(steps: Sequence[Step]) -> dict[str, float | int]:
    """Return the figures of steps: typical, median, least, mean, how many, how many events."""
    seconds = [s.seconds for s in steps]
    return {
        "typical": typical(steps),
        "median": statistics.median(seconds),
        "min": min(seconds),
        "mean": statistics.fmean(seconds),
        "count": len(seconds),
        "events": sum(s.event for s in steps),
    }
