"""Rows of a measurement: what they hold, when two are the same, how they are kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

import kvsieve
from kvsieve.errors import RecipeError

Row = dict[str, Any]

KIND, VERSION = "speed", 1

# What makes two cells the same; the rest are figures.
IDENTITY = (
    *("kind", "version", "engine", "method", "budget", "options", "model", "context", "batch"),
    *("dtype", "device", "threads", "steps", "cpu", "versions", "commit"),
)


def key(row: Row, identity: Sequence[str] = IDENTITY) -> str:
    """Return what a row is of, as text: equal for the same cell under the same settings."""
    return json.dumps([row[name] for name in identity], sort_keys=True)


def read(path: Path, kind: str = KIND, version: int = VERSION) -> list[Row]:
    """Return a file's rows of a kind; a line that a killed run left unfinished is skipped."""
    return [row for _, row in parsed(path) if is_of(row, kind, version)]


def parsed(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the JSON values of a file with their line numbers (none without the file).

    Lines that a killed run left unfinished are skipped.
    """
    text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        yield number, value


def is_of(row: Any, kind: str, version: int) -> bool:
    """Return whether a JSON value is a row of that kind and version."""
    return isinstance(row, dict) and (row.get("kind"), row.get("version")) == (kind, version)


def append(path: Path, row: Row) -> None:
    """Add a row; it is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("ab") as file:
        file.write((b"" if whole else b"\n") + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@cache
def cpu() -> str:
    """Return the processor's name and how many of it there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} x{os.cpu_count()}"


@cache
def commit() -> str | None:
    """Return the last commit that changed the package, "+" if it was changed since."""
    found = _git("log", "-1", "--format=%h", "--", ".")
    return found and found + ("+" if _git("status", "--porcelain", "--", ".") else "")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Return the versions that the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvsieve": kvsieve.__version__,
    }


def failure(error: Exception) -> Row:
    """Return the end of a row that has no figures: why, and whether kvsieve refused on purpose."""
    refused = isinstance(error, RecipeError)
    return {"error": f"{type(error).__name__}: {error}", "refused": refused}
