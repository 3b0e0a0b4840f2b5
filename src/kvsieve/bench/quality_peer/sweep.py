"""kvpress's rows of a quality sweep: its cells, for the methods that it has too.

On lookups kvpress compresses once, after what is read under the press, and not what comes later:
question and answer stay whole, where kvsieve's rows hold their budget while the answer is written,
too. On chains a DecodingPress cuts to the same slots at the same steps; it protects no last tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvsieve.bench.plan import PEER_DECODES, PEER_METHODS, PEER_REPLAYS
from kvsieve.bench.quality.plan import Asked, Plan
from kvsieve.bench.quality.rows import identity, key
from kvsieve.bench.quality_peer.answering import Answered, Asking
from kvsieve.bench.remote import Peer
from kvsieve.bench.rows import Row, failure
from kvsieve.reference import Sample
from kvsieve.reference.loader import folder

Progress = Callable[[str, int], None]


def asked(plan: Plan, setting: str) -> list[Asked]:
    """Return what kvpress has too: the methods it shares in a setting, with their defaults."""
    shared = PEER_DECODES if setting == "decode" else PEER_METHODS | PEER_REPLAYS
    return [
        one
        for one in plan.asked()
        if one.method == "full" or (one.method in shared and not one.options)
    ]


def peer_identity(plan: Plan, task: str, setting: str, one: Asked, peer: Peer) -> Row:
    """Return what a row is of: as a row of ours, with kvpress's engine and versions."""
    row = identity(plan, task, setting, one)
    versions = {"kvsieve": row["versions"]["kvsieve"], **peer.versions}
    return row | {"engine": "kvpress", "versions": versions, "batch": 1}


def identities(plan: Plan, peer: Peer) -> list[Row]:
    """Return the cells, in order."""
    return [
        peer_identity(plan, task, setting, one, peer)
        for task, setting in plan.cells()
        for one in asked(plan, setting)
    ]


def measure(
    plan: Plan,
    peer: Peer,
    tokenizer: Any,
    config: Any,
    done: Container[str] = (),
    progress: Progress = lambda cell, prompts: None,
) -> Iterator[Row]:
    """Yield a row per cell that is not ``done`` (by ``quality.rows.key``).

    A cell that can't be measured has an ``error``. ``peer`` is to have as many threads as torch
    has here; ``config`` is the reference model's; ``progress`` is told the cell and the prompts
    answered since.
    """
    asking: Asking | None = None
    for task, setting in plan.cells():
        named = asked(plan, setting)
        wanted = [(one, peer_identity(plan, task, setting, one, peer)) for one in named]
        wanted = [(one, row) for one, row in wanted if key(row) not in done]
        if wanted:
            asking = asking or _opened(peer, tokenizer, config, plan.reference)
            cell = _Cell(asking, plan.samples(task), setting, plan.length, progress)
            for one, row in wanted:
                cell.name = f"{task} {setting}: kvpress {one.method} {one.budget or ''}".rstrip()
                yield row | cell.figures(one)


def _opened(peer: Peer, tokenizer: Any, config: Any, at: Path | None) -> Asking:
    return Asking(
        peer=peer, at=at or folder(), tokenizer=tokenizer, token_bytes=token_bytes(config)
    )


@dataclass
class _Cell:
    """The same prompts for every press, and the stock cache's answers to them."""

    asking: Asking
    samples: list[Sample]
    setting: str
    length: int
    progress: Progress
    name: str = ""
    full: Answered | None = None

    def figures(self, one: Asked) -> Row:
        """Measure; whatever goes wrong becomes the row's error, and the sweep goes on."""
        try:
            if self.full is None:
                self.full = self._answers(None, None, told=one.method == "full")
            found = self.full
            if one.method != "full":
                found = self._answers(one.method, one.budget, told=True)
            return found.figures(self.full) | {"error": None, "refused": False}
        except Exception as error:  # recorded in the row; the exit code tells
            self.progress(self.name, 0)
            return failure(error)

    def _answers(self, method: str | None, budget: str | None, told: bool) -> Answered:
        def note() -> None:
            self.progress(self.name, int(told))

        length = self.length if self.setting == "decode" else None
        return self.asking.answers(method, budget, self.samples, self.setting, note, length)


def token_bytes(config: Any) -> int:
    """Return what a token's keys and values take in a model of this configuration, in fp32."""
    return 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
