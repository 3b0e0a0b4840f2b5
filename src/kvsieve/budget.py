"""Budgets: slots (int), a fraction kept (float in (0, 1] or "10%"), or bytes ("2GiB")."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvsieve.errors import BudgetError
from kvsieve.store.dense import SPARE_SHARE, SPARE_SLOTS

_UNITS = {"b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}

_HELP = 'Give slots (1024), a fraction kept (0.1 or "10%") or bytes ("2GiB").'


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What one slot costs and how many of them a cache has.

    ``slot_bytes``: bytes of one slot of one head, columns included; ``heads``: KV heads of all
    compressed layers together; ``rows``: batch size; ``slack``: slots above the budget that the
    schedule allows; ``fixed``: bytes per row that don't depend on slots (remembered queries).
    """

    slot_bytes: int
    heads: int
    rows: int
    slack: int
    fixed: int = 0


@dataclass(frozen=True)
class Budget:
    """A budget as the user gave it; ``slots()`` turns it into slots per head and row."""

    kind: Literal["slots", "fraction", "bytes"]
    value: float

    @classmethod
    def parse(cls, given: int | float | str | Budget) -> Budget:
        """Read a budget.

        Raises:
            BudgetError: zero, negative, above 100 %, or not a budget at all.
        """
        if isinstance(given, Budget):
            return given
        if isinstance(given, bool) or not isinstance(given, int | float | str):
            raise BudgetError(f"{given!r} is not a budget. {_HELP}")
        if isinstance(given, str):
            return _parse_text(given)
        if isinstance(given, int):
            return _slots(given)
        return _fraction(given, repr(given))

    def slots(self, lengths: Tensor, geometry: Geometry) -> Tensor:
        """Return slots per head for rows that have seen ``lengths`` tokens (both ``[B]`` int64).

        Raises:
            BudgetError: the bytes don't hold one slot per head.
        """
        if self.kind == "slots":
            return torch.full_like(lengths, int(self.value))
        if self.kind == "fraction":
            # The tiny addend keeps 0.1 * 10 from becoming 0.
            exact = lengths.double() * self.value + 1e-9
            return exact.floor().to(lengths.dtype).clamp_min(1)
        row = int(self.value) // geometry.rows - geometry.fixed
        per_head = row // (geometry.slot_bytes * geometry.heads)
        # The slack, and the room that tables keep for new tokens (a 16th, or 32 slots), count.
        held = int((per_head - SPARE_SLOTS) / (1 + 1 / SPARE_SHARE)) - geometry.slack - 1
        if held < 1:
            slots = math.ceil((geometry.slack + 2) * (1 + 1 / SPARE_SHARE)) + SPARE_SLOTS
            least = geometry.slot_bytes * geometry.heads * slots + geometry.fixed
            raise BudgetError(
                f"A budget of {self} is too small for one slot in each of the {geometry.heads} KV "
                f"heads of {geometry.rows} row(s). The least this recipe can hold is "
                f"{least * geometry.rows} bytes."
            )
        return torch.full_like(lengths, held)

    def __str__(self) -> str:
        if self.kind == "slots":
            return f"{int(self.value)} slots"
        if self.kind == "fraction":
            return f"{self.value * 100:.6g}%"
        for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if self.value >= size:
                return f"{self.value / size:.6g}{unit}"
        return f"{int(self.value)}B"

    def plain(self) -> int | float | str:
        """Return the budget as a plain value that ``parse`` reads back."""
        if self.kind == "slots":
            return int(self.value)
        return self.value if self.kind == "fraction" else f"{int(self.value)}B"


def _parse_text(text: str) -> Budget:
    stripped = text.strip()
    match = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)\s*(%|[A-Za-z]+)?", stripped)
    if match is None:
        raise BudgetError(f"{text!r} is not a budget. {_HELP}")
    number, unit = match.groups()
    if unit == "%":
        return _fraction(float(number) / 100, text)
    if unit is None:
        return _fraction(float(number), text) if "." in number else _slots(int(number))
    if unit.lower() not in _UNITS:
        raise BudgetError(f"{text!r} has the unknown unit {unit!r}. {_HELP}")
    size = math.floor(float(number) * _UNITS[unit.lower()])
    if size <= 0:
        raise BudgetError(f"A budget of {text!r} keeps nothing. {_HELP}")
    return Budget("bytes", size)


def _slots(count: int) -> Budget:
    if count <= 0:
        raise BudgetError(f"A budget of {count} slots keeps nothing: it must be 1 or more. {_HELP}")
    return Budget("slots", count)


def _fraction(value: float, given: str) -> Budget:
    if not 0 < value <= 1:
        raise BudgetError(
            f"A budget of {given} is not a fraction kept above 0 and up to 1 (100%). {_HELP}"
        )
    return Budget("fraction", value)
