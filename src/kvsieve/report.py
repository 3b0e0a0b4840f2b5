"""What a run really did: bytes from the storages, slots per head, seconds per phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvsieve.errors import EngineError

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
        }

    def __str__(self) -> str:
        share = self.bytes_kept / self.bytes_full if self.bytes_full else 1.0
        heads = [n for row in self.slots for layer in row for n in layer]
        spread = f"{min(heads)}-{max(heads)}" if heads else "0"
        spent = self.seconds
        return (
            f"{self.method} ({self.budget or 'no budget'}): {self.bytes_kept:,} of "
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
