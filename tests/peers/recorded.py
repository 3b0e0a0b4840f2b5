"""The golden vectors, and kvsieve's parts fed with the inputs that were recorded with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kvsieve import Recipe
from kvsieve.session import Session
from kvsieve.step import LayerInfo, Step
from kvsieve.store import Store

VECTORS = Path(__file__).parent / "vectors"


@cache
def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a file's tensors and the parameters in its header."""
    with safe_open(VECTORS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["parameters"])


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One layer's inputs: ``query [B, H, G, S, D]``, ``key``, ``value [B, H, S, D]``."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    info: LayerInfo
    live: Tensor | None = None

    def row(self, b: int) -> Recorded:
        """Return one row alone."""
        span = slice(b, b + 1)
        return Recorded(
            query=self.query[span],
            key=self.key[span],
            value=self.value[span],
            scale=self.scale,
            info=self.info,
        )

    def part(self, start: int, end: int) -> Recorded:
        """Return the tokens ``start .. end - 1``."""
        return Recorded(
            query=self.query[:, :, :, start:end],
            key=self.key[:, :, start:end],
            value=self.value[:, :, start:end],
            scale=self.scale,
            info=self.info,
            live=None if self.live is None else self.live[:, start:end],
        )


def kvpress_layers(name: str) -> list[Recorded]:
    """Return the two layers of a kvpress file."""
    tensors, header = load(name)
    angles = tensors["inv_freq"].double()

    def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
        turned = positions[..., None].double() * angles
        doubled = torch.cat([turned, turned], -1)
        return doubled.cos().float(), doubled.sin().float()

    layers = []
    for i in range(2):
        query, key, value = (tensors[f"layer{i}.{x}"] for x in ("query", "key", "value"))
        _, H, G, _, D = query.shape
        w_o = tensors[f"layer{i}.w_o"].view(-1, H, G, D).permute(1, 2, 3, 0)  # [H, G, D, C]
        layers.append(
            Recorded(
                query=query,
                key=key,
                value=value,
                scale=header["scaling"],
                info=LayerInfo(ordinal=i, output_projection=lambda w=w_o: w, rotary=rotary),
            )
        )
    return layers


def prefilled(recipe: Recipe, layer: Recorded) -> tuple[Step, Store]:
    """Return what a scorer is given after one forward over the prompt."""
    assert recipe.scorer is not None
    store = Store(recipe.scorer.columns)
    positions = store.append(layer.key, layer.value, layer.live)
    step = Step(
        layer=layer.info,
        query=layer.query,
        scale=layer.scale,
        positions=positions,
        live=layer.live,
        prefill=True,
    )
    recipe.scorer.observe(step, store)
    return step, store


def score(recipe: Recipe, layer: Recorded) -> Tensor:
    """Return the recipe's scores ``[B, H, S]`` of a prompt."""
    assert recipe.scorer is not None
    return recipe.scorer.score(*prefilled(recipe, layer))


def forward(session: Session, layers: list[Recorded]) -> None:
    """Feed all layers the same tokens."""
    session.begin(layers[0].key.shape[2], layers[0].live, None)
    for i, layer in enumerate(layers):
        session.append(i, layer.key, layer.value)
        session.attend(i, layer.query, layer.scale)
    session.end()


def held(session: Session, width: int) -> Tensor:
    """Return which positions each layer holds, bool ``[L, B, H, width]``."""
    return torch.stack([positions_of(x.store, width) for x in session.layers])


def positions_of(store: Store, width: int) -> Tensor:
    """Return which positions a table holds, bool ``[B, H, width]``."""
    B, H = store.counts.shape
    position = store["position"].long().expand(B, H, -1)
    live = torch.ones_like(position, dtype=torch.bool) if store.live is None else store.live
    mask = torch.zeros(B, H, width, dtype=torch.int64)
    return mask.scatter_add(2, position, live.expand(B, H, -1).long()) == 1


def kept(recipe: Recipe, layers: list[Recorded]) -> Tensor:
    """Return what stays of a prompt, bool ``[L, B, H, S]``."""
    session = Session(recipe, [layer.info for layer in layers])
    forward(session, layers)
    return held(session, layers[0].key.shape[2])
