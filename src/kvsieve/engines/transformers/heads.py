"""Measuring how a model's heads behave, on probes with known answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvsieve.behaviours import Behaviours, HeadObserver, Probe, averaged
from kvsieve.compose import Recipe
from kvsieve.engines.transformers import Cache
from kvsieve.errors import RecipeError


@torch.no_grad()
def measure_heads(model: Any, probes: Sequence[Probe]) -> Behaviours:
    """Return how much each KV head copies and gathers, averaged over ``probes``.

    Every probe costs one forward over its prompt and answer, with the full cache.

    Raises:
        RecipeError: no probes.
        EngineError: a model whose cache can't be followed.
    """
    if not probes:
        raise RecipeError("Measuring heads takes 1 probe or more.")
    observers = []
    for probe in probes:
        observer = HeadObserver(probe=probe)
        ids = torch.tensor([[*probe.prompt, *probe.answer]], device=model.device)
        # The prompt's last token writes the answer's first.
        split = len(probe.prompt) - 1
        with Cache(model, Recipe(method="heads", scorer=observer)) as cache:
            model(ids[:, :split], past_key_values=cache)
            model(ids[:, split:-1], past_key_values=cache)
        observers.append(observer)
    return averaged(observers)
