"""The parts of the vLLM plugin that need no vLLM: plans, tiles, and a compaction by itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import positions_of
from torch import Tensor

import kvsieve
from kvsieve.columns import Columns
from kvsieve.engines.vllm.beside import Places, Writes
from kvsieve.engines.vllm.effective import effective
from kvsieve.engines.vllm.layer import LayerSieve, Work
from kvsieve.engines.vllm.metrics import METRICS, Tally, names
from kvsieve.engines.vllm.plan import Row, holding, plan
from kvsieve.engines.vllm.tiles import Permutation, digits
from kvsieve.errors import EngineError
from kvsieve.step import LayerInfo

COLUMNS = Columns(block=4, budget=8, interval=4)


def row(n0: int, n1: int, prompt: int, key: str = "a", index: int = 0, start: int = 0) -> Row:
    return Row(index=index, key=key, n0=n0, n1=n1, prompt=prompt, start=start)


def test_a_plan_by_hand() -> None:
    made = plan(COLUMNS, [row(0, 21, 21), row(21, 22, 21, "b", 1, 21), row(3, 7, 21, "c", 2, 22)])
    assert made.seen == [None, (0, 1, 5), None]
    assert made.lengths == [21, 8 + 2, 7]
    (event,) = made.events
    assert event.sources == (0, 1, 2, 3, 4, 5) and event.vacated == (2, 3, 4)
    assert event.slots == 21 and event.kept_columns == 2
    later = plan(COLUMNS, [row(23, 24, 21)]).events
    assert later[0].sources == (0, 1, 5) and later[0].vacated == (5,)


def test_a_row_is_prefill_as_a_session_says() -> None:
    assert row(0, 1, 1).prefill and row(20, 21, 21).prefill and row(30, 33, 21).prefill
    assert not row(21, 22, 21).prefill and row(0, 1, 0).prefill


@given(st.integers(0, 300), st.integers(1, 60), st.integers(1, 200))
def test_columns_hold_what_is_held(n0: int, tokens: int, prompt: int) -> None:
    dropped = COLUMNS.dropped(n0, prompt)
    columns = holding(COLUMNS, dropped, n0 + tokens)
    held = COLUMNS.held(n0 + tokens, prompt, since=n0)
    assert len(columns) == -(-held // COLUMNS.block)
    assert list(columns) == sorted(set(columns))


# -- tiles -----------------------------------------------------------------------------------------


def stored(size: int, D: int, kind: str) -> Tensor:
    """Plain indices ``[size * D]`` in some layout's order."""
    plain = torch.arange(size * D).view(size, D)
    if kind == "plain":
        return plain.reshape(-1)
    if kind == "transposed":
        return plain.T.reshape(-1)
    if kind == "pairs":  # pairs of dimensions interleaved over panels of 16 slots
        return plain.view(size // 16, 16, D // 2, 2).permute(0, 2, 1, 3).reshape(-1)
    return torch.randperm(size * D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "D"), [(32, 32), (32, 64), (128, 80), (64, 96)])
@pytest.mark.parametrize("kind", ["plain", "transposed", "pairs", "random"])
def test_tiles_go_there_and_back(size: int, D: int, kind: str) -> None:
    tile = stored(size, D, kind)
    order = Permutation.of(tile, size, D)
    assert (order.axes is None) == (kind == "random")
    plain = torch.randn(3, 2 * size, D)  # H, P size, D
    tiles = order.pack(plain)
    assert tiles.shape == (2, 3, size, D)
    # By definition: element j of a tile is plain element tile[j].
    assert torch.equal(tiles[1, 2].reshape(-1), plain[2, size:].reshape(-1)[tile])
    assert torch.equal(order.unpack(tiles), plain)


def test_digits_of_what_is_no_transposition() -> None:
    assert digits(torch.tensor([0, 1, 3, 2]), 4) is None
    with pytest.raises(EngineError, match="each key and value once"):
        Permutation.of(torch.tensor([0, 1, 1, 2]), 2, 2)


# -- one layer, without vLLM -----------------------------------------------------------------------


class PlainTiles:
    """The layout ``[blocks, H, b, 2 D]`` without any permutation."""

    def read(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        both = cache[blocks].transpose(0, 1).flatten(1, 2)[None]
        keys, values = both.chunk(2, -1)
        return keys.contiguous(), values.contiguous()

    def write(self, cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        both = torch.cat([keys, values], -1)[0]
        cache[blocks] = both.unflatten(1, (len(blocks), -1)).transpose(0, 1)

    def poison(self, cache: Tensor, blocks: Tensor) -> None:
        cache[blocks] = torch.nan


def scenario(parts: list[int], method: str, policy: str, **options: Any) -> None:
    """Feed one attention layer's tokens to a session and to a paged cache, and compare."""
    from kvsieve.session import Session

    H, G, D, block, prompt = 2, 2, 8, 4, parts[0] if parts[1] == 1 else sum(parts[:2])
    made = effective(kvsieve.recipe(method, budget=16, **options), block, policy)  # type: ignore[arg-type]
    info = LayerInfo(ordinal=0, heads=H, rotary=rotary, output_projection=lambda: w_o(H, G, D))
    session = Session(made.recipe, [info], prompt_length=prompt)
    tally = Tally()
    sieve = LayerSieve(made.recipe, info, PlainTiles(), tally, heads=H, scale=D**-0.5, poison=True)
    cache = torch.zeros(64, H, block, 2 * D)
    table = torch.randperm(64)[None]
    places, n = Places(), 0
    for tokens in parts:
        query = torch.randn(tokens, H * G, D)
        keys, values = torch.randn(2, 1, H, tokens, D)
        session.begin(tokens, None, None)
        session.append(0, keys, values)
        out = session.attend(0, query.view(tokens, H, G, D).permute(1, 2, 0, 3)[None], D**-0.5)
        assert torch.isfinite(out).all()
        session.end()
        for t in range(tokens):
            place = table[0, (n + t) // block], slice(None), (n + t) % block
            cache[place] = torch.cat([keys[0, :, t], values[0, :, t]], -1)
        work_plan = plan(made.columns, [row(n, n + tokens, prompt)])
        work = Work(plan=work_plan, table=table, gone=["a"] if n == 0 else [])
        window = made.recipe.scorer.window  # type: ignore[union-attr]
        if window:
            work.writes = Writes.of(work_plan, places, window, cache.device)
            work.place, work.places = dict(places.of), places.size
        sieve.after_attention(query, cache, work)
        n += tokens
        held = holding(made.columns, made.columns.dropped(n, prompt), n)
        store = session.layers[0].store
        got_keys, got_values = PlainTiles().read(cache, table[0, list(held)])
        assert torch.equal(got_keys[:, :, : store.slots], store.keys), n
        assert torch.equal(got_values[:, :, : store.slots], store.values), n
    columns = sieve.beside.requests["a"].columns
    first = columns["position"].shape[2]
    assert columns["position"][0].tolist() == [
        head[:first] for head in positions_of(session.layers[0].store)[0]
    ]
    assert tally.compactions > 0 and tally.side_bytes > 0 and tally.evicted > 0


def rotary(positions: Tensor) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].float() * torch.tensor([1.0, 0.3, 0.1, 0.01])
    return torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)


def w_o(H: int, G: int, D: int) -> Tensor:
    return torch.randn(H, G, D, 24, generator=torch.Generator().manual_seed(7))


SCENARIOS: dict[str, dict[str, Any]] = {
    "keydiff": {"interval": 8},
    "snapkv": {"window": 6, "schedule": "after-prefill|every:8"},
    "g-kv": {"window": 5, "interval": 4},
    "distinct-keys": {"interval": 8, "recent": 2},
    "laprox": {"window": 4, "scope": "head", "schedule": "after-prefill|every:8"},
    "expected-attention": {"adaptive": False, "interval": 12, "future": 8},
}


@pytest.mark.parametrize("method", SCENARIOS)
@pytest.mark.parametrize("policy", ["after-prompt", "chunk"])
@pytest.mark.parametrize("parts", [[33], [3, 30], [31, 7]], ids=str)
def test_a_layer_keeps_what_a_session_keeps(method: str, policy: str, parts: list[int]) -> None:
    scenario([*parts, *[1] * 30], method, policy, **SCENARIOS[method])


def test_lost_positions_are_an_error_not_a_guess() -> None:
    made = effective(kvsieve.recipe("keydiff", budget=8), 4)
    sieve = LayerSieve(made.recipe, LayerInfo(ordinal=0), PlainTiles(), Tally(), heads=1, scale=1.0)
    cache, table = torch.zeros(99, 1, 4, 4), torch.arange(99)[None]
    n = 8 + made.columns.interval * 2
    work_plan = plan(made.columns, [row(n - 1, n, 4)])
    assert work_plan.events
    with pytest.raises(EngineError, match="positions of its kept slots are lost"):
        sieve.after_attention(
            torch.zeros(1, 1, 2), cache, Work(plan=work_plan, table=table, gone=[])
        )


def test_places_are_used_again() -> None:
    places = Places()
    assert [places.take(key) for key in "abca"] == [0, 1, 2, 0]
    places.drop("b")
    places.drop("nobody")
    assert places.take("d") == 1 and places.size == 3


def test_metrics_have_prometheus_names() -> None:
    assert set(names()) >= {"kvsieve_compactions_total", "kvsieve_blocks_held"}
    assert len(list(names())) == len(METRICS)
    assert not [x for x, y in itertools.combinations(names(), 2) if x == y]
    tally = Tally()
    tally.taken(10)
    tally.freed(3)
    assert tally.to_dict()["blocks_freed"] == 3 and tally.blocks_held == 7
    assert "_beside" not in tally.to_dict()


class Bytes:
    def nbytes(self) -> int:
        return 5


def test_of_several_workers_the_first_counts_compactions() -> None:
    first, second = Tally(), Tally(first=False)
    for tally in (first, second):
        tally.compacted(0, 32, 0.5, Bytes())
    assert (first.compactions, first.evicted, first.seconds) == (1, 32, 0.5)
    assert (second.compactions, second.evicted, second.seconds) == (0, 0, 0)
    assert first.side_bytes == second.side_bytes == 5, "everybody has its own"
