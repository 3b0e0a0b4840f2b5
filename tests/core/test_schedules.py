"""Schedules: when each is due, what slack it states, and how its name is read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvsieve.errors import RecipeError
from kvsieve.interfaces import Moment, Occasion, Schedule
from kvsieve.schedules import (
    Above,
    AfterPrefill,
    BeforeAttend,
    EachStep,
    Either,
    Every,
    Once,
    parse_schedule,
)


def occasion(at: str, slots: int = 10) -> Occasion:
    """Return "prompt" (complete), "part" (more is to come) or the n-th decode step "n"."""
    prefill = not at.isdigit()
    return Occasion(
        prefill=prefill,
        prompt_complete=at != "part",
        decoded=0 if prefill else int(at),
        slots=slots,
    )


TIMES = ("prompt", "part", "1", "2", "3", "4", "5", "6")
DUE = [
    ("after-prefill", {"prompt"}),
    ("once", {"prompt"}),
    ("each-step", {"1", "2", "3", "4", "5", "6"}),
    ("before-attend", {"1", "2", "3", "4", "5", "6"}),
    ("every:1", {"1", "2", "3", "4", "5", "6"}),
    ("every:3", {"3", "6"}),
    ("every:7", set()),
    ("above:9", {"prompt", "1", "2", "3", "4", "5", "6"}),
    ("above:10", set()),
    ("after-prefill|every:2", {"prompt", "2", "4", "6"}),
    ("every:2|every:3", {"2", "3", "4", "6"}),
    ("above:10 | every:5 | after-prefill", {"prompt", "5"}),
]


@pytest.mark.parametrize(("text", "want"), DUE, ids=[text for text, _ in DUE])
def test_due(text: str, want: set[str]) -> None:
    schedule = parse_schedule(text)
    assert {at for at in TIMES if schedule.due(occasion(at))} == want


def test_above_looks_at_the_fullest_head() -> None:
    due = [slots for slots in range(6, 10) if Above(7).due(occasion("1", slots))]
    assert due == [8, 9]


@pytest.mark.parametrize(
    ("schedule", "slack", "phases"),
    [
        (AfterPrefill(), None, ("prefill",)),
        (Once(), None, ("prefill",)),
        (EachStep(), 0, ("decode",)),
        (BeforeAttend(), 0, ("decode",)),
        (Every(1), 0, ("decode",)),
        (Every(8), 7, ("decode",)),
        (Above(5), None, ("prefill", "decode")),
        (AfterPrefill() | Every(4), 3, ("prefill", "decode")),
        (Every(4) | AfterPrefill(), 3, ("prefill", "decode")),
        (Every(4) | EachStep(), 0, ("decode",)),
        (AfterPrefill() | Above(5), None, ("prefill", "decode")),
        (AfterPrefill() | AfterPrefill(), None, ("prefill",)),
        (AfterPrefill() | Every(6) | Every(4), 3, ("prefill", "decode")),
    ],
    ids=str,
)
def test_slack_and_phases(schedule: Schedule, slack: int | None, phases: tuple[str, ...]) -> None:
    assert (schedule.slack, schedule.phases) == (slack, phases)
    assert parse_schedule(str(schedule)) == schedule


def test_once_is_for_the_first_complete_prompt() -> None:
    due = [Once().due(replace(occasion("prompt"), turns=turns)) for turns in range(3)]
    assert due == [True, False, False]
    assert not Once().due(occasion("part"))


def test_one_part_that_acts_before_attention_is_enough() -> None:
    early, late = BeforeAttend(), AfterPrefill() | Every(3)
    assert early.moment is (late | early).moment is (early | late).moment is Moment.BEFORE_ATTEND
    assert late.moment is EachStep().moment is Above(3).moment is Moment.AFTER_ATTEND


def test_a_schedule_passes_through() -> None:
    given = Either(Every(2), AfterPrefill())
    assert parse_schedule(given) is given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("each-stpe", r"Unknown schedule 'each-stpe'\. Did you mean 'each-step'"),
        ("", r"Possible: above, after-prefill, before-attend, each-step, every, once"),
        ("after-prefill|", r"Unknown schedule ''"),
        ("after-prefill:3", r"Unknown schedule 'after-prefill:3'"),
        ("every", r"Schedule 'every' needs a number, as in 'every:128'"),
        ("every:", r"needs a number"),
        ("every:two", r"needs a number"),
        ("every:-1", r"needs a number"),
        ("above:1.5", r"Schedule 'above:1\.5' needs a number, as in 'above:128'"),
        ("every:0", r"must be 1 step or more"),
        ("above:0", r"must be 1 slot or more"),
        ("each-step|every:0", r"must be 1 step or more"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_schedule(text)


@pytest.mark.parametrize("build", [Every, Above])
def test_numbers_below_one_are_refused(build: type[Every] | type[Above]) -> None:
    with pytest.raises(RecipeError, match=r"1 (step|slot) or more"):
        build(0)
