"""What a row of `kvsieve bench quality` must hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvsieve.errors import KVSieveError

Row = dict[str, Any]

KIND, VERSION = "quality", 1

_ROUNDING = 1e-6


class ResultsError(KVSieveError, ValueError):
    """Results that can't be read, or that don't hold what was asked for."""


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    words: str


def _number(value: Any, least: float = -1e300, most: float = 1e300) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and least - _ROUNDING <= value <= most + _ROUNDING


def _optional(rule: _Rule) -> _Rule:
    return _Rule(lambda v: v is None or rule.holds(v), f"{rule.words}, or null")


_TEXT = _Rule(lambda v: isinstance(v, str) and v.strip() != "", "text")
_ANY = _Rule(lambda v: True, "anything")
_OBJECT = _Rule(lambda v: isinstance(v, dict), "an object")
_WHOLE = _Rule(lambda v: _number(v) and isinstance(v, int), "a whole number")
_COUNT = _Rule(lambda v: _WHOLE.holds(v) and v > 0, "a whole number above 0")
_NUMBER = _Rule(lambda v: _number(v, 0), "a number from 0 up")
_BYTES = _Rule(lambda v: _number(v) and v > 0, "a number above 0")
_SHARE = _Rule(lambda v: _number(v, 0, 1), "a share from 0 to 1")
_CHANGE = _Rule(lambda v: _number(v, -1, 1), "a number from -1 to 1")
_MARKS = _Rule(lambda v: isinstance(v, list) and all(m in (0, 1) for m in v), "a list of 0 and 1")

_ORIGIN = {
    **dict.fromkeys(("engine", "model", "task", "setting", "method", "device", "dtype"), _TEXT),
    **dict.fromkeys(("weights", "task_version"), _ANY),
    **dict.fromkeys(("recipe", "versions"), _OBJECT),
    **dict.fromkeys(("budget", "commit", "error"), _optional(_TEXT)),
    **dict.fromkeys(("length", "threads"), _optional(_COUNT)),
    "seed": _WHOLE,
}
"""Of every row, a failed one, too."""

_FIGURES = {
    "metric": _TEXT,
    "n": _COUNT,
    **dict.fromkeys(("score", "low", "high", "full.score", "full.low", "full.high"), _SHARE),
    **dict.fromkeys(("difference.mean", "difference.low", "difference.high"), _CHANGE),
    **dict.fromkeys(("right", "full.right"), _MARKS),
    **dict.fromkeys(("cache.bytes_full", "cache.bytes_kept"), _BYTES),
    **dict.fromkeys(("cache.bytes_peak", "tokens_per_second"), _optional(_NUMBER)),
    **dict.fromkeys(("seconds.prefill", "seconds.decode", "seconds.compress"), _optional(_NUMBER)),
    "prefix": _optional(_SHARE),
}
"""Of a row without an error; a dot goes into an object."""


def check(row: Any, where: str) -> Row:
    """Return a row that holds what it must.

    Raises:
        ResultsError: with the line, the field, and what it should be.
    """
    if not isinstance(row, dict):
        raise ResultsError(f"{where} is no JSON object.")
    _check_version(row, where)
    _check_fields(row, _ORIGIN, where)
    if row["error"] is None:
        _check_fields(row, _FIGURES, where)
        _check_agreement(row, where)
    return row


def _check_version(row: Row, where: str) -> None:
    kind, version = row.get("kind"), row.get("version")
    if kind != KIND:
        raise ResultsError(f"{where} is of kind {kind!r}; only {KIND!r} rows are read here.")
    if version != VERSION:
        raise ResultsError(
            f"{where} is of version {version!r}, this kvsieve reads version {VERSION}: what rows "
            "mean has changed in between. Measure again into a new folder."
        )


def _check_fields(row: Row, rules: Mapping[str, _Rule], where: str) -> None:
    for path, rule in rules.items():
        value: Any = row
        for name in path.split("."):
            if not isinstance(value, dict) or name not in value:
                raise ResultsError(f"{where} has no {path!r}.")
            value = value[name]
        if not rule.holds(value):
            raise ResultsError(f"{where}: {path!r} must be {rule.words}, not {value!r:.60}.")


def _check_agreement(row: Row, where: str) -> None:
    for name, part in (("score", row), ("full.score", row["full"])):
        if not part["low"] - _ROUNDING <= part["score"] <= part["high"] + _ROUNDING:
            raise ResultsError(f"{where}: {name!r} lies outside its interval.")
        if len(part["right"]) != row["n"]:
            raise ResultsError(
                f"{where}: n is {row['n']}, but {len(part['right'])} answers are marked."
            )
    if row["difference"]["low"] > row["difference"]["high"]:
        raise ResultsError(f"{where}: the interval of 'difference' is reversed.")
