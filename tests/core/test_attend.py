"""Attention over tables against a softmax written out in fp64, slot by slot."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from kvsieve.store import Layout, Store, attend
from kvsieve.store.attend import query_blocks

B, H, G, D = 2, 2, 3, 8
SCALE = D**-0.5

# The package shows the function of that name: the module has to be asked for.
MODULE = import_module("kvsieve.store.attend")


def softmax_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One query at a time: ``query [B, H, G, T, D]``, ``visible [B, H, T, S]`` bool."""
    query, keys, values = query.double(), keys.double(), values.double()
    out = torch.zeros(*query.shape[:4], values.shape[-1], dtype=torch.float64)
    for b, h, g, t in torch.cartesian_prod(*(torch.arange(n) for n in query.shape[:4])).tolist():
        logits, chosen = [], [s for s in range(keys.shape[2]) if visible[b, h, t, s]]
        for s in chosen:
            dot = float(query[b, h, g, t] @ keys[b, h, s]) * SCALE
            logits.append(dot if softcap is None else softcap * math.tanh(dot / softcap))
        if not chosen:
            continue
        total = sum(math.exp(x) for x in logits)
        if sinks is not None:
            total += math.exp(float(sinks[h, g]))
        for x, s in zip(logits, chosen, strict=True):
            out[b, h, g, t] += math.exp(x) / total * values[b, h, s]
    return out


def close(got: Tensor, wanted: Tensor) -> None:
    """Compare an fp32 result with the fp64 reference, to fp32's accuracy."""
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def draw(T: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, H, G, T, D) * 2, torch.randn(B, H, S, D) * 2, torch.randn(B, H, S, 5)


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sinks": {"sinks": torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, -3.0]])},
    "softcap": {"softcap": 1.5},
    "both": {"sinks": torch.full((H, G), 0.7), "softcap": 3.0},
}
extras = pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)


@extras
@pytest.mark.parametrize("elements", [1, 70, 1 << 24])
def test_causal_masked_and_whole(
    extra: dict[str, Any], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "BLOCK_ELEMENTS", elements)
    query, keys, values = draw(6, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(B, H, 6, 6)
    got = attend(query, keys, values, SCALE, causal=True, **extra)
    close(got, softmax_rows(query, keys, values, causal, **extra))
    some = (torch.rand(B, H, 6, 6) < 0.5) | torch.eye(6, dtype=torch.bool)
    got = attend(query, keys, values, SCALE, visible=lambda a, b: some[:, :, a:b], **extra)
    close(got, softmax_rows(query, keys, values, some, **extra))
    everything = torch.ones(B, H, 6, 6, dtype=torch.bool)
    got = attend(query, keys, values, SCALE, **extra)
    close(got, softmax_rows(query, keys, values, everything, **extra))


@pytest.mark.parametrize("masked", [False, True])
def test_long_tables_are_read_the_same_way(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = draw(1, 9)
    some = torch.rand(B, H, 1, 9) < 0.6 if masked else torch.ones(B, H, 1, 9, dtype=torch.bool)
    some[..., 0] = True
    visible = (lambda a, b: some) if masked else None
    fused = attend(query, keys, values, SCALE, visible=visible)
    monkeypatch.setattr(MODULE, "LONG", 1)
    # The products take this path, and the fused kernel must not be called.
    monkeypatch.setattr(MODULE.F, "scaled_dot_product_attention", None)
    products = attend(query, keys, values, SCALE, visible=visible)
    torch.testing.assert_close(products, fused, rtol=1e-5, atol=1e-6)
    close(products, softmax_rows(query, keys, values, some))


def test_blocks_cover_every_query_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "BLOCK_ELEMENTS", 100)
    assert list(query_blocks(10, 30)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(query_blocks(3, 1000)) == [(0, 1), (1, 2), (2, 3)]
    assert list(query_blocks(5, 0)) == [(0, 5)]


# -- whole tables


def filled(layout: Layout, padding: bool, ragged: bool) -> Store:
    """A store that has seen 7 tokens per row (some of them padding) and lost some."""
    store = Store((), layout)
    live = torch.ones(B, 7, dtype=torch.bool)
    if padding:
        live[1, :3] = False
    store.append(torch.randn(B, H, 7, D), torch.randn(B, H, 7, 5), live if padding else None)
    if ragged:
        counts = torch.tensor([[3, 5], [2, 4]])
        index = torch.tensor(
            [[[1, 2, 4, 0, 0], [0, 2, 3, 5, 6]], [[3, 6, 0, 0, 0], [3, 4, 5, 6, 0]]]
        )
        store.keep(index, counts)
    return store


def seen_by(store: Store, positions: Tensor) -> Tensor:
    """Which slots a query may see ``[B, H, T, S]``, from positions and liveness alone."""
    S, T = store.slots, positions.shape[1]
    position = store["position"].expand(B, H, S)
    live = torch.ones(B, H, S, dtype=torch.bool) if store.live is None else store.live
    live = live.expand(B, H, S)
    out = torch.zeros(B, H, T, S, dtype=torch.bool)
    for b, h, t, s in torch.cartesian_prod(*(torch.arange(n) for n in out.shape)).tolist():
        out[b, h, t, s] = bool(live[b, h, s]) and int(position[b, h, s]) <= int(positions[b, t])
    return out


@extras
@pytest.mark.parametrize("layout", ["dense", "ragged"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("T", [1, 4])
def test_tables_mask_themselves(
    extra: dict[str, Any], layout: Layout, padding: bool, removed: bool, T: int
) -> None:
    store = filled(layout, padding, removed)
    query = torch.randn(B, H, G, T, D) * 2
    new = torch.ones(B, T, dtype=torch.bool)
    if padding and T > 1:
        new[0, 2:] = False  # right padding in a later turn
    live = None if bool(new.all()) else new
    positions = store.append(torch.randn(B, H, T, D), torch.randn(B, H, T, 5), live)
    got = store.attend(query, SCALE, positions, live, **extra)
    assert got.isfinite().all(), "padding's output is never used, but spreads if it is NaN"
    keys, values = store.keys.nan_to_num(0), store.values.nan_to_num(0)
    wanted = softmax_rows(query, keys, values, seen_by(store, positions), **extra)
    for b in range(B):
        close(got[b][:, :, new[b]], wanted[b][:, :, new[b]])


@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_first_forward_is_causal(layout: Layout) -> None:
    store, query = Store((), layout), torch.randn(B, H, G, 5, D)
    positions = store.append(torch.randn(B, H, 5, D), torch.randn(B, H, 5, 5))
    got = store.attend(query, SCALE, positions, None)
    wanted = softmax_rows(query, store.keys, store.values, seen_by(store, positions))
    close(got, wanted)


@extras
@pytest.mark.parametrize("elements", [1, 1 << 24])
def test_first_forward_with_left_padding(
    extra: dict[str, Any], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "BLOCK_ELEMENTS", elements)
    store, query = Store(), torch.randn(B, H, G, 5, D) * 2
    live = torch.tensor([[False, False, True, True, True], [True] * 5])
    positions = store.append(torch.randn(B, H, 5, D), torch.randn(B, H, 5, 5), live)
    got = store.attend(query, SCALE, positions, live, **extra)
    assert got.isfinite().all()
    wanted = softmax_rows(query, store.keys, store.values, seen_by(store, positions), **extra)
    for b in range(B):
        close(got[b][:, :, live[b]], wanted[b][:, :, live[b]])


@pytest.mark.parametrize("T", [1, 3])
def test_heads_that_lost_everything_still_see_the_new(T: int) -> None:
    store = Store((), "ragged")
    store.append(torch.randn(B, H, 4, D), torch.randn(B, H, 4, 5))
    counts = torch.tensor([[0, 2], [1, 0]])
    store.keep(torch.tensor([[[0, 0], [1, 2]], [[3, 0], [0, 0]]]), counts)
    query = torch.randn(B, H, G, T, D)
    positions = store.append(torch.randn(B, H, T, D), torch.randn(B, H, T, 5))
    got = store.attend(query, SCALE, positions, None)
    wanted = softmax_rows(query, store.keys, store.values, seen_by(store, positions))
    close(got, wanted)


def test_expanded_latents_have_a_head_per_query_head() -> None:
    store = Store()
    positions = store.append(torch.randn(B, 1, 5, D), torch.randn(B, 1, 5, 4))
    query = torch.randn(B, 1, 4, 5, D)
    keys, values = torch.randn(B, 4, 5, D), torch.randn(B, 4, 5, 6)
    got = store.attend(query, SCALE, positions, None, keys=keys, values=values)
    causal = torch.ones(5, 5, dtype=torch.bool).tril().expand(B, 4, 5, 5)
    wanted = softmax_rows(query.view(B, 4, 1, 5, D), keys, values, causal)
    close(got, wanted.view(B, 1, 4, 5, 6))


@extras
def test_bfloat16_is_as_good_as_its_rounding(extra: dict[str, Any]) -> None:
    query, keys, values = (x.bfloat16() for x in draw(6, 6))
    causal = torch.ones(6, 6, dtype=torch.bool).tril().expand(B, H, 6, 6)
    got = attend(query, keys, values, SCALE, causal=True, **extra)
    assert got.dtype is torch.bfloat16
    wanted = softmax_rows(query, keys, values, causal, **extra)
    torch.testing.assert_close(got.double(), wanted, rtol=3e-2, atol=3e-2)
