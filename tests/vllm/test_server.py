"""`kvsieve serve` answers the official OpenAI client, and its metrics show what was freed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from kvsieve import reference

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

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def metrics(self) -> dict[str, float]:
        """Return kvsieve's metrics by name."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        pairs = (line.split() for line in text.splitlines() if line.startswith("kvsieve"))
        return {name: float(value) for name, value in pairs}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log, port = tmp_path_factory.mktemp("server") / "log", free_port()
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("wb") as out:
        started = subprocess.Popen(
            [sys.executable, "-c", "from kvsieve.cli import main; main()", "serve", *OPTIONS,
             "--port", str(port)],
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


def test_it_answers_streaming_and_not_and_frees_blocks(server: Server) -> None:
    client, task = server.client(), reference.sample("reasoning", seed=3, steps=40)
    asked = {"model": "reference", "prompt": task.prompt, "max_tokens": 400, "temperature": 0}
    whole = client.completions.create(**asked)
    streamed = client.completions.create(**asked, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == whole.choices[0].text
    assert whole.usage is not None and whole.usage.completion_tokens > 200
    counted = server.metrics()
    assert counted["kvsieve_blocks_freed_total"] > 0
    assert counted["kvsieve_compactions_total"] > 0
    assert counted["kvsieve_tokens_evicted_total"] > 0
    assert counted["kvsieve_compaction_seconds_total"] > 0
    assert counted["kvsieve_blocks_held"] == 0, "all requests have ended"
    assert "kvsieve: g-kv: keeps 128 slots per head = 4 blocks of 32" in server.log.read_text()


def test_several_answers_and_stop_strings(server: Server) -> None:
    client, task = server.client(), reference.sample("reasoning", seed=4, steps=40)
    asked = {"model": "reference", "prompt": task.prompt, "max_tokens": 200}
    two = client.completions.create(**asked, n=2, temperature=0)
    assert len(two.choices) == 2 and two.choices[0].text == two.choices[1].text
    word = two.choices[0].text.split()[20]
    stopped = client.completions.create(**asked, temperature=0, stop=[f" {word}"])
    assert stopped.choices[0].finish_reason == "stop"
    assert two.choices[0].text.startswith(stopped.choices[0].text)


def test_a_bad_request_is_a_4xx_and_the_server_stays_up(server: Server) -> None:
    client = server.client()
    for bad in ({"max_tokens": -5}, {"model": "nobody"}, {"temperature": -1}):
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(**({"model": "reference", "prompt": "add"} | bad))
        assert 400 <= caught.value.status_code < 500
    again = client.completions.create(model="reference", prompt="add", max_tokens=2)
    assert again.choices
