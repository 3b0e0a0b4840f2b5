"""The laws of docs/DESIGN.md, each over all registered methods."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, padded, prompt, tiny
from oracle import Oracle
from running import Trace, counts, decode, kept, row_of
from torch import Tensor

import kvsieve
from kvsieve import Recipe
from kvsieve.allocators import Pyramid
from kvsieve.compressors import Evict
from kvsieve.errors import EngineError
from kvsieve.interfaces import Column, Scope, Signal
from kvsieve.merging import MergeValues
from kvsieve.session import Session
from kvsieve.shares import RetrievalHeads
from kvsieve.store import Store

from .cases import BUDGET, CASES, COMPRESSING, FAMILIES, LENGTHS, STEPS, Case, batch, rows

pytestmark = pytest.mark.oldest

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_compressing = pytest.mark.parametrize("case", COMPRESSING, ids=lambda case: case.name)
# Masks hide keys, but don't move them.
each_masked = pytest.mark.parametrize(
    "case", [case for case in COMPRESSING if not case.rerotates], ids=lambda case: case.name
)
each_family = pytest.mark.parametrize("family", FAMILIES)

# What is decoded is given, without repetition: a random model soon repeats itself, and of equal
# tokens' equal scores rounding would choose. Models must agree on the tokens they would choose.
FORCED = torch.cat([prompt(60, seed)[:, -STEPS:] for seed in range(len(LENGTHS))])

# Allocators that know each layer's share before it is scored, and share unequally.
UNEQUAL = (Pyramid, RetrievalHeads)

_full: dict[str, Trace] = {}
_runs: dict[tuple[str, str], Trace] = {}
_alone: dict[tuple[str, str, int], Trace] = {}


def forced_run(model: Any, recipe: Recipe, **how: Any) -> Trace:
    """The batch, decoded along ``FORCED``."""
    return decode(model, recipe, *batch(), steps=STEPS, forced=FORCED, **how)


def full(family: str) -> Trace:
    """The batch without compression, once."""
    if family not in _full:
        _full[family] = forced_run(tiny(family), kvsieve.recipe("full"))
    return _full[family]


def run(family: str, case: Case) -> Trace:
    """The batch under a case's small budget, once."""
    key = (family, case.name)
    if key not in _runs:
        _runs[key] = forced_run(tiny(family), case.recipe())
    return _runs[key]


def alone(family: str, case: Case, row: int) -> Trace:
    """One row of the batch by itself under the same budget, once."""
    key = (family, case.name, row)
    if key not in _alone:
        _alone[key] = decode(
            tiny(family), case.recipe(), rows()[row], steps=STEPS, forced=FORCED[row : row + 1]
        )
    return _alone[key]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- 1. a budget for everything changes nothing ----------------------------------------------------


@each_family
@each_case
@pytest.mark.parametrize("budget", [max(LENGTHS) + STEPS, 1.0], ids=["slots", "fraction"])
def test_budget_for_everything_is_bit_identical(
    case: Case, family: str, budget: int | float
) -> None:
    got = forced_run(tiny(family), case.at_cap(budget))
    for a, b in zip(got.logits, full(family).logits, strict=True):
        assert torch.equal(a, b)
    assert got.report.removed == 0


@each_family
def test_full_equals_the_stock_cache(family: str) -> None:
    model, (ids, mask) = tiny(family), batch()
    options = {"attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    stock = model.generate(ids, **options)
    with kvsieve.attach(model, kvsieve.recipe("full")):
        ours = model.generate(ids, **options)
    assert torch.equal(stock.sequences, ours.sequences)
    for a, b in zip(stock.logits, ours.logits, strict=True):
        close(a, b, 1e-5)


# -- 2. counts are exact ---------------------------------------------------------------------------


def check_counts(recipe: Recipe, trace: Trace, budgets: Tensor) -> None:
    """Check every forward of a run: ``budgets [B]``; prefill must hit them exactly."""
    schedule = recipe.schedule
    assert schedule is not None
    seen = torch.tensor(LENGTHS[: len(budgets)])
    held_to_budget = "prefill" in schedule.phases
    for step, count in enumerate(trace.counts):  # [L, B, H]
        L, _, H = count.shape
        slack = step if schedule.slack is None else min(step, schedule.slack)
        if not held_to_budget and schedule.slack is not None and step <= schedule.slack:
            continue  # nothing has been due yet
        per_head = torch.minimum(budgets + slack, seen + step)
        if recipe.scope is Scope.HEAD and not isinstance(recipe.allocator, UNEQUAL):
            assert bool((count <= per_head[:, None]).all()), (step, count)
        if recipe.scope is Scope.LAYER:
            assert bool((count.sum(2) <= H * per_head).all()), (step, count)
        assert bool((count.sum((0, 2)) <= L * H * per_head).all()), (step, count)
        if step == 0 and held_to_budget and not recipe.dynamic:
            assert count.sum((0, 2)).tolist() == (L * H * per_head).tolist()


@each_family
@each_compressing
def test_counts_never_exceed_the_budget(case: Case, family: str) -> None:
    trace = run(family, case)
    check_counts(case.recipe(), trace, torch.full((3,), BUDGET))
    assert torch.tensor(trace.report.slots).transpose(0, 1).equal(trace.counts[-1])
    L, _, H = trace.counts[0].shape
    seen = sum(LENGTHS) + len(LENGTHS) * STEPS
    assert trace.report.removed == L * H * seen - int(trace.counts[-1].sum())


@each_compressing
def test_a_fraction_is_of_each_row(case: Case) -> None:
    ids, mask = (x[:2] for x in batch())
    trace = decode(tiny("llama"), case.recipe(0.45), ids, mask, steps=0)
    if "prefill" not in case.recipe().schedule.phases:  # type: ignore[union-attr]
        assert trace.report.removed == 0
        return
    L, _, H = trace.counts[0].shape
    budgets = [int(0.45 * n) for n in LENGTHS[:2]]
    held = trace.counts[0].sum((0, 2)).tolist()
    if case.recipe().dynamic:
        assert all(n <= L * H * b for n, b in zip(held, budgets, strict=True))
        held = decode(tiny("llama"), case.at_cap(0.45), ids, mask, steps=0).counts[0].sum((0, 2))
    assert list(held) == [L * H * b for b in budgets]


@each_compressing
def test_bytes_hold_at_every_step(case: Case) -> None:
    recipe, limit = case.recipe("200KiB"), 200 * 1024
    trace = decode(tiny("llama"), recipe, prompt(900), steps=4)
    if "prefill" in recipe.schedule.phases:  # type: ignore[union-attr]
        assert trace.report.bytes_kept <= limit
        assert recipe.dynamic or trace.report.bytes_kept >= limit // 3


class Tied:
    """A scorer whose scores are all the same, whatever the wrapped one says."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def score(self, step: Any, store: Store) -> Tensor:
        return torch.zeros_like(self._inner.score(step, store))


@each_compressing
def test_ties_are_counted_exactly_and_go_to_the_earlier_slot(case: Case) -> None:
    recipe = case.recipe()
    recipe = dataclasses.replace(recipe, scorer=Tied(recipe.scorer))
    trace = forced_run(tiny("llama"), recipe)
    check_counts(recipe, trace, torch.full((3,), BUDGET))
    if recipe.scope is not Scope.HEAD or not isinstance(recipe.compressor, Evict) or recipe.fair:
        return
    recent = recipe.recent_slots(BUDGET)
    for layer in trace.held[0]:
        for row, n in zip(layer, LENGTHS, strict=True):
            for head in row:
                first = range(len(head) - min(recent, n))
                assert head == [*first, *range(n - min(recent, n), n)]


# -- 3. a row of a batch is the row alone ----------------------------------------------------------


@each_family
@each_compressing
def test_left_padded_row_equals_the_row_alone(case: Case, family: str) -> None:
    together = run(family, case)
    for row in range(len(LENGTHS)):
        single = alone(family, case, row)
        for step, (a, b) in enumerate(zip(together.held, single.held, strict=True)):
            assert row_of(a, row) == b, (row, step)
        for a, b in zip(together.logits, single.logits, strict=True):
            close(a[row], b[0])
            assert a[row].argmax() == b[0].argmax()


@each_compressing
def test_turns_of_a_padded_row_equal_those_of_the_row_alone(case: Case) -> None:
    first, second = rows(), [prompt(n, 9 + n) for n in (3, 11, 8)]
    parts = [padded(first), padded(second)]
    ids, mask = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))
    together = decode(
        tiny("llama"), case.recipe(), ids, mask, steps=3, forced=FORCED, chunks=(40, 11)
    )
    for row, (one, two) in enumerate(zip(first, second, strict=True)):
        single = decode(
            tiny("llama"),
            case.recipe(),
            torch.cat([one, two], 1),
            steps=3,
            forced=FORCED[row : row + 1],
            chunks=(one.shape[1], two.shape[1]),
        )
        for step, (a, b) in enumerate(zip(together.held, single.held, strict=True)):
            assert row_of(a, row) == b, (row, step)
        for a, b in zip(together.logits, single.logits, strict=True):
            close(a[row], b[0])


@each_compressing
@torch.no_grad()
def test_right_padded_row_equals_the_row_alone(case: Case) -> None:
    model, (ids, mask) = tiny("llama"), batch()
    lengths = mask.sum(1)
    ids, mask = (torch.stack([x[b].roll(int(lengths[b])) for b in range(3)]) for x in (ids, mask))
    with kvsieve.Cache(model, case.recipe()) as cache:
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits
        held = kept(cache)
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        after = model(
            FORCED[:, :1], attention_mask=mask, position_ids=lengths[:, None], past_key_values=cache
        ).logits
        held_after = kept(cache)
    for row in range(3):
        single = alone("llama", case, row)
        close(logits[row, lengths[row] - 1], single.logits[0][0])
        assert row_of(held, row) == single.held[0]
        close(after[row, -1], single.logits[1][0])
        assert row_of(held_after, row) == single.held[1]


@each_compressing
def test_rows_that_finish_early_are_inert(case: Case) -> None:
    model, (ids, mask) = tiny("llama"), batch()
    options = {"max_new_tokens": STEPS, "do_sample": False}
    single = []
    for row in rows()[1:]:
        with kvsieve.Cache(model, case.recipe()) as cache:
            out = model.generate(row, past_key_values=cache, **options)
            single.append((out[0, row.shape[1] :].tolist(), kept(cache)))
    with kvsieve.attach(model, case.recipe()):
        first = model.generate(rows()[0], **options)[0, 40:].tolist()
    eos = next(token for token in first if all(token not in tokens for tokens, _ in single))
    with kvsieve.Cache(model, case.recipe()) as cache:
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, eos_token_id=eos, **options
        )
        held = kept(cache)
    stopped = first.index(eos) + 1
    assert out[0, 40 : 40 + stopped].tolist() == first[:stopped]
    assert out[0, 40 + stopped :].eq(0).all()
    for row, (tokens, alone_held) in enumerate(single, start=1):
        assert out[row, 40:].tolist() == tokens
        assert row_of(held, row) == alone_held


# -- 4. chunks and turns ---------------------------------------------------------------------------


@each_case
def test_chunks_of_a_prompt_of_known_length_equal_one_shot(case: Case) -> None:
    whole = run("llama", case)
    parts = forced_run(tiny("llama"), case.recipe(), chunks=(17, 14, 8, 1), prompt_length=40)
    assert parts.held[3:] == whole.held
    for a, b in zip(parts.logits, whole.logits, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.chunk_invariant], ids=lambda case: case.name
)
def test_chunk_invariant_methods_need_no_length(case: Case) -> None:
    whole = run("llama", case)
    parts = decode(tiny("llama"), case.recipe(), *batch(), steps=0, chunks=(17, 14, 9))
    assert parts.held[-1] == whole.held[0]
    if case.compresses:
        assert parts.counts[1].max() <= BUDGET, "each chunk was to be followed by compression"


@each_compressing
@torch.no_grad()
def test_a_second_turn_is_compressed_too(case: Case) -> None:
    model = tiny("llama")
    first = decode(model, case.recipe(), prompt(40), steps=STEPS, keep_open=True)
    cache, before = first.cache, first.report
    with cache:
        model(prompt(11, seed=9), past_key_values=cache)
        count = counts(cache)
        assert cache.report.seen == [40 + STEPS + 11]
        for layer in kept(cache):
            for head in layer[0]:
                assert head == sorted(set(head))
    if "prefill" in case.recipe().schedule.phases:  # type: ignore[union-attr]
        assert int(count.sum()) <= BUDGET * count.numel()
        assert cache.report.events > before.events


# -- 5. runs do not interact -----------------------------------------------------------------------


@each_compressing
@torch.no_grad()
def test_two_caches_on_one_model_do_not_interact(case: Case) -> None:
    model, other = tiny("llama"), kvsieve.recipe("streaming-llm", budget=8)
    single, ids = alone("llama", case, 0), rows()[0]
    with kvsieve.Cache(model, case.recipe()) as one, kvsieve.Cache(model, other) as two:
        more = prompt(21, seed=5)
        for step in range(STEPS):
            token = ids if step == 0 else FORCED[:1, step - 1 : step]
            logits = model(token, past_key_values=one).logits[:, -1]
            assert torch.equal(logits, single.logits[step])
            more = model(more, past_key_values=two).logits[:, -1].argmax(-1)[:, None]
        assert kept(one) == single.held[STEPS - 1]
        assert int(counts(two).max()) == 8


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Everything about a model that attaching may touch."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    tables += ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    hooks = [(name, len(getattr(m, t))) for name, m in model.named_modules() for t in tables]
    names = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    own = sorted(k for m in model.modules() for k in vars(m))
    forward = [type(m).forward for m in model.modules()]
    return model.config.to_dict(), hooks, names, own, forward, model.generation_config.to_dict()


@torch.no_grad()
def check_restored(model: Any, act: Any) -> None:
    ids = prompt(24)
    before, logits = fingerprint(model), model(ids).logits
    act(model)
    assert fingerprint(model) == before
    assert torch.equal(model(ids).logits, logits)


@each_family
@pytest.mark.parametrize("case", ["snapkv", "kvzip", "adakv"])
def test_leaving_restores_the_model(family: str, case: str) -> None:
    recipe = next(c for c in CASES if c.name == case).recipe()

    def act(model: Any) -> None:
        with kvsieve.attach(model, recipe):
            assert model.config._attn_implementation == "kvsieve"
            model.generate(prompt(30), max_new_tokens=3, do_sample=False)

    check_restored(build(family), act)


def test_leaving_by_an_exception_restores_the_model() -> None:
    def act(model: Any) -> None:
        with (
            pytest.raises(ZeroDivisionError),
            kvsieve.attach(model, kvsieve.recipe("h2o", budget=12)),
        ):
            model.generate(prompt(30), max_new_tokens=3)
            raise ZeroDivisionError

    check_restored(build("llama"), act)


def test_a_failing_generate_restores_the_model() -> None:
    def act(model: Any) -> None:
        with kvsieve.attach(model, kvsieve.recipe("snapkv", budget=12, window=4)) as run:
            with pytest.raises(EngineError):
                model.generate(prompt(30), max_new_tokens=9, assistant_model=build("llama", seed=1))
            out = model.generate(prompt(30), max_new_tokens=3)
            assert out.shape == (1, 33)
            assert run.report.removed

    check_restored(build("llama"), act)


def test_an_error_in_mid_forward_restores_the_model() -> None:
    def act(model: Any) -> None:
        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        recipe = kvsieve.recipe("h2o", budget=12)
        with kvsieve.attach(model, recipe) as run:
            hook = model.model.layers[1].register_forward_pre_hook(fail)
            with pytest.raises(ZeroDivisionError):
                model.generate(prompt(30), max_new_tokens=3)
            hook.remove()
            model.generate(prompt(30), max_new_tokens=3)
            assert run.report.removed

    check_restored(build("llama"), act)


def test_nested_attach_is_refused_and_harmless() -> None:
    def act(model: Any) -> None:
        recipe = kvsieve.recipe("streaming-llm", budget=12)
        with kvsieve.attach(model, recipe) as run:
            with (
                pytest.raises(EngineError, match="attached to this model already"),
                kvsieve.attach(model, recipe),
            ):
                pass
            model.generate(prompt(30), max_new_tokens=3)
            assert run.report.removed

    check_restored(build("llama"), act)


def test_caches_inside_attach_are_their_own() -> None:
    def act(model: Any) -> None:
        with kvsieve.attach(model, kvsieve.recipe("streaming-llm", budget=12)) as run:
            cache = kvsieve.Cache(model, kvsieve.recipe("h2o", budget=20))
            model.generate(prompt(30), max_new_tokens=3, past_key_values=cache)
            model.generate(prompt(30), max_new_tokens=3)
            assert int(counts(cache).max()) == 20
            cache.close()
        assert [r.method for r in run.reports] == ["streaming-llm"]
        assert run.report.slots == [[[12, 12], [12, 12]]]

    check_restored(build("llama"), act)


# -- 6. bytes are real -----------------------------------------------------------------------------


def storages(value: Any, found: dict[int, int]) -> dict[int, int]:
    """Collect the storages of all tensors anywhere inside ``value``."""
    if isinstance(value, Tensor):
        found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for item in value.values():
            storages(item, found)
    return found


def table_bytes(session: Any) -> int:
    """Bytes of all that a session's tables hold, summaries too; counts and starts left out."""
    total: dict[int, int] = {}
    for layer in session.layers:
        table, summary = layer.store.table, layer.store.summary
        named = {k: v for k, v in vars(table).items() if k not in ("counts", "starts")}
        storages(named, total)
        storages({} if summary is None else vars(summary), total)
    return sum(total.values())


@each_case
def test_bytes_are_those_of_the_storages(case: Case) -> None:
    trace = forced_run(tiny("llama"), case.recipe(), keep_open=True)
    with trace.cache as cache:
        assert cache.report.bytes_kept == table_bytes(cache.session) + queries(cache.session)
        tokens = 3 * (40 + STEPS)  # padding included
        assert cache.report.bytes_full == tokens * 2 * 2 * 2 * 16 * 4  # L, K and V, H, D, fp32
        assert cache.report.bytes_peak >= cache.report.bytes_kept


def queries(session: Session) -> int:
    """Bytes of remembered queries, from their storages."""
    rings = [layer.recent for layer in session.layers if layer.recent is not None]
    held = [x for ring in rings for x in (ring.queries, ring.positions, ring.valid)]
    return sum(x.untyped_storage().nbytes() for x in held)


@each_compressing
@torch.no_grad()
def test_a_layerwise_prefill_holds_one_full_layer_at_most(case: Case) -> None:
    recipe, model = case.recipe(40), build("llama", num_hidden_layers=4)
    if "prefill" not in recipe.schedule.phases:  # type: ignore[union-attr]
        return
    observed = [0]
    with kvsieve.Cache(model, recipe) as cache:
        for layer in model.model.layers:
            layer.register_forward_hook(lambda *_: observed.append(table_bytes(cache.session)))
        model(prompt(600), past_key_values=cache)
        report, columns = cache.report, recipe.columns
        tables = table_bytes(cache.session)
    layer, L = 600 * 2 * ((16 + 16) * 4 + 4 * (1 + len(columns))), 4
    assert max(observed) <= report.bytes_peak
    assert tables < report.bytes_full // 4
    if recipe.scope is Scope.MODEL or Signal.REPLAY in recipe.needs:
        assert report.bytes_peak >= report.bytes_full
        return
    most = layer if isinstance(recipe.allocator, UNEQUAL) else report.bytes_kept / L * 1.5
    assert report.bytes_peak <= report.bytes_kept + layer + most
    assert max(observed) <= report.bytes_kept * 1.1


def resident() -> int:
    """Bytes of this process's memory that are in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc (Linux)")
@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_memory_goes_back_to_the_system(layout: Any) -> None:
    store = Store((Column(name="extra"),), layout)
    gc.collect()
    before = resident()
    store.append(torch.randn(1, 4, 65536, 64), torch.randn(1, 4, 65536, 64))
    held = store.nbytes()
    assert held >= 128 * 2**20
    assert resident() - before >= 0.9 * held
    index = torch.arange(0, 65536, 64).expand(1, 4, -1)
    store.keep(index, torch.full((1, 4), 1024))
    assert store.nbytes() < held // 40
    assert resident() - before < 0.3 * held


# -- 7. masking a full cache gives the same --------------------------------------------------------


@each_family
@each_masked
def test_compression_equals_masking_a_full_cache(case: Case, family: str) -> None:
    if isinstance(case.recipe().compressor, MergeValues):
        pytest.skip("masks hide values, but don't merge them; see tests/methods/test_cam.py")
    check_oracle(case, run(family, case), build(family), [0, 1])


def check_oracle(case: Case, trace: Trace, twin: Any, layers: list[int]) -> None:
    # What acts before attention attends to what is held after a step, not to what was before.
    ahead = case.recipe().acts_before
    ids, mask = batch()
    how = case.recipe().summarise
    oracle = Oracle(twin, layers, parts=how.parts if how is not None and how.added else 0)
    close(oracle.forward(ids, mask, None), trace.logits[0])
    for step in range(STEPS):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        held = trace.held[step + 1] if ahead else trace.held[step]
        logits = oracle.forward(trace.tokens[:, step : step + 1], mask, held)
        close(logits, trace.logits[step + 1])


@pytest.mark.parametrize("family", ["gpt-oss", "gemma3"])
@pytest.mark.parametrize(
    "case", ["snapkv", "h2o", "adakv-each-step", "momentkv-each-step", "hash-evict"]
)
def test_masking_with_attention_sinks_and_sliding_layers(case: str, family: str) -> None:
    chosen = next(c for c in CASES if c.name == case)
    trace = decode(tiny(family), chosen.recipe(), *batch(), steps=STEPS)
    check_oracle(chosen, trace, build(family), [1, 3])


# -- or keys move, and then they stand side by side in front of what comes next --------------------


@each_compressing
def test_moved_keys_stand_side_by_side(case: Case) -> None:
    moving = dataclasses.replace(case, options=case.options | {"rerotate": True})
    plain = case.recipe()
    if plain.summarise is not None or any(column.of_key for column in plain.columns):
        with pytest.raises(kvsieve.KVSieveError, match="Leave rerotate out"):
            moving.recipe()
        return
    with forced_run(tiny("llama"), moving.recipe(), keep_open=True).cache as cache:
        for layer in cache.session.layers:
            store, counts = layer.store, layer.store.counts
            place = store.standing.expand(*counts.shape, -1)
            live = torch.ones_like(place) if store.live is None else store.live
            for b, seen in enumerate(store.seen.tolist()):
                for h, n in enumerate(counts[b].tolist()):
                    held = place[b, h][live.expand_as(place)[b, h].bool()]
                    assert held.tolist() == list(range(seen - n, seen))


# -- 8. compression does something -----------------------------------------------------------------


@each_compressing
def test_compression_does_something(case: Case) -> None:
    trace = run("llama", case)
    assert trace.report.removed > 0
    assert trace.report.events > 0
    assert trace.report.seconds["compress"] > 0
    last, uncompressed = trace.logits[-1], full("llama").logits[-1]
    assert (last - uncompressed).abs().max() > 1e-2, "removed slots were to change the logits"


class Idle:
    """A broken compressor: it leaves everything."""

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset()

    def compress(self, *_: Any) -> None:
        return None


@each_compressing
def test_the_report_raises_when_nothing_was_removed(case: Case) -> None:
    recipe = dataclasses.replace(case.recipe(), compressor=Idle(), fair=())
    with pytest.raises(EngineError, match="no slot was removed"):
        forced_run(tiny("llama"), recipe)
