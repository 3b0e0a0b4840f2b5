"""What rows of any model are of: where they come from, when two are the same measurement."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvsieve.bench import rows
from kvsieve.bench.quality.plan import Asked
from kvsieve.bench.rows import Row
from kvsieve.errors import RecipeError

_SAMPLE = 1 << 16
"""Bytes read at either end of a weight file."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that rows are of: its name, a fingerprint of its weights, how it runs."""

    model: str
    weights: str
    device: str
    dtype: str

    @classmethod
    def of(cls, name: str, model: Any, folder: Path | None) -> Subject:
        """Describe a loaded model; ``folder``: where its weights lie, if that is known."""
        known = getattr(model.config, "_commit_hash", None)
        return cls(
            model=name,
            weights=fingerprint(folder) if folder is not None else known or "unknown",
            device=model.device.type,
            dtype=str(model.dtype).removeprefix("torch."),
        )


def fingerprint(folder: Path) -> str:
    """Return a short hash of a checkpoint: names, sizes and both ends of its weight files.

    Raises:
        RecipeError: no weight files.
    """
    found = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt"))
    if not found:
        raise RecipeError(f"{str(folder)!r} has no weight files.")
    digest = hashlib.sha256()
    for path in found:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]


def origin(subject: Subject, asked: Asked) -> Row:
    """Return what every kind of row says about where it comes from."""
    return {
        **asdict(subject),
        "engine": "transformers",
        "method": asked.method,
        "budget": asked.budget,
        # What is read back from a file has lists where Python has tuples.
        "recipe": json.loads(json.dumps(asked.plain("", 0))),
        "threads": torch.get_num_threads(),
        "versions": rows.versions(),
        "commit": rows.commit(),
    }


def key(row: Row, figures: Collection[str]) -> str:
    """Return a row's identity, everything but its figures, as text."""
    return json.dumps({n: x for n, x in row.items() if n not in figures}, sort_keys=True)
