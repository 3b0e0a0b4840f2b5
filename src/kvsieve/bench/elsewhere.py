"""vLLM in a process of its own, asked once: JSON in on its standard input, JSON out on a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

MARK = "KVSIEVE-FIGURES "

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def answered(module: str, asked: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Run ``python -m module`` on ``threads`` threads and return what it made of ``asked``.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module],
        input=json.dumps(asked),
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return json.loads(line[len(MARK) :])
    raise RuntimeError(f"vLLM failed: {(done.stderr or done.stdout).strip()[-800:]}")


def answer(make: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Be that process: read what is asked, and print what ``make`` makes of it."""
    figures = make(json.load(sys.stdin))
    print(MARK + json.dumps(figures), flush=True)


def vllm_version() -> str:
    """Return the version of vLLM that is installed."""
    from kvsieve.engines.vllm.compat import version

    return version()
