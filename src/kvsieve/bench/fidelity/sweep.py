"""The sweep: every source of text, method and budget as a cell, each a row when it is done."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvsieve.bench import ledger
from kvsieve.bench.asked import recipe_of
from kvsieve.bench.fidelity.cell import figures
from kvsieve.bench.fidelity.texts import Source
from kvsieve.bench.fidelity.trace import Trace, stock
from kvsieve.bench.ledger import Subject
from kvsieve.bench.quality.plan import Asked
from kvsieve.bench.rows import Row, failure

KIND, VERSION = "fidelity", 1
FILE = "fidelity.jsonl"
FIGURES = frozenset(
    (
        *("tokens", "kl", "agreement", "loss", "loss_full", "layer_error", "attention_error"),
        *("bins", "cache", "seconds", "error", "refused"),
    )
)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to measure: every source under every recipe.

    The stock cache's traces of one source are held at a time: n T (V + (L + A) C) numbers in fp32.
    """

    subject: Subject
    sources: Sequence[Source]
    asked: Sequence[Asked]
    prefix: int
    continuation: int
    seed: int | None

    def identity(self, source: Source, asked: Asked) -> Row:
        """Return what a row is of; rows that agree in all of it are the same measurement."""
        return {
            "kind": KIND,
            "version": VERSION,
            **source.facts,
            "prefix": self.prefix,
            "continuation": self.continuation,
            "n": len(source.texts),
            "seed": self.seed,
            **ledger.origin(self.subject, asked),
        }

    def identities(self) -> list[Row]:
        """Return the cells, in order."""
        return [self.identity(source, asked) for source in self.sources for asked in self.asked]


def key(row: Row) -> str:
    """Return a row's identity as text."""
    return ledger.key(row, FIGURES)


Progress = Callable[[str, int], None]


def measure(
    sweep: Sweep,
    model: Any,
    done: Container[str] = (),
    progress: Progress = lambda cell, texts: None,
) -> Iterator[Row]:
    """Yield a row per cell that is not ``done`` (by ``key``).

    A cell that can't be measured has an ``error``; ``refused`` tells a recipe that kvsieve refuses
    from a failure. ``progress`` is told the cell and the texts followed since.
    """
    for source in sweep.sources:
        wanted = [(asked, sweep.identity(source, asked)) for asked in sweep.asked]
        wanted = [(asked, row) for asked, row in wanted if key(row) not in done]
        if not wanted:
            continue
        progress(f"{source.name}: the stock cache", 0)
        full = [stock(model, text) for text in source.texts]
        for asked, row in wanted:
            yield row | _figures(model, source, asked, full, progress)


def _figures(
    model: Any, source: Source, asked: Asked, full: list[Trace], progress: Progress
) -> Row:
    shown = f"{source.name}: {asked.method} {asked.budget or ''}".rstrip()
    try:
        built = recipe_of(asked)
        found = figures(model, built, source.texts, full, lambda: progress(shown, 1))
    except Exception as error:  # recorded in the row; the exit code tells
        progress(shown, 0)
        return failure(error)
    return found | {"error": None, "refused": False}
