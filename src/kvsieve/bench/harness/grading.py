"""Maths answers compared by math-verify: as numbers and expressions, not as text."""

from __future__ import annotations

import importlib
from typing import Any


def same_answer(gold: str, text: str) -> bool:
    """Return whether the last answer in ``text`` equals ``gold`` (LaTeX or a plain number).

    math-verify limits its own time by alarms, so that this works in the main thread only.
    """
    math_verify: Any = importlib.import_module("math_verify")
    wanted = math_verify.parse(f"${gold}$")
    got = math_verify.parse(text)
    return bool(math_verify.verify(wanted, got))


def gsm8k_answer(answer: str) -> str:
    """Return the number after ``####``, without thousands separators."""
    return answer.rpartition("####")[2].strip().replace(",", "")
