"""Where figures of the reference model come from."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from kvsieve.reference.loader import folder


@cache
def weights(at: Path | None = None) -> str:
    """Return a hash of the weights of the shipped model, or of another checkpoint."""
    read = ((at or folder()) / "model.safetensors").read_bytes()
    return hashlib.sha256(read).hexdigest()[:16]


def origin(at: Path | None = None) -> dict[str, Any]:
    """Return the commit of the working directory, the weights' hash and the versions, for a row.

    ``at``: another checkpoint than the shipped one.
    """
    from kvsieve.bench.rows import versions

    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "commit": found.stdout.strip() or "unknown",
        "weights": weights(at),
        "versions": versions(),
    }
