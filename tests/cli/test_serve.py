"""`kvsieve serve` and `kvsieve bench serve`: what reaches vLLM, and what is refused before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import kvsieve
from kvsieve.bench import rows, served
from kvsieve.bench.serving import IDENTITY, KIND, VERSION, Load, identity
from kvsieve.cli.bench_serve import single_load
from kvsieve.cli.serve import plugin_config, server_command, split_model
from kvsieve.engines.vllm.settings import Settings

from .support import call

module = import_module("kvsieve.cli.serve")  # the package has the command under this name

GOOD = ("--method", "g-kv", "--budget", "1024")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((), "Name a --method"),
        (("--method", "g-kv"), "needs a budget"),
        (("--method", "adakv", "--budget", "64"), "Nearest possible recipe: snapkv"),
        ((*GOOD, "--policy", "chunked"), "Did you mean 'chunk'"),
        ((*GOOD, "--additional-config", "{}"), "set by `kvsieve serve`"),
        ((*GOOD, "--enable_prefix_caching"), "set by `kvsieve serve`"),
        ((*GOOD, "--model=x"), "set by `kvsieve serve`"),
        (("--recipe", "/no/such.toml"), "Can't read the recipe"),
    ],
)
def test_bad_input(given: Sequence[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "run", lambda command: pytest.fail("a server was started"))
    called = call("serve", *given)
    assert called.code == 2 and says in called.err, called.err


def test_vllm_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for command in (("serve", *GOOD), ("bench", "serve", "--methods", "full,keydiff")):
        called = call(*command)
        assert called.code == 2 and "kvsieve[vllm]" in called.err


def test_what_reaches_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setattr(module, "run", lambda command: seen.append(command) or 0)
    called = call(
        "serve", "Qwen/Qwen3-8B", *GOOD, "--set", "window=8", "--port", "8001", "--api-key=k"
    )
    assert called.code == 0, called.err
    (command,) = seen
    assert command[command.index("--model") + 1] == "Qwen/Qwen3-8B"
    assert "--no-enable-prefix-caching" in command
    assert command[-3:] == ["--port", "8001", "--api-key=k"]
    config = json.loads(command[command.index("--additional-config") + 1])
    read = Settings.read(config)
    assert read is not None and read.recipe == kvsieve.recipe("g-kv", budget=1024, window=8)


def test_without_a_model_the_reference_model_is_served() -> None:
    assert split_model(["--port", "1"]) == (None, ["--port", "1"])
    assert split_model(["m", "--port", "1"]) == ("m", ["--port", "1"])
    command = server_command(None, plugin_config(kvsieve.recipe("keydiff", budget=64), "chunk"), [])
    assert command[command.index("--served-model-name") + 1] == "reference"


SERVER = """
import os, signal, sys, time
print(sorted(os.listdir(os.environ["PROMETHEUS_MULTIPROC_DIR"])), flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
print("up", flush=True)
time.sleep(60)
"""

PARENT = """
import sys
from kvsieve.cli.serve import run
sys.exit(run([sys.executable, "-c", sys.argv[1]]))
"""


@pytest.mark.parametrize("code", [0, 3])
def test_signals_and_exit_codes_pass(code: int) -> None:
    started = subprocess.Popen(
        [sys.executable, "-c", PARENT, SERVER.format(code=code)],
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert started.stdout is not None
    assert started.stdout.readline().strip() == "[]"
    assert started.stdout.readline().strip() == "up"
    time.sleep(0.1)
    started.send_signal(signal.SIGTERM)
    assert started.wait(30) == code
    started.stdout.close()


def test_rows_have_a_kind_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvsieve.bench.serving.vllm_version", lambda: "0.32.0")
    load = Load(model="/some/model", load="2x8+4", kv_blocks=9)
    row = identity(load, "keydiff", {"method": "keydiff", "budget": 64}, 0)
    assert row["model"] == "model" and row["versions"]["vllm"] == "0.32.0"
    figures = {"steps": 5, "preemptions": 0, "mean_running": 1.5, "most_running": 2, "seconds": 2.0}
    figures |= {"tokens_per_second": 4.0, "event_in_steps": 1.25}
    path = tmp_path / "serve.jsonl"
    rows.append(path, row | figures)
    assert rows.read(path) == [] and rows.read(path, KIND, VERSION) == [row | figures]
    assert rows.key(row, IDENTITY) != rows.key(row | {"round": 1}, IDENTITY)
    rows.append(path, row | figures | {"method": "knorm", "tokens_per_second": 6.0})
    shown = call("bench", "serve", "--table", str(path))
    assert shown.code == 0 and "2x8+4" in shown.out
    assert "1.2" in shown.out and "1.50" in shown.out, "an event in steps, speed over the first"
    empty = call("bench", "serve", "--table", str(tmp_path / "none.jsonl"))
    assert empty.code == 2 and "no rows" in empty.err


def test_loads_are_read_and_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load(model="m", load="3x200+600, 1x50+1500", kv_blocks=9)
    assert load.sizes() == [(200, 600), (50, 1500), (200, 600), (200, 600)]
    assert load.longest == 1550
    monkeypatch.setattr(module, "find_spec", lambda name: pytest.fail("too late"))
    for bad in ("16", "0x200+600", "16x200", "16x200+600,", "16x200+-1"):
        called = call("bench", "serve", "--methods", "full", "--load", bad)
        assert called.code == 2 and "16x200+600" in called.err, called.err


def test_a_single_load_may_be_given_in_parts() -> None:
    parts = {"--requests": None, "--prompt": 50, "--output": None}
    assert single_load(None, parts) == "16x50+600"
    assert single_load(["2x3+4"], dict.fromkeys(parts)) == "16x200+600"  # not asked for
    called = call("bench", "serve", "--load", "1x2+3", "--output", "9")
    assert called.code == 2 and "--output and --load" in called.err, called.err


def test_bad_questions_to_two_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: pytest.fail("too late"))
    for given, says in (
        (("--tasks", "reasonning"), "Did you mean 'reasoning'"),
        (("--n", "0"), "1 or more"),
        (("--methods", "adakv"), "Nearest possible recipe: snapkv"),
    ):
        called = call("bench", "served", *given)
        assert called.code == 2 and says in called.err, called.err


def test_transformers_follows_what_vllm_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines get the same recipe at the same columns; vLLM is left out of this."""
    seen: list[dict[str, Any]] = []

    def vllm(name: str, asked: dict[str, Any], threads: int) -> dict[str, Any]:
        seen.append(asked)
        return {"tokens": [[5, 2], [2]], "compactions": 3, "preemptions": 0}

    monkeypatch.setattr(served, "answered", vllm)
    monkeypatch.setattr(served, "vllm_version", lambda: "0.32.0")
    plan = served.Plan(tasks=("reasoning",), length=128, n=2)
    config = {"method": "keydiff", "budget": 64, "interval": 32}
    (row,) = served.measure(plan, {"keydiff": config})
    assert row["vllm"]["right"] == [0, 0] and row["same_tokens"] == 0
    samples = plan.samples("reasoning")
    assert [len(p) for p in seen[0]["prompts"]] == [len(s.prompt.split()) for s in samples]
    assert row["compactions"] == 3 and rows.key(row, served.IDENTITY)
    (full,) = served.measure(plan, {"full": None})
    assert full["transformers"]["score"] == 1.0
    built = served.as_served(config, 32)
    assert str(built.schedule) == "columns of 32 (after-prompt, every 32 tokens)"
    assert list(served.measure(plan, {"full": None}, {rows.key(full, served.IDENTITY)})) == []
