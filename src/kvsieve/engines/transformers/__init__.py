"""Transformers: ``with attach(model, recipe)`` around ``generate``, or an explicit ``Cache``."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from transformers.cache_utils import DynamicCache

from kvsieve.compose import Recipe
from kvsieve.engines.transformers.engine import (
    Installation,
    installation,
    new_session,
    sieve_layers,
)
from kvsieve.engines.transformers.layer import other_bytes
from kvsieve.errors import EngineError
from kvsieve.report import Report
from kvsieve.session import Session


class Run:
    """What ``attach`` gives: the reports of everything that ran inside.

    Use it as a context manager, once. ``report`` is that of the latest batch, ``reports`` all.
    """

    def __init__(
        self, model: Any, recipe: Recipe, prompt_length: int | None = None, trace: bool = False
    ) -> None:
        self.recipe = recipe
        self._prompt_length, self._trace = prompt_length, trace
        self._installation: Installation = installation(model)
        self._installation.view.check(recipe)
        new_session(self._installation.view, recipe, prompt_length)  # refuses what can't work
        self._followed: list[tuple[Session, list[Any]]] = []
        self._reports: list[Report] | None = None
        self._state = "new"

    def __enter__(self) -> Run:
        if self._state != "new":
            raise EngineError(f"This run is {self._state}. Call kvsieve.attach() again.")
        if self._installation.fresh is not None:
            raise EngineError(
                "A recipe is attached to this model already. Leave that block first, or use "
                "kvsieve.Cache objects, which may coexist."
            )
        self._installation.acquire()
        self._installation.fresh = self._adopt
        self._state = "open"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._installation.fresh = None
        self._installation.release()
        self._state = "closed"
        if kind is None:
            self._reports = self._measure()
        self._followed.clear()

    def _adopt(self, cache: DynamicCache) -> Session:
        view = self._installation.view
        session = new_session(view, self.recipe, self._prompt_length, self._trace)
        sieve_layers(cache, view, session)
        self._followed.append((session, cache.layers))
        return session

    def _measure(self) -> list[Report]:
        ran = [(s, layers) for s, layers in self._followed if s.logical]
        return [session.report(other_bytes(layers)) for session, layers in ran]

    @property
    def reports(self) -> list[Report]:
        """Return one report per batch that ran, in order."""
        return self._measure() if self._reports is None else self._reports

    @property
    def report(self) -> Report:
        """Return the report of the latest batch.

        Raises:
            EngineError: nothing ran with a cache.
        """
        reports = self.reports
        if not reports:
            raise EngineError(
                "Nothing ran under this recipe: call model.generate() (or the model, with "
                "use_cache=True) inside the `with` block."
            )
        return reports[-1]


def attach(
    model: Any, recipe: Recipe, *, prompt_length: int | None = None, trace: bool = False
) -> Run:
    """Return a context in which every new cache of ``model`` is kept under ``recipe``.

    Args:
        model: any causal language model of Transformers >= 5.2.
        recipe: from ``kvsieve.recipe``.
        prompt_length: tokens of the prompt, where it comes in chunks: compression after prefill
            then waits for all of them (as in one shot) instead of following each chunk.
        trace: record which positions stay at every event, as ``report.trace``.

    Raises:
        EngineError: a model that can't be compressed.
        UnsupportedSignal: the method needs something that this model can't show.
    """
    return Run(model, recipe, prompt_length, trace)


class Cache(DynamicCache):
    """A compressed cache to pass as ``past_key_values``; stays usable over several turns.

    The model is switched over while any such cache is open; ``close()`` (or leaving a ``with``
    block) switches it back. Other caches of the same model keep working meanwhile.
    ``prompt_length`` and ``trace`` as in ``attach``.

    Raises:
        EngineError: a model that can't be compressed.
        UnsupportedSignal: the method needs something that this model can't show.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        *,
        prompt_length: int | None = None,
        trace: bool = False,
    ) -> None:
        self._installation = installation(model)
        view = self._installation.view
        view.check(recipe)
        super().__init__(config=view.config)
        self.session = new_session(view, recipe, prompt_length, trace)
        sieve_layers(self, view, self.session)
        self._installation.acquire()
        self._open = True

    def close(self) -> None:
        """Switch the model back, once the last open cache is closed. May be called again."""
        if self._open:
            self._open = False
            self._installation.release()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.close()

    @property
    def report(self) -> Report:
        """Measure what is held now.

        Raises:
            EngineError: nothing has passed through this cache.
        """
        if not self.session.logical:
            raise EngineError("Nothing has passed through this cache yet.")
        return self.session.report(other_bytes(self.layers))
