"""vLLM's server as `kvsieve serve` starts it, for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPTIONS = (
    *("--method", "g-kv", "--budget", "128", "--set", "interval=64", "--host", "127.0.0.1"),
    *("--enforce-eager", "--block-size", "32", "--dtype", "float32", "--max-num-seqs", "32"),
    *("--num-gpu-blocks-override", "129"),
)


@dataclass
class Server:
    """A running server: its address and what it said."""

    url: str
    log: Path

    def client(self) -> Any:
        """Return an OpenAI client that doesn't try again."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def metrics(self, *prefixes: str) -> dict[str, float]:
        """Return metrics by name (kvsieve's, or those that begin with one of ``prefixes``)."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        wanted = prefixes or ("kvsieve",)
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith(wanted))
        return {name.partition("{")[0]: float(value) for name, value in pairs}

    def preemptions(self) -> float:
        """Return how often requests were preempted; one is counted before its answer ends."""
        return self.metrics("vllm:num_preemptions_total")["vllm:num_preemptions_total"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started_server(log: Path, *more: str) -> Iterator[Server]:
    """Start a server with ``more`` options and stop it again; what it says goes to ``log``."""
    port = free_port()
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("wb") as out:
        started = subprocess.Popen(
            [sys.executable, "-c", "from kvsieve.cli import main; main()", "serve", *OPTIONS,
             *more, "--port", str(port)],
            env=env, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        made = Server(f"http://127.0.0.1:{port}", log)
        try:
            _wait(made, started)
            yield made
        finally:
            started.terminate()
            code = started.wait(60)
    assert code == 0


def _wait(server: Server, started: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 600
    while time.monotonic() < until:
        assert started.poll() is None, server.log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not start: {server.log.read_text()[-3000:]}")
