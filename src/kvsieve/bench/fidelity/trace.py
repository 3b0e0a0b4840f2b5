"""Following a text token by token (teacher forcing), and what every layer puts out meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicCache

from kvsieve.bench.fidelity.texts import Text
from kvsieve.compose import Recipe
from kvsieve.engines.transformers import Cache
from kvsieve.engines.transformers.inspection import ModelView
from kvsieve.errors import EngineError
from kvsieve.report import Report


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What came out after each of T tokens of the continuation was fed, on the CPU in fp32.

    ``logits [T, V]``; ``outputs [T, L, C]`` of whole layers; ``attention [T, A, C]`` of the
    attention modules (A of the L layers have one).
    """

    logits: Tensor
    outputs: Tensor
    attention: Tensor


class Probe:
    """Notes what layers and attention modules put out for the last token of a forward."""

    def __init__(self, model: Any) -> None:
        view = ModelView(model)
        layers = getattr(view.decoder, "layers", None)
        if layers is None:
            raise EngineError(f"{type(model).__name__} shows no list of layers to look at.")
        self._modules = {"outputs": list(layers)}
        self._modules["attention"] = [view.modules[index] for index in sorted(view.modules)]
        self._seen: dict[tuple[str, int], Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Probe:
        for kind, modules in self._modules.items():
            for index, module in enumerate(modules):
                self._hooks.append(module.register_forward_hook(self._note(kind, index)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _note(self, kind: str, index: int) -> Any:
        def note(module: Any, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            # A method that repeats the prompt runs layers again: the first run is the forward's.
            self._seen.setdefault((kind, index), first[0, -1].float().cpu())

        return note

    def start(self) -> None:
        """Forget the forward before."""
        self._seen.clear()

    def read(self, kind: str) -> Tensor:
        """Return "outputs" or "attention" of the forward, ``[L, C]``."""
        return torch.stack([self._seen[kind, i] for i in range(len(self._modules[kind]))])


def stock(model: Any, text: Text) -> Trace:
    """Follow a text with Transformers' own cache and attention."""
    return _follow(model, text, DynamicCache(config=model.config))


def compressed(model: Any, text: Text, recipe: Recipe) -> tuple[Trace, Report]:
    """Follow a text under a recipe: the prefix at once, then token by token.

    Raises:
        BudgetError: the budget is too small for the prefix.
        EngineError, UnsupportedSignal: the model can't be compressed that way.
    """
    with Cache(model, recipe) as cache:
        return _follow(model, text, cache), cache.report


@torch.no_grad()
def _follow(model: Any, text: Text, cache: Any) -> Trace:
    device = model.device
    model(text.prefix.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits, outputs, attention = [], [], []
    with Probe(model) as probe:
        for token in text.continuation.to(device).split(1, dim=1):
            probe.start()
            out = model(token, past_key_values=cache, use_cache=True)
            logits.append(out.logits[0, -1].float().cpu())
            outputs.append(probe.read("outputs"))
            attention.append(probe.read("attention"))
    return Trace(
        logits=torch.stack(logits),
        outputs=torch.stack(outputs),
        attention=torch.stack(attention),
    )
