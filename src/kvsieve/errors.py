"""Every error that kvsieve raises on purpose.

    KVSieveError
    ├── RecipeError               a recipe that can't be built or can't be honoured
    │   ├── UnknownMethod         no method of that name is registered
    │   ├── UnsupportedSignal     a scorer needs something that the engine can't show it
    │   ├── UnsupportedLayout     the store can't hold what the allocator decided
    │   └── BudgetError           a budget that is malformed, too small or too large
    ├── EngineError               a model, cache or generation mode that the engine refuses
    ├── ConversionError           an offline weight conversion that can't be made
    └── ReferenceModelError       a prompt or option that the reference model can't take

A message says what was asked, what is possible and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KVSieveError(Exception):
    """Root of all errors that kvsieve raises on purpose."""


class RecipeError(KVSieveError, ValueError):
    """A recipe that can't be built, or that the engine at hand can't honour."""


class UnknownMethod(RecipeError):
    """No method of that name is registered."""


class UnsupportedSignal(RecipeError):
    """A scorer needs a signal that the engine can't show it."""


class UnsupportedLayout(RecipeError):
    """The store's layout can't hold what the allocator decided."""


class BudgetError(RecipeError):
    """A budget that is malformed, too small for what it protects, or too large."""


class EngineError(KVSieveError, RuntimeError):
    """A model, a cache or a generation mode that the engine refuses."""


class ConversionError(KVSieveError, RuntimeError):
    """An offline weight conversion that can't be made."""


class ReferenceModelError(KVSieveError, ValueError):
    """A prompt or an option that the reference model can't take."""


def choices(asked: str, possible: Iterable[str]) -> str:
    """Return "near matches first, then everything" for a message about a name not found."""
    names = sorted(possible)
    near = difflib.get_close_matches(asked, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"{hint}Possible: {', '.join(names)}."
