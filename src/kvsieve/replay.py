"""Repeating a prompt to its own cache: what KVzip-like scorers ask an engine to run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvsieve.errors import UnsupportedSignal


@dataclass(frozen=True, kw_only=True)
class Running:
    """The round in progress: ``live [B, R]`` (None: all), ``span [B, 2]`` of repeated positions."""

    live: Tensor | None
    span: Tensor


class Replay:
    """Remembers the tokens since the last decision and cuts them into rounds.

    A round feeds, row by row, ``scorer.repeat_ids``, the last ``scorer.overlap`` tokens before
    the chunk, and the chunk of ``scorer.chunk`` tokens itself; what it stores is dropped again.
    With a chunk of 0 there is one round, of ``scorer.repeat_ids`` alone.
    """

    def __init__(self, scorer: Any) -> None:
        self.chunk: int = scorer.chunk
        self.overlap: int = scorer.overlap
        self.repeat_ids: tuple[int, ...] = scorer.repeat_ids
        self.running: Running | None = None
        self._rows: list[list[Tensor]] = []

    def remember(self, ids: Tensor | None, live: Tensor | None) -> None:
        """Take in the token ids ``[B, T]`` of a forward.

        Raises:
            UnsupportedSignal: the model was fed embeddings, so there are no ids to repeat.
        """
        if ids is None:
            raise UnsupportedSignal(
                "This method repeats the prompt and needs token ids; the model was fed embeddings."
            )
        if not self._rows:
            self._rows = [[] for _ in range(ids.shape[0])]
        for b, row in enumerate(self._rows):
            row.append(ids[b] if live is None else ids[b][live[b]])

    def select_rows(self, index: Tensor) -> None:
        """Replace the rows by ``index`` of them."""
        self._rows = [list(self._rows[b]) for b in index.tolist()] if self._rows else []

    def rounds(self, seen: Tensor, owing: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(ids [B, R], positions [B, R])`` for each chunk; consumes what was remembered.

        ``seen [B]`` are the rows' lengths; ``running`` describes the round while it runs. Rows
        that are not ``owing [B]`` (bool) repeat nothing, and go on being remembered.
        """
        whole = [torch.cat(parts) for parts in self._rows]
        due = owing.tolist()
        rows = [row if now else row[:0] for row, now in zip(whole, due, strict=True)]
        self._rows = [[] if now else [row] for row, now in zip(whole, due, strict=True)]
        longest = max(len(row) for row in rows)
        for start in range(0, longest, self.chunk or longest):
            fed = [self._fed(row, start) for row in rows]
            R = max(len(row) for row in fed)
            ids = torch.stack([torch.cat([row, row.new_zeros(R - len(row))]) for row in fed])
            lengths = torch.tensor([len(row) for row in fed], device=ids.device)
            live = torch.arange(R, device=ids.device) < lengths[:, None]
            span = torch.tensor(
                [
                    [
                        int(n) - len(row) + min(start, len(row)),
                        int(n) - len(row) + min(start + self.chunk, len(row)),
                    ]
                    for row, n in zip(rows, seen, strict=True)
                ],
                device=ids.device,
            )
            self.running = Running(live=None if bool(live.all()) else live, span=span)
            yield ids, seen.to(ids.device)[:, None] + torch.arange(R, device=ids.device)
        self.running = None

    def _fed(self, row: Tensor, start: int) -> Tensor:
        chunk = row[start : start + self.chunk]
        if not self.chunk and len(row):
            return row.new_tensor(self.repeat_ids)
        if not len(chunk):
            return chunk
        before = row[max(0, start - self.overlap) : start]
        return torch.cat([row.new_tensor(self.repeat_ids), before, chunk])
