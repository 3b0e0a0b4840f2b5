"""Where figures of the reference model come from."""

from __future__ import annotations

import hashlib
import subprocess
from functools import cache
from typing import Any

from kvsieve.reference.loader import folder


@cache
def weights() -> str:
    """Return a hash of the reference model's weights."""
    return hashlib.sha256((folder() / "model.safetensors").read_bytes()).hexdigest()[:16]


def origin() -> dict[str, Any]:
    """Return the commit of the working directory, the weights' hash and the versions, for a row."""
    from kvsieve.bench.rows import versions

    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "commit": found.stdout.strip() or "unknown",
        "weights": weights(),
        "versions": versions(),
    }
