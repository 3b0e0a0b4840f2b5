"""What a run really did: bytes from the storages, slots per head, seconds per phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvsieve.errors import EngineError
from kvsieve.store import Store
from kvsieve.trace import Trace

if TYPE_CHECKING:
    from kvsieve.session import Session


class Stopwatch:
    """Wall-clock seconds by phase; work on a GPU is waited for at the ends of a phase only."""

    def __init__(self) -> None:
        self.seconds = {"prefill": 0.0, "decode": 0.0, "compress": 0.0}
        self._started: dict[str, float] = {}
        self._decode_from: float | None = None

    def start(self, phase: str) -> None:
        """Note the start of a forward of that phase."""
        self._started[phase] = time.perf_counter()
        if phase == "prefill":
            self._decode_from = None

    def stop(self, phase: str) -> None:
        """Add a finished forward; decoding also counts what happens between forwards."""
        now = time.perf_counter()
        if phase == "decode" and self._decode_from is not None:
            self.seconds[phase] += now - self._decode_from
        else:
            self.seconds[phase] += now - self._started[phase]
        self._decode_from = now

    @contextmanager
    def part(self, phase: str, device: torch.device) -> Iterator[None]:
        """Time a part of a forward; on a GPU its queue is drained before and after."""
        _drain(device)
        start = time.perf_counter()
        yield
        _drain(device)
        self.seconds[phase] += time.perf_counter() - start


class Chosen:
    """The budgets that a method has chosen: per row, after each decision, the tokens that had
    passed and the slots per head that were kept, the mean over all layers and heads."""

    def __init__(self) -> None:
        self.rows: list[list[tuple[int, float]]] = []

    def add(self, stores: list[Store], rows: Tensor) -> None:
        """Take in what the layers hold now, for those ``rows [B]`` (bool)."""
        held = torch.stack([store.counts for store in stores]).double().mean((0, 2)).tolist()
        seen = stores[0].seen.tolist()
        self.rows = self.rows or [[] for _ in seen]
        for b, decided in enumerate(rows.tolist()):
            if decided:
                self.rows[b].append((seen[b], held[b]))

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index`` of them."""
        self.rows = [list(self.rows[b]) for b in index.tolist()] if self.rows else []


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The measured outcome of one batch of sequences.

    ``bytes_full``: what the stock cache would hold for the same tokens, padding included;
    ``bytes_kept``: held now, spare capacity and columns included; ``bytes_peak``: the most held
    at any moment. All three count the layers that are left alone as they are.
    ``slots[row][layer][head]``: live slots now; ``seen[row]``: tokens that have passed.
    ``seconds``: ``prefill`` and ``decode`` are wall-clock; ``compress`` is a part of both.
    ``chosen[row]``: of a method that chooses its budget (``budget`` is then the cap), after each of
    its decisions the tokens that had passed and the mean slots per head that it kept; else None.
    ``trace``: which positions stayed at every event, if it was asked for; no part of ``to_dict``.
    """

    method: str
    budget: str | None
    bytes_full: int
    bytes_kept: int
    bytes_peak: int
    slots: list[list[list[int]]]
    seen: list[int]
    removed: int
    events: int
    decode_steps: int
    seconds: dict[str, float]
    chosen: list[list[tuple[int, float]]] | None = None
    trace: Trace | None = None

    @property
    def chosen_share(self) -> float | None:
        """Share of its tokens that a row keeps after its last decision, the mean over rows.

        None: the budget was given, or nothing was decided.
        """
        last = [row[-1] for row in self.chosen or [] if row]
        return sum(held / seen for seen, held in last) / len(last) if last else None

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens of all rows per second of decoding (0 when nothing was decoded)."""
        spent = self.seconds["decode"]
        return len(self.seen) * self.decode_steps / spent if spent else 0.0

    @classmethod
    def of(cls, session: Session, other_bytes: int) -> Report:
        """Read a session.

        Raises:
            EngineError: the recipe was due to compress, but nothing was removed.
        """
        report = cls(
            method=session.recipe.method,
            budget=None if session.recipe.budget is None else str(session.recipe.budget),
            bytes_full=session.bytes_full + other_bytes,
            bytes_kept=sum(layer.store.nbytes() + layer.state_bytes() for layer in session.layers)
            + other_bytes,
            bytes_peak=session.bytes_peak + other_bytes,
            slots=_slots(session),
            seen=session.layers[0].store.seen.tolist(),
            removed=session.removed,
            events=session.events,
            decode_steps=session.decode_steps,
            seconds=dict(session.watch.seconds),
            chosen=None if session.chosen is None else session.chosen.rows,
            trace=session.trace,
        )
        if session.owed and not report.removed:
            raise EngineError(
                f"{report.method!r} with a budget of {report.budget} should have compressed "
                f"{max(report.seen)} tokens, but no slot was removed. The numbers of this run are "
                "those of a full cache; please report this."
            )
        return report

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "method": self.method,
            "budget": self.budget,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "cache": {
                "bytes_full": self.bytes_full,
                "bytes_kept": self.bytes_kept,
                "bytes_peak": self.bytes_peak,
                "slots": self.slots,
            },
            "seen": self.seen,
            "removed": self.removed,
            "events": self.events,
            "chosen": self.chosen,
        }

    def __str__(self) -> str:
        share = self.bytes_kept / self.bytes_full if self.bytes_full else 1.0
        heads = [n for row in self.slots for layer in row for n in layer]
        spread = f"{min(heads)}-{max(heads)}" if heads else "0"
        spent = self.seconds
        own = self.chosen_share
        chose = "" if own is None else f", of which it chose {own:.1%} of the tokens"
        return (
            f"{self.method} ({self.budget or 'no budget'}{chose}): {self.bytes_kept:,} of "
            f"{self.bytes_full:,} bytes kept ({share:.1%}), peak {self.bytes_peak:,}; "
            f"{spread} slots per head of {max(self.seen, default=0)} tokens seen; "
            f"prefill {spent['prefill']:.2f} s, decode {spent['decode']:.2f} s, of which compress "
            f"{spent['compress']:.2f} s; {self.tokens_per_second:.1f} tokens/s"
        )


def _slots(session: Session) -> list[list[list[int]]]:
    counts = [layer.store.counts for layer in session.layers if layer.store.slots]
    if not counts:
        return []
    return [[count[b].tolist() for count in counts] for b in range(counts[0].shape[0])]
