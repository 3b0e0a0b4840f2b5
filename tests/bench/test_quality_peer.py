"""kvpress's rows of a quality sweep: a stand-in of kvpress here, the real one where it is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvsieve import reference
from kvsieve.bench.plan import PEER_DECODES, PEER_METHODS, PEER_REPLAYS
from kvsieve.bench.quality.plan import Plan
from kvsieve.bench.quality.rows import identity, key, read
from kvsieve.bench.quality.sweep import measure as ours
from kvsieve.bench.quality_peer import sweep as s
from kvsieve.bench.quality_peer.answering import slots
from kvsieve.bench.quality_peer.table import best_of_both, markdown, pairs
from kvsieve.bench.remote import Peer
from kvsieve.cli import app
from kvsieve.errors import RecipeError, ReferenceModelError
from kvsieve.reference import load
from kvsieve.reference.loader import folder
from kvsieve.registry import methods

# KnormPress as in kvpress: keys of small norm stay, once, after the first forward. The others stand
# for a process that ends, and for cuts while decoding.
STAND_IN = """
import os
from contextlib import contextmanager
@contextmanager
def after_attention(model, cut):
    def hook(module, args, kwargs, output):
        cut(module.layer_idx, kwargs["past_key_values"].layers[module.layer_idx])
    layers = model.model.layers
    hooks = [x.self_attn.register_forward_hook(hook, with_kwargs=True) for x in layers]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
class KnormPress:
    def __init__(self, compression_ratio):
        self.compression_ratio = compression_ratio
    def __call__(self, model):
        def cut(number, layer):
            n = max(1, int(layer.keys.shape[2] * (1 - self.compression_ratio)))
            index = (-layer.keys.norm(dim=-1)).topk(n, dim=-1).indices[..., None]
            index = index.expand(-1, -1, -1, layer.keys.shape[-1])
            layer.keys = layer.keys.gather(2, index)
            layer.values = layer.values.gather(2, index)
        return after_attention(model, cut)
class StreamingLLMPress:
    def __init__(self, compression_ratio, n_sink):
        self.compression_ratio = compression_ratio
    def __call__(self, model):
        os._exit(3)
class DecodingPress:
    def __init__(self, base_press, compression_interval, target_size):
        self.base_press, self.interval, self.size = base_press, compression_interval, target_size
    def __call__(self, model):
        steps = [0] * len(model.model.layers)
        def cut(number, layer):
            steps[number] += 1
            if steps[number] % self.interval == 0 and layer.keys.shape[2] > self.size:
                layer.keys = layer.keys[:, :, -self.size:].clone()
                layer.values = layer.values[:, :, -self.size:].clone()
        return after_attention(model, cut)
"""


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return reference.load("float32", "cpu")


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    at = tmp_path_factory.mktemp("peer")
    (at / "kvpress.py").write_text(STAND_IN)
    facts = at / "kvpress-0.5.5.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 0.5.5\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(at))
        started = Peer(sys.executable, 1)
        yield started
        started.close()


def plan(**changes: Any) -> Plan:
    given = {
        "methods": ("full", "knorm"), "budgets": ("50%",), "tasks": ("retrieval",),
        "length": 128, "n": 4, "seed": 5, "batch": 1,
    }  # fmt: skip
    return Plan(**(given | changes))


def test_the_same_prompts_give_the_same_answers(peer: Peer, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    sweep = plan()
    heard: list[tuple[str, int]] = []
    theirs = list(
        s.measure(sweep, peer, tokenizer, model.config, progress=lambda *told: heard.append(told))
    )
    mine = list(ours(sweep, model, tokenizer))
    assert [(r["setting"], r["method"]) for r in theirs] == [
        (setting, method)
        for setting in ("query-aware", "query-agnostic")
        for method in ("full", "knorm")
    ]
    for row in theirs:
        assert row["engine"] == "kvpress" and row["versions"]["kvpress"] == "0.5.5"
        assert row["error"] is None and json.loads(json.dumps(row)) == row
        assert (row["press"] is None) == (row["method"] == "full")
    assert set(mine[0]) | {"press"} == set(theirs[0])
    together = pairs([*mine, *theirs])
    assert len(together) == 4
    for mine_row, their_row in together:
        if mine_row["setting"] == "query-aware" or mine_row["method"] == "full":
            assert mine_row["right"] == their_row["right"]
    knorm = next(r for r in theirs if r["method"] == "knorm" and r["setting"] == "query-agnostic")
    read, fed = 128, 3 + 1  # the question, and the answer but for its last token
    full = knorm["cache"]["bytes_full"]
    token = s.token_bytes(model.config)
    assert full >= (read + fed) * token
    assert knorm["cache"]["bytes_kept"] == pytest.approx(full - read // 2 * token)
    assert ("retrieval query-aware: kvpress knorm 50%", 1) in heard
    assert sum(prompts for _, prompts in heard) == 4 * 4
    assert "| retrieval | query-aware | knorm | 50% |" in markdown([*mine, *theirs])


def test_the_command_puts_both_side_by_side(peer: Peer, tmp_path: Path) -> None:
    command = [
        *("bench", "quality", "--methods", "knorm,h2o", "--budgets", "50%", "--length", "128"),
        *("--tasks", "retrieval", "--settings", "query-aware", "--n", "2", "--batch", "1"),
        *("--peer-python", sys.executable, "--out", str(tmp_path / "rows")),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    found = read(tmp_path / "rows" / "quality.jsonl")
    named = [(row["engine"], row["method"]) for row in found]
    assert named == [
        *[("transformers", m) for m in ("full", "knorm", "h2o")],
        *[("kvpress", m) for m in ("full", "knorm")],
    ]
    line = next(x for x in done.stdout.split("in kvpress")[1].splitlines() if "knorm" in x)
    assert line.split()[:6] == ["retrieval", "query-aware", "knorm", "50%"] + [
        f"{row['score']:.2f}" for row in found if row["method"] == "knorm"
    ]
    again = CliRunner().invoke(app, [*command, "--json"])
    assert again.exit_code == 0 and len(read(tmp_path / "rows" / "quality.jsonl")) == 5
    lost = CliRunner().invoke(app, [*command[:-4], "--peer-python", "/nosuch/python"])
    assert lost.exit_code == 2 and "Can't start the peer's Python" in lost.stderr


def test_known_cells_are_skipped_and_errors_are_rows(peer: Peer, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    sweep = plan(methods=("knorm", "tova"), settings=("query-aware",), n=1)
    first = list(s.measure(sweep, peer, tokenizer, model.config))
    assert [row["method"] for row in first] == ["full", "knorm", "tova"]
    assert "TOVAPress" in first[2]["error"] and "score" not in first[2]
    done = {key(row) for row in first}
    assert done == {key(row) for row in s.identities(sweep, peer)}
    assert not list(s.measure(sweep, peer, tokenizer, model.config, done))


def test_the_sweep_goes_on_after_the_process_has_ended(peer: Peer, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    sweep = plan(methods=("streaming-llm", "knorm"), settings=("query-aware",), n=1)
    full, ended, knorm = s.measure(sweep, peer, tokenizer, model.config)
    assert full["error"] is None and "exit code 3" in ended["error"]
    assert knorm["error"] is None and knorm["method"] == "knorm"


def test_only_what_kvpress_has_is_asked(peer: Peer) -> None:
    sweep = plan(
        methods=("full", "snapkv", "snapkv:window=8", "h2o", "laprox"), tasks=("retrieval", "walk")
    )
    assert [one.method for one in s.asked(sweep, "query-aware")] == ["full", "snapkv"]
    assert [one.method for one in s.asked(sweep, "decode")] == ["full"]
    assert PEER_DECODES < PEER_METHODS < set(methods())


def test_a_chain_is_cut_while_it_is_written(peer: Peer, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    sweep = plan(tasks=("walk",), settings=("decode",), n=2)
    full, cut = s.measure(sweep, peer, tokenizer, model.config)
    assert full["error"] is None and cut["error"] is None
    assert cut["press"].startswith("DecodingPress(")
    token = s.token_bytes(model.config)
    assert 64 * token <= cut["cache"]["bytes_kept"] <= (64 + 16) * token
    assert cut["cache"]["bytes_full"] > (64 + 16) * token


def test_another_checkpoint_is_opened_there_too(
    peer: Peer, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    at = tmp_path / "other"
    silent = type(model)(model.config)
    silent.load_state_dict({name: torch.zeros_like(x) for name, x in model.state_dict().items()})
    silent.save_pretrained(at)
    tokenizer.save_pretrained(at)
    sweep = plan(methods=("full",), settings=("query-aware",), reference=at)
    (row,) = s.measure(sweep, peer, tokenizer, model.config)
    assert row["score"] == 0 and row["model"] == "other"
    assert row["weights"] != identity(plan(), *sweep.cells()[0], sweep.asked()[0])["weights"]
    (mine,) = ours(sweep, *load(at=at))
    assert mine["right"] == row["right"] and mine["weights"] == row["weights"]


def test_only_a_checkpoint_of_the_language_will_do(tmp_path: Path) -> None:
    with pytest.raises(ReferenceModelError, match=r"no config\.json"):
        plan(reference=tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder() / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(ReferenceModelError, match="doesn't speak"):
        plan(reference=tmp_path)
    run = CliRunner().invoke(app, ["bench", "quality", "--peer-only"])
    assert run.exit_code == 2 and "--peer-python" in run.stderr


def test_budgets_become_slots() -> None:
    assert slots("10%", 155, 1000) == 15 and slots(None, 155, 1000) == 155
    assert slots("20", 155, 1000) == 20 and slots("200", 155, 1000) == 155
    assert slots("0.1%", 155, 1000) == 1 and slots("30kB", 155, 1000) == 30
    with pytest.raises(RecipeError, match="one slot"):
        slots("999B", 155, 1000)


def test_rows_are_not_mistaken_for_ours(peer: Peer) -> None:
    sweep = plan()
    cell, one = sweep.cells()[0], sweep.asked()[0]
    theirs = s.peer_identity(sweep, *cell, one, peer)
    assert key(theirs) != key(identity(sweep, *cell, one))


def test_the_best_of_both_sides_meet_on_the_same_prompts() -> None:
    def row(engine: str, method: str, right: list[int], kept: int, **changes: Any) -> Any:
        prompts = {"task": "walk", "task_version": 1, "setting": "decode", "length": 8, "seed": 0}
        return prompts | {
            "n": len(right), "weights": "w", "engine": engine, "method": method, "budget": "10%",
            "recipe": {"method": method, "budget": 1}, "error": None, "right": right,
            "score": sum(right) / len(right), "cache": {"bytes_kept": kept},
        } | changes  # fmt: skip

    rows = [
        row("transformers", "a", [1, 0, 1, 1], 9),
        row("transformers", "b", [0, 1, 1, 1], 5),  # as good, and smaller
        row("transformers", "c", [1, 1, 1, 1], 5, seed=1),  # other prompts
        row("transformers", "d", [1, 1, 1, 1], 5, error="it broke"),
        row("kvpress", "e", [0, 0, 1, 0], 5, recipe={"method": "e", "x": 1}),
        row("kvpress", "f", [0, 0, 0, 0], 5),
        row("kvpress", "full", [1, 1, 1, 1], 99, budget=None),
    ]
    ((*cell, difference),) = best_of_both(rows)
    assert cell == ["walk", "decode", "10%", "b", "0.75", "e", "0.25"]
    assert difference.startswith("+0.50 (")


@pytest.mark.slow
@pytest.mark.skipif(
    "KVSIEVE_PEER_PYTHON" not in os.environ,
    reason="set KVSIEVE_PEER_PYTHON to a Python with kvpress 0.5.5 (`make peer`)",
)
def test_every_press_answers(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    named = sorted(PEER_METHODS | PEER_REPLAYS)
    sweep = plan(methods=("full", *named), tasks=("retrieval", "walk"), length=256, n=2)
    peer = Peer(os.environ["KVSIEVE_PEER_PYTHON"], torch.get_num_threads())
    try:
        found = list(s.measure(sweep, peer, tokenizer, model.config))
    finally:
        peer.close()
    assert len(found) == 2 * (1 + len(named)) + 1 + len(PEER_DECODES)
    assert [row["error"] for row in found] == [None] * len(found)
    exact = ("knorm", "snapkv", "keydiff", "criticalkv", "cur", "full")
    mine = list(ours(plan(methods=exact, length=256, n=2), model, tokenizer))
    for row, theirs in pairs([*mine, *found]):
        if row["setting"] == "query-aware":
            assert row["right"] == theirs["right"], row["method"]
