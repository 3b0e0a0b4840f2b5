"""kvpress 0.5.5 where statistics are given, and where keys move: scores, kept sets, keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import kvsieve
from kvsieve import Recipe
from kvsieve.collector import Collector
from kvsieve.session import Session
from kvsieve.statistics import Identity, Statistics
from kvsieve.store.rope import rotate, unrotate

from .recorded import Recorded, forward, held, kept, kvpress_layers, load, score

S, HALF, QUARTER, WINDOW = 96, 48, 24, 12
KINDS = ["llama", "qwen3"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def recorded(kind: str) -> tuple[dict[str, Tensor], list[Recorded]]:
    return load(f"kvpress_calibrated_{kind}")[0], kvpress_layers(f"kvpress_{kind}")


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def statistics(kind: str) -> Statistics:
    """kvpress's statistics, filters and gates as a file of `kvsieve calibrate` would hold them."""
    tensors, layers = recorded(kind)
    _, H, G, _, D = layers[0].query.shape
    return Statistics(
        tensors={
            "query_mean": tensors["query_mean"].view(2, H, G, D),
            "query_covariance": tensors["query_covariance"].view(2, H, G, D, D),
            "query_filter": -tensors["filters"],  # kvpress scores by the opposite direction
            "head_gate": tensors["gates"],
        },
        identity=None,
        source="kvpress",
    )


@each_kind
def test_calibration_measures_what_kvpress_measures(kind: str) -> None:
    tensors, layers = recorded(kind)
    collector = Collector(sinks=4)
    recipe = Recipe(method="calibrate", scorer=collector)
    for b in range(2):
        forward(Session(recipe, [x.info for x in layers]), [x.row(b) for x in layers])
    _, H, G, _, D = layers[0].query.shape
    who = Identity(architecture="", layers=2, heads=H, group=G, head_dim=D, sample=torch.zeros(1))
    got = collector.statistics(who).tensors
    near(got["query_mean"].flatten(1, 2), tensors["query_mean"])
    near(got["query_covariance"].flatten(1, 2), tensors["query_covariance"])


EXPECTED: dict[str, tuple[dict[str, Any], int]] = {
    "stats": ({"epsilon": 0.0, "adaptive": False}, HALF),
    "stats_nocov": ({"epsilon": 0.0, "adaptive": False, "covariance": False}, HALF),
    "adakv_stats": ({}, HALF),
    "adakv_expected": ({}, HALF),
    "adakv_expected_75": ({}, QUARTER),
}


@each_kind
@pytest.mark.parametrize("case", EXPECTED)
def test_expected_attention(case: str, kind: str) -> None:
    """The defaults are the evaluated configuration: AdaKV with floor 0.2 and epsilon 0.01."""
    tensors, layers = recorded(kind)
    options, budget = EXPECTED[case]
    stats = statistics(kind) if "stats" in case else None
    recipe = kvsieve.recipe("expected-attention", budget=budget, stats=stats, **options)
    name = "base_score" if case.startswith("adakv") else "score"
    for layer, want in zip(layers, tensors[f"{case}.{name}"], strict=True):
        near(score(recipe, layer)[..., 4:], want[..., 4:])
    want = tensors[f"{case}.kept"]
    assert torch.equal(kept(recipe, layers), want)
    assert (len(set(want.sum(-1).flatten().tolist())) > 1) == case.startswith("adakv")


@each_kind
def test_q_filters(kind: str) -> None:
    tensors, layers = recorded(kind)
    recipe = kvsieve.recipe("q-filters", budget=HALF, recent=0, stats=statistics(kind))
    session = Session(recipe, [x.info for x in layers])
    forward(session, layers)
    for i, layer in enumerate(layers):
        near(score(recipe, layer), tensors["qfilter.score"][i])
    assert torch.equal(held(session, S), tensors["qfilter.kept"])


@each_kind
@pytest.mark.parametrize("streaming", [1, 2, 3])
def test_duo_attention(streaming: int, kind: str) -> None:
    """Of four heads, kvpress makes some streaming; we get the budget that this comes to."""
    tensors, layers = recorded(kind)
    budget = (streaming * 20 + (4 - streaming) * S) // 4
    assert budget * 4 == streaming * 20 + (4 - streaming) * S
    recipe = kvsieve.recipe(
        "duo-attention", budget=budget, sinks=4, recent=16, stats=statistics(kind)
    )
    assert torch.equal(kept(recipe, layers), tensors[f"duo_{25 * streaming}.kept"])


def keys_from_zero(session: Session, layers: list[Recorded]) -> Tensor:
    """The cached keys, turned as if they stood at 0 .. n - 1: ``[L, B, H, n, D]``."""
    out = []
    for layer, state in zip(layers, session.layers, strict=True):
        keys, n = state.store.keys, state.store.slots
        place = torch.arange(n).expand(keys.shape[:3])
        assert torch.equal(state.store.standing.long(), place + S - n)
        assert layer.info.rotary is not None
        plain = unrotate(keys, *layer.info.rotary(place + S - n))
        out.append(rotate(plain, *layer.info.rotary(place)))
    return torch.stack(out)


FINCH: dict[str, tuple[dict[str, Any], int]] = {
    "finch": ({}, HALF),
    "finch_75": ({}, QUARTER),
    "finch_plain": ({"normalise": False}, HALF),
    "finch_chunks": ({"chunk": 48}, HALF),
}


@each_kind
@pytest.mark.parametrize("case", FINCH)
def test_finch(case: str, kind: str) -> None:
    tensors, layers = recorded(kind)
    options, budget = FINCH[case]
    recipe = kvsieve.recipe("finch", budget=budget, window=WINDOW, **options)
    whole = kvsieve.recipe("finch", budget=budget, window=WINDOW, **options | {"chunk": 0})
    for layer, want in zip(layers, tensors[f"{case}.score"], strict=True):
        near(score(whole, layer)[..., : S - WINDOW], want[..., : S - WINDOW])
    session = Session(recipe, [x.info for x in layers])
    forward(session, layers)
    assert torch.equal(held(session, S), tensors[f"{case}.kept"])
    near(keys_from_zero(session, layers), tensors[f"{case}.keys"])


@each_kind
def test_key_rerotation(kind: str) -> None:
    tensors, layers = recorded(kind)
    recipe = kvsieve.recipe("knorm", budget=HALF, rerotate=True)
    session = Session(recipe, [x.info for x in layers])
    forward(session, layers)
    assert torch.equal(held(session, S), tensors["rerotated.kept"])
    near(keys_from_zero(session, layers), tensors["rerotated.keys"])
