"""The parts a recipe is made of. READ THIS FIRST.

    Recipe = Scorer -> Allocator -> Compressor, when a Schedule says so, on a Store

One layer's cache is a table: rows are *slots*, and whatever must follow a token is a *column*.
A scorer says how much each slot matters, an allocator how many slots each head may keep, a
compressor what happens to the rest, a schedule when. None of them holds per-sequence state: it
lives in the table's columns, so that keeping, reordering and dropping slots moves it along.

Letters: L layers, B sequences (rows), H KV heads, G query heads per KV head, T queries of this
forward, S slots, D head dimension, W window, C hidden size. Order ``[B, H, S, D]``; grouped
queries are explicit as ``[B, H, G, T, D]``, and keys are never repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvsieve.prediction import Prediction
    from kvsieve.step import Step
    from kvsieve.store import Store


class Signal(Enum):
    """What a scorer or compressor may need beyond the keys; checked before anything runs."""

    QUERY_WINDOW = "query window"  # the last W queries, also across forwards
    ATTENTION_SUMS = "attention sums"  # attention of every query of every forward
    VALUES = "values"  # the cached values are the model's values, not latents
    PRE_ROPE = "pre-rotation queries"  # queries can be un-rotated by their positions
    REROTATION = "re-rotation of keys"  # keys can be moved to other positions
    W_O = "output projection"  # the attention module's output matrix
    STATISTICS = "statistics of the model"  # measured beforehand, by `kvsieve calibrate`
    REPLAY = "replay of the prompt"  # extra forwards over the prompt, with token ids at hand
    LOGITS = "logits"  # what the model predicts after each forward
    BEFORE_ATTEND = "eviction before attention"  # nothing reads the table before it attends


class Scope(Enum):
    """How much must be seen before the slot counts of a head can be decided."""

    HEAD = "head"
    LAYER = "layer"
    MODEL = "model"


class Moment(Enum):
    """When, within a decode step, a layer is compressed. Prompts are always compressed after."""

    BEFORE_ATTEND = "before attention"  # the token is stored, its query has seen nothing yet
    AFTER_ATTEND = "after attention"


@dataclass(frozen=True, kw_only=True)
class Column:
    """Per-slot state that the table carries: one value per (row, head, slot).

    ``fill`` is what a new slot starts with; ``of_key``: it was made from the key where it stood, so
    that keys must not move.
    """

    name: str
    fill: float = 0.0
    dtype: torch.dtype = torch.float32
    of_key: bool = False


@dataclass(frozen=True, kw_only=True)
class Occasion:
    """What a schedule looks at: where in the run we are.

    ``decoded`` counts the single-token forwards since the last prompt part, this one included;
    ``slots`` is the largest number of live slots in any (row, head) of the layer; ``seen`` the
    row's tokens that will have passed with this forward, ``new`` of them its own; ``prompt`` the
    prompt's length where it is known, else 0; ``turns`` the complete prompts that came before.
    """

    prefill: bool
    prompt_complete: bool
    decoded: int
    slots: int
    seen: int = 0
    new: int = 0
    prompt: int = 0
    turns: int = 0


@dataclass(frozen=True, kw_only=True)
class Round:
    """What an allocator decides on: the layers of its scope, at one moment.

    ``budgets``: mean slots per head allowed in each row, ``[B]`` int64 on the CPU;
    ``layers``: ordinals of the layers among the ``layer_count`` compressed ones;
    ``live``: per layer, live slots ``[B, H]``; ``window``: protected recent slots; ``seen``: tokens
    that have passed in each row, ``[B]`` (None: as many as the fullest head of the layer holds);
    ``prediction``: what the model predicted before this decode step, for allocators that need
    ``Signal.LOGITS`` (None in a prompt).
    """

    budgets: Tensor
    layers: tuple[int, ...]
    layer_count: int
    live: list[Tensor] = field(default_factory=list)
    window: int = 0
    seen: Tensor | None = None
    prediction: Prediction | None = None


@runtime_checkable
class Scorer(Protocol):
    """How much does each slot matter?"""

    @property
    def needs(self) -> frozenset[Signal]: ...

    @property
    def columns(self) -> tuple[Column, ...]: ...

    @property
    def window(self) -> int:
        """Number of recent queries to remember across forwards (0: none)."""
        ...

    @property
    def moments(self) -> int | None:
        """Whether the step should show moments of the prompt's queries before rotation, and how
        many first positions they leave out (None: no moments)."""
        ...

    def observe(self, step: Step, store: Store) -> None:
        """Update running columns; called once per layer after every forward."""
        ...

    def score(self, step: Step, store: Store) -> Tensor:
        """Return scores ``[B, H, S]`` in fp32, higher is kept; +inf protects, -inf condemns.

        May write the scorer's own columns; never touches keys or values.
        """
        ...


class Allocator(Protocol):
    """How many slots may each head of each layer keep?"""

    @property
    def scope(self) -> Scope: ...

    def allocate(self, scores: list[Tensor], round: Round) -> list[Tensor]:
        """Return per layer the counts ``[B, H]`` int64; sums are exact, ties break by index."""
        ...


class Compressor(Protocol):
    """What happens to the slots that may not stay?"""

    @property
    def needs(self) -> frozenset[Signal]: ...

    def compress(self, step: Step, store: Store, scores: Tensor, counts: Tensor) -> None:
        """Bring every head of ``store`` down to ``counts`` slots ``[B, H]``.

        Where the allocator decides over the whole model, ``step`` has no queries left.
        """
        ...


class Schedule(Protocol):
    """When is the cache compressed?"""

    def due(self, occasion: Occasion) -> bool: ...

    @property
    def slack(self) -> int | None:
        """Slots above the budget a head may hold between two forwards while decoding.

        None: the budget is not enforced while decoding.
        """
        ...

    @property
    def phases(self) -> tuple[str, ...]: ...

    @property
    def moment(self) -> Moment:
        """When, within the decode steps that are due."""
        ...

    def wait(self, decoded: int) -> int | None:
        """Decode steps after the ``decoded``-th until it may be due next.

        0: it may be due now; None: never while decoding.
        """
        ...

    def tail(self, seen: int, prompt: int = 0) -> int:
        """Newest tokens that a compression after ``seen`` tokens leaves alone, above the budget."""
        ...


class ScorerDefaults:
    """What most scorers leave as it is: no needs, no columns, no window, nothing to observe."""

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset()

    @property
    def columns(self) -> tuple[Column, ...]:
        return ()

    @property
    def window(self) -> int:
        return 0

    @property
    def moments(self) -> int | None:
        return None

    def observe(self, step: Step, store: Store) -> None:
        """Keep no running state."""
