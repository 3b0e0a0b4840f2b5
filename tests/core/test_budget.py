"""Budgets: what is read, what is refused, and how many slots they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvsieve.budget import Budget, Geometry
from kvsieve.errors import BudgetError

ANY = Geometry(slot_bytes=64, heads=4, rows=2, slack=0)


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        (1, "slots", 1),
        (1024, "slots", 1024),
        ("1024", "slots", 1024),
        (" 7 ", "slots", 7),
        (0.1, "fraction", 0.1),
        (1.0, "fraction", 1.0),
        ("0.1", "fraction", 0.1),
        ("10%", "fraction", 0.1),
        ("100 %", "fraction", 1.0),
        ("12.5%", "fraction", 0.125),
        ("2GiB", "bytes", 2 * 1024**3),
        ("512 MB", "bytes", 512 * 1000**2),
        ("1.5kib", "bytes", 1536),
        ("3 kB", "bytes", 3000),
        ("100B", "bytes", 100),
        ("1TiB", "bytes", 1024**4),
    ],
)
def test_parse(given: Any, kind: str, value: float) -> None:
    read = Budget.parse(given)
    assert (read.kind, read.value) == (kind, pytest.approx(value))
    assert Budget.parse(read) is read
    assert Budget.parse(read.plain()) == read


@pytest.mark.parametrize(
    "given",
    [
        *(0, -1, 0.0, -0.1, 1.5, float("nan"), float("inf"), True, False, None, [8], "abc", ""),
        *("0", "-1", "0.0", "1.5", "0%", "-5%", "120%", "3 %%", "0B", "-2GiB", "0.2B", "nan"),
        *("3 parsecs", "1e3", "GiB", "2 GiB each"),
    ],
)
def test_refused(given: Any) -> None:
    with pytest.raises(BudgetError) as refusal:
        Budget.parse(given)
    # What was asked, and what is possible.
    assert str(given).strip() in str(refusal.value)
    assert '0.1 or "10%"' in str(refusal.value)


def test_an_unknown_unit_is_named() -> None:
    with pytest.raises(BudgetError, match="unknown unit 'parsecs'"):
        Budget.parse("3 parsecs")


def test_slots_are_the_same_for_every_row() -> None:
    got = Budget.parse(7).slots(torch.tensor([3, 100]), ANY)
    assert got.tolist() == [7, 7] and got.dtype is torch.int64


def test_a_fraction_is_rounded_down_but_never_to_zero() -> None:
    lengths = torch.tensor([1, 9, 10, 19, 20, 30, 70, 1000])
    got = Budget.parse("10%").slots(lengths, ANY)
    assert got.tolist() == [1, 1, 1, 1, 2, 3, 7, 100] and got.dtype is torch.int64
    whole = Budget.parse(1.0).slots(lengths, ANY)
    assert torch.equal(whole, lengths)


def test_a_fraction_of_ten_thousandths_is_exact() -> None:
    lengths = torch.arange(1, 10_001)
    for percent in (1, 7, 29, 57, 58, 99):
        want = (lengths * percent // 100).clamp_min(1)
        assert torch.equal(Budget.parse(f"{percent}%").slots(lengths, ANY), want)


@pytest.mark.parametrize("slack", [0, 5])
@pytest.mark.parametrize("size", [40_000, 123_456, 10**7])
def test_bytes_hold_slots_with_slack_and_spare_room(size: int, slack: int) -> None:
    shape = Geometry(slot_bytes=64, heads=4, rows=2, slack=slack)
    slots = int(Budget.parse(f"{size}B").slots(torch.tensor([9, 9]), shape)[0])

    def cost(slots: int) -> float:
        """Bytes of that many slots, the slack, a new token, and the room that a table keeps."""
        held = slots + slack + 1
        return 64 * 4 * 2 * (held + max(32, held / 16))

    assert slots >= 1
    assert cost(slots) <= size
    # A tighter count would be unsafe only by the 16th and the 32 slots, which both are taken.
    assert cost(slots) >= 0.85 * size or size < 100_000


def test_too_few_bytes_name_the_least_that_works() -> None:
    with pytest.raises(
        BudgetError, match=r"too small for one slot in each of the 4 KV heads"
    ) as no:
        Budget.parse("1KiB").slots(torch.tensor([9]), ANY)
    least = int(str(no.value).split("can hold is ")[1].split(" ")[0])
    assert Budget.parse(f"{least}B").slots(torch.tensor([9]), ANY).tolist() == [1]
    # A whole slot of all heads less is refused.
    with pytest.raises(BudgetError):
        Budget.parse(f"{least - 64 * 4 * 2}B").slots(torch.tensor([9]), ANY)


@pytest.mark.parametrize(
    ("given", "shown"),
    [(5, "5 slots"), ("12.5%", "12.5%"), ("2GiB", "2GiB"), ("1536B", "1.5KiB"), ("7B", "7B")],
)
def test_shown(given: Any, shown: str) -> None:
    assert str(Budget.parse(given)) == shown
