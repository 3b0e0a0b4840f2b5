"""What can be timed side by side: a stock cache, a stock cache on a short context, kvsieve."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kvsieve.bench.timing import Step, forward
from kvsieve.compose import Recipe
from kvsieve.engines.transformers import Cache
from kvsieve.store.rows import storage_bytes


class Variant(Protocol):
    """A cache that is filled once and then decodes in turns with others."""

    def prefill(self) -> float:
        """Read the prompt; return the seconds."""
        ...

    def steps(self, count: int) -> list[Step]:
        """Decode tokens greedily."""
        ...

    @property
    def compress_seconds(self) -> float | None:
        """Seconds spent compressing so far; None: unknown."""
        ...

    def bytes(self) -> dict[str, int | None]:
        """Return ``bytes_full``, ``bytes_kept`` and ``bytes_peak``."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class Local:
    """A variant in this process: ``model`` reads ``prompt [B, S]`` into ``cache``."""

    def __init__(self, model: Any, prompt: Tensor, cache: Any) -> None:
        self.model, self.prompt = model, prompt
        self.cache: Any = cache
        self.position = 0

    def prefill(self) -> float:
        """Read the prompt; return the seconds."""
        token, seconds = forward(self.model, self.prompt, self.cache, None)
        self.first = self.token = token
        self.position = self.prompt.shape[1]
        return seconds

    def steps(self, count: int) -> list[Step]:
        """Decode tokens greedily."""
        return [self._step() for _ in range(count)]

    def _step(self) -> Step:
        here = torch.full_like(self.token[:1], self.position)
        before = self._events()
        self.token, seconds = forward(self.model, self.token, self.cache, here)
        self.position += 1
        return Step(seconds, self._events() > before)

    def _events(self) -> int:
        return 0


class Stock(Local):
    """Transformers' own cache and attention."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        super().__init__(model, prompt, DynamicCache(config=model.config))

    def rewind(self) -> None:
        """Forget what was decoded, so that every cell meets the same cache."""
        self.token, self.position = self.first, self.prompt.shape[1]
        for layer in self.cache.layers:
            layer.keys = layer.keys[:, :, : self.position]
            layer.values = layer.values[:, :, : self.position]

    @property
    def compress_seconds(self) -> None:
        """Nothing is compressed."""
        return None

    def bytes(self) -> dict[str, int | None]:
        """Return what is held; Transformers' own peak is not known."""
        tensors = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        held = storage_bytes(tensors)
        return {"bytes_full": held, "bytes_kept": held, "bytes_peak": None}

    def close(self) -> None:
        """Give the memory back."""
        self.cache = None


class Sieve(Local):
    """A cache under a recipe."""

    def __init__(self, model: Any, prompt: Tensor, recipe: Recipe) -> None:
        super().__init__(model, prompt, Cache(model, recipe))

    def _events(self) -> int:
        return self.cache.session.events

    @property
    def compress_seconds(self) -> float:
        """Seconds spent scoring and compacting so far."""
        return self.cache.session.watch.seconds["compress"]

    def bytes(self) -> dict[str, int | None]:
        """Return what the report measured."""
        report = self.cache.report
        return {
            "bytes_full": report.bytes_full,
            "bytes_kept": report.bytes_kept,
            "bytes_peak": report.bytes_peak,
        }

    def close(self) -> None:
        """Switch the model back and give the memory back."""
        self.cache.close()
        self.cache = None
