"""Summaries of dropped slots: moments by their definition, attention by sums over slots."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvsieve
from kvsieve.errors import RecipeError
from kvsieve.interfaces import Signal
from kvsieve.session import Session
from kvsieve.step import LayerInfo
from kvsieve.store import Layout, Store
from kvsieve.store.summary import Summarise, Summary, moments

B, H, G, D, DV = 2, 2, 3, 6, 4
SCALE = D**-0.5


def draw(S: int, T: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, H, G, T, D]``, keys and values ``[B, H, S, .]``."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    return normal(B, H, G, T, D), normal(B, H, S, D), normal(B, H, S, DV)


def keep(store: Store, chosen: list[list[list[int]]]) -> None:
    """Keep the live slots of the positions ``chosen[b][h]``."""
    counts = torch.tensor([[len(head) for head in row] for row in chosen])
    index = torch.zeros(B, H, int(counts.max()), dtype=torch.int64)
    position = store["position"].expand(B, H, -1)
    if store.live is not None:
        position = position.masked_fill(~store.live, -1)
    for b, row in enumerate(chosen):
        for h, head in enumerate(row):
            slots = [position[b, h].tolist().index(i) for i in head]
            index[b, h, : len(head)] = torch.tensor(slots)
    store.keep(index, counts)


# Rows and heads drop different slots, one head nothing; 9 slots in all.
CHOSEN = [[[0, 3, 7], [1, 2, 3, 4, 8]], [list(range(9)), [8]]]


def dropped(chosen: list[list[list[int]]], S: int) -> list[list[list[int]]]:
    return [[[i for i in range(S) if i not in head] for head in row] for row in chosen]


def definition(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mu_k, mu_v and C of ``keys [n, D]``, ``values [n, Dv]``, slot by slot in fp64."""
    keys, values = keys.double(), values.double()
    mu_k, mu_v = keys.mean(0), values.mean(0)
    each = [torch.outer(v - mu_v, k - mu_k) for k, v in zip(keys, values, strict=True)]
    return mu_k, mu_v, torch.stack(each).mean(0)


def assert_moments(summary: Summary, keys: Tensor, values: Tensor, gone: Any) -> None:
    for b in range(B):
        for h in range(H):
            n = gone[b][h]
            assert int(summary.count[b, h, 0]) == len(n)
            if n:
                wanted = definition(keys[b, h, n], values[b, h, n])
                got = (summary.key, summary.value, summary.covariance())
                for x, y in zip(got, wanted, strict=True):
                    torch.testing.assert_close(x[b, h, 0].double(), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_keep_takes_in_what_it_drops(layout: Layout) -> None:
    _, keys, values = draw(9)
    store = Store((), layout, summarise=Summarise())
    store.append(keys.clone(), values.clone())
    assert store.summary is None
    keep(store, CHOSEN)
    assert store.summary is not None
    assert_moments(store.summary, keys, values, dropped(CHOSEN, 9))


@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_in_two_goes_it_is_the_same_as_in_one(layout: Layout) -> None:
    _, keys, values = draw(9, seed=1)
    store = Store((), layout, summarise=Summarise())
    store.append(keys[:, :, :6].clone(), values[:, :, :6].clone())
    keep(store, [[[0, 3, 5], [1, 2, 3, 4]], [list(range(6)), [2, 5]]])
    store.append(keys[:, :, 6:].clone(), values[:, :, 6:].clone())
    keep(store, CHOSEN)
    assert store.summary is not None
    assert_moments(store.summary, keys, values, dropped(CHOSEN, 9))


def test_padding_is_not_summarised() -> None:
    _, keys, values = draw(9, seed=2)
    live = torch.ones(B, 9, dtype=torch.bool)
    live[1, :4] = False
    keys[1, :, :4] = values[1, :, :4] = torch.nan
    store = Store(summarise=Summarise())
    store.append(keys, values, live)
    keep(store, [[[0, 8], [7, 8]], [[2, 4], [3, 4]]])  # row 1's position 0 is token 4
    assert store.summary is not None
    gone = [[[1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6]], [[4, 5, 7], [4, 5, 6]]]
    assert_moments(store.summary, keys, values, gone)


def test_parts_are_stretches_of_positions() -> None:
    """Of 9 tokens in two parts: positions 0-4, and all from 5 on."""
    _, keys, values = draw(12, seed=3)
    store = Store(summarise=Summarise(parts=2))
    store.append(keys[:, :, :9].clone(), values[:, :, :9].clone())
    keep(store, [[[8], [8]], [[8], [8]]])
    store.append(keys[:, :, 9:].clone(), values[:, :, 9:].clone())
    keep(store, [[[11], [11]], [[11], [11]]])
    summary = store.summary
    assert summary is not None
    for n, gone in enumerate(([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])):
        mu_k, mu_v, C = definition(keys[1, 0, gone], values[1, 0, gone])
        assert int(summary.count[1, 0, n]) == len(gone)
        got = summary.key[1, 0, n], summary.value[1, 0, n], summary.covariance()[1, 0, n]
        for x, y in zip(got, (mu_k, mu_v, C), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, keys, values = draw(9, seed=4)
    chosen = torch.rand(B, H, 9, generator=torch.Generator().manual_seed(5)) < 0.6
    whole = moments(keys, values, chosen)
    monkeypatch.setattr("kvsieve.store.summary.layer_block", lambda table: 2 * B * H * D)
    for x, y in zip(moments(keys, values, chosen), whole, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# -- attention -------------------------------------------------------------------------------------


def sums(
    q: Tensor, keys: Tensor, values: Tensor, gone: list[int], held: list[int], **extra: Any
) -> Tensor:
    """(N_R + N_E) / (D_R + D_E) of one query in fp64, N_E and D_E from the moments."""
    q, keys, values = q.double(), keys.double(), values.double()
    softcap = extra.get("softcap")

    def bend(s: Tensor) -> Tensor:
        return s if softcap is None else softcap * torch.tanh(s / softcap)

    N, mass = torch.zeros(DV, dtype=torch.float64), 0.0
    for i in held:
        e = math.exp(float(bend(SCALE * q @ keys[i])))
        N, mass = N + e * values[i], mass + e
    if gone:
        mu_k, mu_v, C = definition(keys[gone], values[gone])
        s = (SCALE * q @ mu_k).requires_grad_()
        (slope,) = torch.autograd.grad(bend(s), s)  # of the logit around the mean
        e = len(gone) * math.exp(float(bend(s.detach())))
        N, mass = N + e * (mu_v + slope * SCALE * C @ q), mass + e
    if "sinks" in extra:
        mass += math.exp(extra["sinks"])
    return N / mass


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("layout", ["dense", "ragged"])
@pytest.mark.parametrize("extra", [{}, {"softcap": 1.5}, {"sinks": 0.4}], ids=str)
def test_attention_adds_the_dropped_back(layout: Layout, T: int, extra: dict[str, float]) -> None:
    query, keys, values = draw(9 + T, T, seed=6)
    store = Store((), layout, summarise=Summarise())
    store.append(keys[:, :, :9].clone(), values[:, :, :9].clone())
    keep(store, CHOSEN)
    positions = store.append(keys[:, :, 9:].clone(), values[:, :, 9:].clone())
    given: dict[str, Any] = dict(extra)
    if "sinks" in given:
        given["sinks"] = torch.full((H, G), given["sinks"])
    got = store.attend(query, SCALE, positions, None, **given)
    gone = dropped(CHOSEN, 9)
    for b, h, g, t in torch.cartesian_prod(*(torch.arange(n) for n in (B, H, G, T))).tolist():
        held = [*CHOSEN[b][h], *range(9, 10 + t)]
        wanted = sums(query[b, h, g, t], keys[b, h], values[b, h], gone[b][h], held, **extra)
        torch.testing.assert_close(got[b, h, g, t].double(), wanted, rtol=1e-4, atol=1e-5)


def outputs(
    query: Tensor, keys: Tensor, values: Tensor, chosen: Any, **how: Any
) -> tuple[Tensor, Tensor]:
    """The newest token's attention: over a table that dropped all but ``chosen``, and over all."""
    S = keys.shape[2]
    found = []
    for picked in (chosen, None):
        store = Store(summarise=Summarise(**how) if picked is not None else None)
        store.append(keys[:, :, : S - 1].clone(), values[:, :, : S - 1].clone())
        if picked is not None:
            keep(store, picked)
        positions = store.append(keys[:, :, S - 1 :].clone(), values[:, :, S - 1 :].clone())
        found.append(store.attend(query, SCALE, positions, None))
    return found[0], found[1]


def test_equal_keys_and_single_slots_are_given_back_exactly() -> None:
    query, keys, values = draw(10, seed=7)
    keys[:, :, :5] = keys[:, :, :1].clone()
    some, everything = outputs(query, keys, values, [[[5, 6, 7, 8]] * 2] * 2)
    torch.testing.assert_close(some, everything, rtol=1e-5, atol=1e-6)
    query, keys, values = draw(10, seed=8)
    some, everything = outputs(query, keys, values, [[[0, 1, 2, 4, 5, 6, 7, 8]] * 2] * 2)
    torch.testing.assert_close(some, everything, rtol=1e-5, atol=1e-6)
    apart, _ = outputs(query, keys, values, [[[0, 1, 2, 4, 5, 6, 7, 8]] * 2] * 2, added=False)
    assert (apart - everything).abs().max() > 1e-3


def test_its_error_is_of_second_order_in_the_query() -> None:
    """For values affine in the keys; without C q it would be of first order."""
    query, keys, values = draw(40, seed=9)
    keys = keys.double()
    affine = torch.randn(D, DV, generator=torch.Generator().manual_seed(10)).double()
    values = keys @ affine + 1.0
    count, mu_k, mu_v, cross = moments(keys, values, torch.ones(B, H, 40, dtype=torch.bool))
    summary = Summary(Summarise(), keys, values)
    summary.count[:, :, 0], summary.key[:, :, 0], summary.value[:, :, 0] = count, mu_k, mu_v
    summary.cross[:, :, 0] = cross
    errors: dict[bool, list[float]] = {True: [], False: []}
    for size in (0.4, 0.1):
        q = query.double() * size
        weights = (q.flatten(2, 3) @ keys.transpose(-1, -2) * SCALE).softmax(-1)
        exact = (weights @ values).view(B, H, G, 1, DV)
        for whole in errors:
            got = (
                summary.answer(q.float(), SCALE)[1][..., 0, :] if whole else mu_v[:, :, None, None]
            )
            errors[whole].append(float((got - exact).norm()))
    assert errors[True][0] / errors[True][1] > 12  # 16 for the second order
    assert errors[False][0] / errors[False][1] < 6  # 4 for the first


def test_a_query_that_looks_away_sees_only_what_is_kept() -> None:
    query, keys, values = draw(10, seed=11)
    query = 40 * query[:, :, :1].sign().expand(-1, -1, G, -1, -1).contiguous()
    keys[:, :, :5] = -query[:, :, 0].sign() + 0.1 * keys[:, :, :5]
    chosen = [[[5, 6, 7, 8]] * 2] * 2
    with_them, _ = outputs(query, keys, values, chosen)
    without, _ = outputs(query, keys, values, chosen, added=False)
    torch.testing.assert_close(with_them, without, rtol=1e-5, atol=1e-6)


# -- what must follow a batch ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_rows_move_with_their_summaries(layout: Layout) -> None:
    query, keys, values = draw(10, seed=12)
    store = Store((), layout, summarise=Summarise(parts=2))
    store.append(keys[:, :, :9].clone(), values[:, :, :9].clone())
    keep(store, CHOSEN)
    plain = store.append(keys[:, :, 9:].clone(), values[:, :, 9:].clone())
    before = store.attend(query, SCALE, plain, None)
    order = torch.tensor([1, 0, 1])
    store.select_rows(order)
    after = store.attend(query[order], SCALE, plain[order], None)
    torch.testing.assert_close(after, before[order], rtol=1e-5, atol=1e-6)


def recipe(**options: Any) -> kvsieve.Recipe:
    small = {"budget": 5, "window": 2, "kernel": 1, "sinks": 1}
    return kvsieve.recipe("momentkv", **(small | options))


def session(made: kvsieve.Recipe, T: int = 9) -> Session:
    query, keys, values = draw(T, T, seed=13)
    running = Session(made, [LayerInfo(ordinal=0)])
    running.begin(T, None, None)
    running.append(0, keys, values)
    running.attend(0, query, SCALE)
    running.end()
    return running


def test_summaries_count_as_bytes_and_are_reset() -> None:
    plain = session(kvsieve.recipe("snapkv", budget=5, window=2, kernel=1)).report().bytes_kept
    running = session(recipe())
    numbers = 1 + D + DV + D * DV
    assert running.report().bytes_kept == plain + B * (H * 4 * numbers + 8)
    running.reset(0)
    assert running.layers[0].store.summary is None


def test_budgets_in_bytes_pay_for_summaries() -> None:
    limit = 20_000
    slots = []
    for summaries in (1, 3):
        running = session(recipe(budget=f"{limit}B", summaries=summaries), T=120)
        report = running.report()
        assert report.bytes_kept <= limit
        slots.append(report.slots[0][0][0])
    numbers = 1 + D + DV + D * DV
    assert slots[0] - slots[1] >= 2 * 4 * numbers // (4 * (D + DV + 1)) - 1


def test_latents_have_no_summary() -> None:
    snapkv = kvsieve.recipe("snapkv", budget=5, window=2)
    assert Signal.VALUES not in snapkv.needs
    assert Signal.VALUES in replace(snapkv, summarise=Summarise()).needs


def test_refuses_no_parts() -> None:
    with pytest.raises(RecipeError):
        Summarise(parts=0)
