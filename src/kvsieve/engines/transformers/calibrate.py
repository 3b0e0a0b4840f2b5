"""Measuring a model on text: what `kvsieve calibrate` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvsieve.collector import Collector
from kvsieve.compose import Recipe
from kvsieve.engines.transformers import Cache
from kvsieve.engines.transformers.engine import installation
from kvsieve.errors import RecipeError
from kvsieve.statistics import Statistics


def calibrate(
    model: Any,
    passages: Iterable[Tensor | Sequence[int]],
    *,
    sinks: int = 4,
    first: int = 128,
    recent: int = 256,
    on_passage: Callable[[int], None] | None = None,
) -> Statistics:
    """Measure a model's queries and heads on passages of text; see ``kvsieve.collector``.

    Args:
        model: any causal language model of Transformers >= 5.2.
        passages: token ids of each, ``[n]`` or ``[1, n]``; each is read by itself.
        sinks: first tokens of each passage whose queries are left out.
        first, recent: what a head's output without all other tokens is compared with.
        on_passage: called with the number of tokens read so far.

    Raises:
        EngineError, UnsupportedSignal: a model that can't be measured.
        RecipeError: too little text, or a passage that isn't one.
    """
    collector = Collector(sinks=sinks, first=first, recent=recent)
    recipe = Recipe(method="calibrate", scorer=collector)
    view = installation(model).view
    view.check(recipe)
    device, tokens, count = next(view.decoder.parameters()).device, 0, 0
    for count, passage in enumerate(passages, start=1):
        ids = torch.as_tensor(passage, dtype=torch.int64).reshape(1, -1).to(device)
        if not ids.numel():
            raise RecipeError(f"calibrate: passage {count} has no tokens.")
        with Cache(model, recipe) as cache, torch.no_grad():
            view.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        tokens += ids.numel()
        if on_passage is not None:
            on_passage(tokens)
    return collector.statistics(view.identity(), tokens=tokens, passages=count)
