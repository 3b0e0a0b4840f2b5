"""Compaction in whole block columns: a pure function, and what follows from it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsieve.columns import POLICIES, Columns, ColumnSchedule
from kvsieve.errors import BudgetError, RecipeError
from kvsieve.interfaces import Occasion


@st.composite
def schedules(draw: st.DrawFn) -> Columns:
    block = draw(st.sampled_from([1, 4, 16, 32]))
    policy = draw(st.sampled_from(POLICIES))
    return Columns(
        block=block,
        budget=block * draw(st.integers(1, 12)),
        interval=block * draw(st.integers(1, 8)),
        policy=policy,
        decode=policy == "chunk" or draw(st.booleans()),
    )


@st.composite
def runs(draw: st.DrawFn) -> tuple[Columns, int, list[int]]:
    """A schedule, a prompt's length and a way to cut prompt and decoding into forwards."""
    columns = draw(schedules())
    prompt = draw(st.integers(1, 24 * columns.block))
    parts: list[int] = []
    while sum(parts) < prompt:
        parts.append(draw(st.integers(1, prompt - sum(parts))))
    return columns, prompt, parts + [1] * draw(st.integers(0, 10 * columns.block))


def by_hand(c: Columns, n: int, prompt: int) -> int:
    """The definition, step by step: where the next event is, until it lies beyond n."""
    if c.policy == "after-prompt" and n < prompt:
        return 0
    anchor = c.budget // c.block
    if c.policy == "after-prompt" and prompt // c.block > anchor:
        anchor = prompt // c.block
    at = anchor
    while c.decode and (at + c.interval // c.block) * c.block <= n:
        at += c.interval // c.block
    return at if at > c.budget // c.block else 0


@given(schedules(), st.integers(0, 2000), st.integers(0, 600))
def test_it_is_the_definition(columns: Columns, n: int, prompt: int) -> None:
    assert columns.dropped(n, prompt) == by_hand(columns, n, prompt)


@given(schedules(), st.integers(0, 400))
def test_it_only_grows_and_takes_whole_columns_that_are_there(
    columns: Columns, prompt: int
) -> None:
    values = [columns.dropped(n, prompt) for n in range(900)]
    for before, after in pairwise(values):
        assert after >= before
    for n, dropped in enumerate(values):
        assert dropped * columns.block <= n
        assert dropped == 0 or dropped > columns.kept


@given(runs())
def test_what_is_held_stays_near_the_budget(run: tuple[Columns, int, list[int]]) -> None:
    columns, prompt, parts = run
    n = 0
    for tokens in parts:
        n += tokens
        held = columns.held(n, prompt)
        assert held <= n
        if n >= prompt or columns.policy == "chunk":
            limit = columns.budget + columns.interval
            if columns.decode:
                assert held < limit
        assert held >= min(n, columns.budget), "never below the budget"


@given(runs())
def test_slots_stay_in_their_columns(run: tuple[Columns, int, list[int]]) -> None:
    """A model of the block table: logical column -> tokens; any choice of survivors fits."""
    columns, prompt, parts = run
    table: dict[int, list[int]] = {}
    n = most = 0
    for tokens in parts:
        before = columns.dropped(n, prompt)
        for p in range(n, n + tokens):
            table.setdefault(p // columns.block, []).append(p)
        n += tokens
        seen = [t for column in sorted(table) for t in table[column]]
        assert len(seen) == columns.held(n, prompt, since=n - tokens)
        assert seen[-tokens:] == list(range(n - tokens, n)), "the newest come last, all of them"
        most = max(most, len(table))
        after = columns.dropped(n, prompt)
        if after > before:
            sources = [c for c in sorted(table) if c < after]
            slots = [t for column in sources for t in table.pop(column)]
            assert len(slots) % columns.block == 0
            kept = slots[-columns.budget :]
            for i in range(columns.kept):
                table[i] = kept[i * columns.block : (i + 1) * columns.block]
        assert sum(map(len, table.values())) == columns.held(n, prompt)
        assert n - after * columns.block == columns.tail(n, prompt)
    assert most <= columns.peak(n, max(parts))


@given(runs())
def test_after_prompt_does_not_depend_on_how_the_prompt_was_cut(
    run: tuple[Columns, int, list[int]],
) -> None:
    columns, prompt, parts = run
    if columns.policy == "chunk":
        return
    n, events = 0, []
    for tokens in parts:
        if columns.dropped(n + tokens, prompt) > columns.dropped(n, prompt):
            events.append(n + tokens)
        n += tokens
    whole = [prompt, *range(prompt + 1, n + 1)]
    expected = [
        b
        for a, b in pairwise([0, *whole])
        if columns.dropped(b, prompt) > columns.dropped(a, prompt)
    ]
    assert events == expected


def test_a_prompt_above_the_budget_is_cut_at_its_end() -> None:
    columns = Columns(block=4, budget=8, interval=8)
    assert columns.dropped(21, 21) == 5  # 5 whole columns of the prompt became 2
    assert columns.held(21, 21) == 8 + 1
    assert columns.dropped(20, 21) == 0
    assert columns.dropped(27, 21) == 5 and columns.dropped(28, 21) == 7


def test_events_of_unequal_prompts_are_spread() -> None:
    columns = Columns(block=4, budget=8, interval=16)
    events = {
        prompt: [n % 16 // 4 for n in range(prompt + 1, 200)
                 if columns.dropped(n, prompt) > columns.dropped(n - 1, prompt)]
        for prompt in (20, 24, 28, 32)
    }  # fmt: skip
    assert len({phases[0] for phases in events.values()}) == 4
    assert all(len(set(phases)) == 1 for phases in events.values())


def test_without_decoding_one_event_is_all() -> None:
    columns = Columns(block=4, budget=8, interval=4, decode=False)
    assert [columns.dropped(n, 20) for n in (19, 20, 21, 400)] == [0, 5, 5, 5]
    assert columns.dropped(400, 6) == 0


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"budget": 3}, BudgetError, "whole number of blocks of 4"),
        ({"budget": 0}, BudgetError, "whole number"),
        ({"interval": 6}, RecipeError, "interval of 6"),
        ({"block": 0}, RecipeError, "1 slot or more"),
        ({"policy": "after-promt"}, RecipeError, "Did you mean 'after-prompt'"),
        ({"policy": "chunk", "decode": False}, RecipeError, "Only the policy after-prompt"),
    ],
)
def test_impossible_schedules_are_refused(
    changes: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Columns(**({"block": 4, "budget": 8, "interval": 4} | changes))  # type: ignore[arg-type]


def test_as_a_recipe_s_schedule() -> None:
    schedule = ColumnSchedule(Columns(block=4, budget=8, interval=8))
    assert schedule.slack == 8 and schedule.phases == ("prefill", "decode")
    assert str(schedule) == "columns of 4 (after-prompt, every 8 tokens)"

    def due(seen: int, new: int, prompt: int) -> bool:
        return schedule.due(
            Occasion(
                prefill=new > 1,
                prompt_complete=seen >= prompt,
                decoded=0,
                slots=seen,
                seen=seen,
                new=new,
                prompt=prompt,
            )
        )

    assert due(21, 21, 21) and not due(20, 20, 21) and due(21, 1, 21)
    assert not due(27, 1, 21) and due(28, 1, 21)
    assert schedule.tail(28, 21) == 0 and schedule.tail(30, 21) == 2
