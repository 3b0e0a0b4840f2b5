"""Compaction in whole block columns: a schedule that paged engines and Transformers can share.

A paged engine keeps a request's tokens in blocks of b slots; logical column c holds the tokens
c b .. c b + b - 1. With B columns of budget, an interval of I columns and n tokens cached,

    dropped(n) = a + floor((n // b - a) / I) I      if that is above B, else 0

is the number C of leading columns that have been compacted into the first B. Columns B .. C - 1
are then empty, columns from C on are where they always were. What was removed is a whole number of
columns, so that the place of a new token, the block table and all positions stay as they are
without compression; only attention sees fewer columns.

The anchor a depends on the policy:

    chunk         a = B. Compaction after every forward that passes an event, inside the prompt too:
                  memory is bounded there as well, results depend on where the prompt is cut.
    after-prompt  a = max(B, prompt // b), and dropped(n) = 0 as long as n < prompt: the first
                  compaction comes right after the prompt, however it was cut.

Scheduler and workers evaluate it on the same n: no message goes between them. The newest n - C b
tokens are never removed, since a part of a column can't be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvsieve.errors import BudgetError, RecipeError, choices
from kvsieve.interfaces import Moment, Occasion

Policy = Literal["after-prompt", "chunk"]
POLICIES: tuple[Policy, ...] = ("after-prompt", "chunk")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The function above. All lengths are tokens, all columns whole blocks of ``block`` slots.

    ``budget`` and ``interval`` are multiples of ``block``. ``decode=False`` leaves what comes after
    the prompt alone (policy after-prompt only).
    """

    block: int
    budget: int
    interval: int
    policy: Policy = "after-prompt"
    decode: bool = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise RecipeError(f"block={self.block}: a block holds 1 slot or more.")
        if self.budget < self.block or self.budget % self.block:
            raise BudgetError(
                f"A budget of {self.budget} slots is no whole number of blocks of {self.block}."
            )
        if self.interval < self.block or self.interval % self.block:
            raise RecipeError(
                f"An interval of {self.interval} tokens is no whole number of blocks of "
                f"{self.block}."
            )
        if self.policy not in POLICIES:
            raise RecipeError(f"Unknown policy {self.policy!r}. {choices(self.policy, POLICIES)}")
        if not self.decode and self.policy != "after-prompt":
            raise RecipeError("Only the policy after-prompt can leave decoding alone.")

    @property
    def kept(self) -> int:
        """Columns that a compaction leaves, B."""
        return self.budget // self.block

    @property
    def apart(self) -> int:
        """Columns between two compactions, I."""
        return self.interval // self.block

    def dropped(self, n: int, prompt: int = 0) -> int:
        """Return how many leading columns are compacted once ``n`` tokens are cached (0: none)."""
        anchor = self.kept
        if self.policy == "after-prompt":
            if n < prompt:
                return 0
            anchor = max(anchor, prompt // self.block)
        passed = max(0, n // self.block - anchor) // self.apart if self.decode else 0
        columns = anchor + passed * self.apart
        return columns if columns > self.kept else 0

    def held(self, n: int, prompt: int = 0, *, since: int | None = None) -> int:
        """Return the slots held for ``n`` tokens, compacted as of ``since`` tokens (None: n)."""
        columns = self.dropped(n if since is None else since, prompt)
        return n - (columns - self.kept) * self.block if columns else n

    def tail(self, n: int, prompt: int = 0) -> int:
        """Return how many of the newest of ``n`` tokens stand in columns that aren't compacted."""
        return n - self.dropped(n, prompt) * self.block

    def peak(self, length: int, chunk: int) -> int:
        """Return the most blocks that a request of up to ``length`` tokens holds at any time.

        ``chunk``: tokens in one forward, at most.
        """
        whole = -(-length // self.block)
        if self.policy == "after-prompt":
            return whole  # the prompt may be all of it
        return min(whole, self.kept + self.apart + -(-chunk // self.block))


@dataclass(frozen=True)
class ColumnSchedule:
    """``Columns`` as the schedule of a recipe, whose budget must be ``columns.budget`` slots."""

    columns: Columns
    moment: Moment = Moment.AFTER_ATTEND

    @property
    def slack(self) -> int | None:
        return self.columns.interval if self.columns.decode else None

    @property
    def phases(self) -> tuple[str, ...]:
        return ("prefill", "decode") if self.columns.decode else ("prefill",)

    def due(self, occasion: Occasion) -> bool:
        before = self.columns.dropped(occasion.seen - occasion.new, occasion.prompt)
        return self.columns.dropped(occasion.seen, occasion.prompt) > before

    def wait(self, decoded: int) -> int | None:
        return 0 if self.columns.decode else None

    def tail(self, seen: int, prompt: int = 0) -> int:
        """Return the newest tokens, which are in no whole column and stay above the budget."""
        return self.columns.tail(seen, prompt)

    def __str__(self) -> str:
        c = self.columns
        last = f", every {c.interval} tokens" if c.decode else ""
        return f"columns of {c.block} ({c.policy}{last})"
