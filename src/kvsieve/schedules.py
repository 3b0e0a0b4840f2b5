"""When the cache is compressed. Schedules combine with ``|``.

A *prompt part* is a forward of more than one token (or the very first forward); every other
forward is a decode step.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvsieve.errors import RecipeError, choices
from kvsieve.interfaces import Moment, Occasion, Schedule


class _Combinable:
    @property
    def moment(self) -> Moment:
        return Moment.AFTER_ATTEND

    def __or__(self, other: Schedule) -> Either:
        return Either(self, other)  # type: ignore[arg-type]

    def tail(self, seen: int, prompt: int = 0) -> int:
        """Nothing is left out: every slot that is not protected may go."""
        return 0


@dataclass(frozen=True)
class AfterPrefill(_Combinable):
    """After every prompt part: the prompt, each of its chunks, each later turn.

    When the session knows the prompt's length, chunks wait until the whole prompt has passed.
    Layers are compressed one by one while the forward runs, so that at most one is held in full.
    """

    slack: int | None = None
    phases: tuple[str, ...] = ("prefill",)

    def due(self, occasion: Occasion) -> bool:
        return occasion.prefill and occasion.prompt_complete

    def wait(self, decoded: int) -> int | None:
        return None

    def __str__(self) -> str:
        return "after-prefill"


@dataclass(frozen=True)
class Once(AfterPrefill):
    """After the first complete prompt alone: later turns, and what is written, stay whole.

    Of a prompt in chunks that is the first chunk, unless the session knows the prompt's length.
    """

    def due(self, occasion: Occasion) -> bool:
        return super().due(occasion) and occasion.turns == 0

    def __str__(self) -> str:
        return "once"


@dataclass(frozen=True)
class Every(_Combinable):
    """At every ``interval``-th decode step; a head holds at most budget + interval slots."""

    interval: int

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise RecipeError(f"Every({self.interval}): the interval must be 1 step or more.")

    @property
    def slack(self) -> int | None:
        return self.interval - 1

    @property
    def phases(self) -> tuple[str, ...]:
        return ("decode",)

    def due(self, occasion: Occasion) -> bool:
        return not occasion.prefill and occasion.decoded % self.interval == 0

    def wait(self, decoded: int) -> int | None:
        return -decoded % self.interval if decoded else self.interval

    def __str__(self) -> str:
        return f"every:{self.interval}"


@dataclass(frozen=True)
class EachStep(_Combinable):
    """At every decode step: the budget holds after each of them."""

    slack: int | None = 0
    phases: tuple[str, ...] = ("decode",)

    def due(self, occasion: Occasion) -> bool:
        return not occasion.prefill

    def wait(self, decoded: int) -> int | None:
        return 0 if decoded else 1

    def __str__(self) -> str:
        return "each-step"


@dataclass(frozen=True)
class BeforeAttend(_Combinable):
    """At every decode step, between storing its token and attending: a token for a token.

    The step itself so reads no more slots than the budget; the new token is protected. Prompts are
    not its matter: their first queries would lose keys that they are to see.
    """

    slack: int | None = 0
    phases: tuple[str, ...] = ("decode",)

    @property
    def moment(self) -> Moment:
        return Moment.BEFORE_ATTEND

    def due(self, occasion: Occasion) -> bool:
        return not occasion.prefill

    def wait(self, decoded: int) -> int | None:
        return 0 if decoded else 1

    def __str__(self) -> str:
        return "before-attend"


@dataclass(frozen=True)
class Above(_Combinable):
    """Whenever a head holds more than ``cap`` slots, in either phase.

    Between a cap and a smaller budget the cache swings: it fills up to ``cap`` and falls back to
    the budget. How far above the budget that is depends on the budget, so no slack is stated.
    """

    cap: int
    slack: int | None = None
    phases: tuple[str, ...] = ("prefill", "decode")

    def __post_init__(self) -> None:
        if self.cap < 1:
            raise RecipeError(f"Above({self.cap}): the cap must be 1 slot or more.")

    def due(self, occasion: Occasion) -> bool:
        return occasion.slots > self.cap and (not occasion.prefill or occasion.prompt_complete)

    def wait(self, decoded: int) -> int | None:
        return 0

    def __str__(self) -> str:
        return f"above:{self.cap}"


@dataclass(frozen=True)
class Either(_Combinable):
    """Due when one of two schedules is."""

    first: Schedule
    second: Schedule

    @property
    def slack(self) -> int | None:
        stated = [s for s in (self.first.slack, self.second.slack) if s is not None]
        return min(stated, default=None)

    @property
    def phases(self) -> tuple[str, ...]:
        joint = {*self.first.phases, *self.second.phases}
        return tuple(p for p in ("prefill", "decode") if p in joint)

    @property
    def moment(self) -> Moment:
        moments = (self.first.moment, self.second.moment)
        return Moment.BEFORE_ATTEND if Moment.BEFORE_ATTEND in moments else Moment.AFTER_ATTEND

    def due(self, occasion: Occasion) -> bool:
        return self.first.due(occasion) or self.second.due(occasion)

    def wait(self, decoded: int) -> int | None:
        stated = [w for w in (self.first.wait(decoded), self.second.wait(decoded)) if w is not None]
        return min(stated, default=None)

    def __str__(self) -> str:
        return f"{self.first}|{self.second}"


def parse_schedule(given: str | Schedule) -> Schedule:
    """Read "after-prefill", "once", "each-step", "before-attend", "every:128", "above:2048".

    Several are joined by "|".

    Raises:
        RecipeError: an unknown name or a missing number.
    """
    if not isinstance(given, str):
        return given
    parts = [_parse_one(part.strip()) for part in given.split("|")]
    whole: Schedule = parts[0]
    for part in parts[1:]:
        whole = Either(whole, part)
    return whole


def _parse_one(text: str) -> Schedule:
    name, _, number = text.partition(":")
    plain = {
        "after-prefill": AfterPrefill,
        "once": Once,
        "each-step": EachStep,
        "before-attend": BeforeAttend,
    }
    counted = {"every": Every, "above": Above}
    if name in plain and not number:
        return plain[name]()
    if name in counted and number.isdigit():
        return counted[name](int(number))
    if name in counted:
        raise RecipeError(f"Schedule {text!r} needs a number, as in '{name}:128'.")
    raise RecipeError(f"Unknown schedule {text!r}. {choices(name, {**plain, **counted})}")


__all__ = [
    "Above",
    "AfterPrefill",
    "BeforeAttend",
    "EachStep",
    "Either",
    "Every",
    "Once",
    "parse_schedule",
]
