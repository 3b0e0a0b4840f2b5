"""Rows of a quality sweep: what they are of, and how they are read back."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvsieve.bench import rows
from kvsieve.bench.quality.plan import DECODE_INTERVAL, Asked, Plan, decode_recent
from kvsieve.bench.rows import Row
from kvsieve.errors import KVSieveError, RecipeError
from kvsieve.reference.origin import weights
from kvsieve.reference.samples import VERSION as TASK_VERSION

KIND, VERSION = "quality", 1
FILE = "quality.jsonl"

IDENTITY = (
    *("kind", "version", "engine", "model", "weights", "task", "task_version", "setting"),
    *("length", "method", "budget", "recipe", "seed", "n", "batch", "device", "dtype", "threads"),
    *("versions", "commit"),
)


def identity(plan: Plan, task: str, setting: str, asked: Asked) -> Row:
    """Return what a row is of; rows that agree in all of it are the same measurement."""
    return {
        "kind": KIND, "version": VERSION, "engine": "transformers", **origin(plan.reference),
        "task": task, "task_version": TASK_VERSION, "setting": setting, "length": plan.length,
        "method": asked.method, "budget": asked.budget,
        "recipe": asked.plain(setting, plan.length),
        "seed": plan.seed, "n": plan.n, "batch": plan.batch,
    }  # fmt: skip


def origin(at: Path | None = None) -> Row:
    """Return where rows of the reference model, or of the checkpoint ``at``, come from."""
    name = "reference" if at is None else at.resolve().name
    return {
        "model": name, "weights": weights(at), "device": "cpu", "dtype": "float32",
        "threads": torch.get_num_threads(), "versions": rows.versions(), "commit": rows.commit(),
    }  # fmt: skip


def key(row: Row, names: tuple[str, ...] = IDENTITY) -> str:
    """Return a row's identity as text."""
    return json.dumps([row[name] for name in names], sort_keys=True)


def asked_options(row: Row) -> dict[str, Any]:
    """Return a recipe's options without method and budget, and without what a sweep adds to every
    recipe while decoding, so that a method has one name in all settings.
    """
    options = {k: v for k, v in row["recipe"].items() if k not in ("method", "budget")}
    if row["setting"] != "decode" or options.get("schedule") != f"every:{DECODE_INTERVAL}":
        return options
    own = {k: v for k, v in options.items() if k not in ("schedule", "recent")}
    if options.get("recent") == _added(row["method"], json.dumps(own, sort_keys=True)):
        return own
    return own | {"recent": options.get("recent")}


@cache
def _added(method: str, options: str) -> int | float | None:
    """Return the recent tokens that a sweep protects while decoding; None: an unknown method."""
    try:
        return decode_recent(method, json.loads(options))
    except KVSieveError:
        return None


def options_text(row: Row) -> str:
    """Return the options that were asked for, as in ``METHOD:OPTION=VALUE``."""
    return " ".join(f"{name}={value}" for name, value in asked_options(row).items())


def read(path: Path, kind: str = KIND, version: int = VERSION) -> list[Row]:
    """Return a file's rows; a line that a killed run left unfinished is skipped.

    Raises:
        RecipeError: rows of another kind or version, or a file that is none of ours.
    """
    found: list[Row] = []
    for number, row in rows.parsed(path):
        if not rows.is_of(row, kind, version):
            raise RecipeError(
                f"{str(path)!r}, line {number}, is no row of kind {kind!r}, version {version}. "
                "Rows of several versions must not be mixed: measure into a new folder."
            )
        found.append(row)
    return found
