"""Fidelity: figures against loops, the full cache at zero, texts, rows, the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt, tiny
from torch import Tensor
from transformers.cache_utils import DynamicCache
from typer.testing import CliRunner

import kvsieve
from kvsieve import reference
from kvsieve.bench import ledger
from kvsieve.bench.fidelity import cell, figures, sweep, texts, trace
from kvsieve.bench.fidelity.texts import Source, Text
from kvsieve.bench.ledger import Subject
from kvsieve.bench.quality.plan import every
from kvsieve.bench.quality.rows import read as rows_of
from kvsieve.cli import app
from kvsieve.cli.settings import REPEAT
from kvsieve.errors import RecipeError, UnknownMethod

from . import byte_model

# -- figures ---------------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): 1/2 ln 2 - 1/4 ln 2.
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log() + 3
    q = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log() - 1
    assert figures.divergence(p, q).item() == pytest.approx(math.log(2) / 4, abs=1e-15)
    assert figures.divergence(p, p).item() == 0
    assert figures.agreement(p, q).item() == 0 and figures.agreement(p, p + 1).item() == 1


def test_tokens_that_the_full_cache_rules_out_add_nothing() -> None:
    p = torch.tensor([0.0, 0.0, -torch.inf])
    q = torch.tensor([0.0, 0.0, 0.0])
    assert figures.divergence(p, q).item() == pytest.approx(math.log(3 / 2))
    assert figures.divergence(q, p).item() == math.inf


def test_divergence_and_loss_against_a_loop() -> None:
    p, q = torch.randn(4, 7), torch.randn(4, 7)
    token = torch.tensor([0, 6, 3, 3])
    for row in range(4):
        a = [math.exp(x) for x in p[row].tolist()]
        b = [math.exp(x) for x in q[row].tolist()]
        a, b = [x / sum(a) for x in a], [x / sum(b) for x in b]
        kl = sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
        assert figures.divergence(p, q)[row].item() == pytest.approx(kl, rel=1e-6)
        assert figures.loss(p, token)[row].item() == pytest.approx(-math.log(a[token[row]]))


def test_relative_error_by_hand() -> None:
    full = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[3.0, 5.0], [0.0, 0.0], [1.0, 0.0]])
    assert figures.relative_error(full, other).tolist() == [0.2, 0.0, math.inf]


def test_intervals_draw_texts() -> None:
    one = figures.with_interval(torch.tensor([0.5], dtype=torch.float64))
    assert one == {"mean": 0.5, "low": None, "high": None}
    equal = figures.with_interval(torch.full((7,), 0.1, dtype=torch.float64))
    assert equal["low"] == pytest.approx(0.1) and equal["high"] == pytest.approx(0.1)
    values = torch.tensor([0.0, 1.0, 2.0, 3.0] * 10, dtype=torch.float64)
    found = figures.with_interval(values)
    half = 1.96 * values.std(correction=0).item() / math.sqrt(40)
    assert found["mean"] == 1.5
    assert found["low"] == pytest.approx(1.5 - half, abs=0.05)
    assert found["high"] == pytest.approx(1.5 + half, abs=0.05)


# -- one text, by hand -----------------------------------------------------------------------------

P, T, KEPT = 40, 9, 10


def tiny_text(seed: int = 0) -> Text:
    ids = prompt(P + T, seed)
    counted = torch.ones(T, dtype=torch.bool)
    return Text(prefix=ids[:, :P], continuation=ids[:, P:], counted=counted)


@torch.no_grad()
def by_hand(text: Text, kept: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and first-layer outputs of every fed token, on a stock cache whose keys of the
    largest norms were taken out by hand (None: none)."""
    model = tiny("llama")
    cache: Any = DynamicCache(config=model.config)
    model(text.prefix, past_key_values=cache)
    for layer in cache.layers if kept is not None else ():
        order = layer.keys.norm(dim=-1).argsort(dim=-1)[..., :kept]
        index = order[..., None].expand(-1, -1, -1, layer.keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
    logits, outputs = [], []
    for step in range(T):
        out = model(
            text.continuation[:, step : step + 1],
            past_key_values=cache,
            position_ids=torch.tensor([[P + step]]),
            output_hidden_states=True,
        )
        logits.append(out.logits[0, -1])
        outputs.append(out.hidden_states[1][0, -1])
    return logits, outputs


def test_a_cell_equals_the_same_eviction_by_hand() -> None:
    text = tiny_text()
    recipe = kvsieve.recipe("knorm", budget=KEPT, schedule="after-prefill")
    full, first_full = by_hand(text, None)
    cut, first_cut = by_hand(text, KEPT)
    stock = trace.stock(tiny("llama"), text)
    got = cell.figures(tiny("llama"), recipe, [text], [stock])
    kl, same, error = 0.0, 0, 0.0
    for a, b, x, y in zip(full, cut, first_full, first_cut, strict=True):
        p, q = a.double().softmax(-1), b.double().softmax(-1)
        kl += sum(float(p[v] * (p[v] / q[v]).log()) for v in range(len(p))) / T
        same += int(a.argmax() == b.argmax())
        error += float((y - x).norm() / x.norm()) / T
    assert kl > 0.01, "the eviction shows"
    assert got["kl"]["mean"] == pytest.approx(kl, rel=1e-3)
    assert got["agreement"]["mean"] == pytest.approx(same / T)
    assert got["layer_error"][0] == pytest.approx(error, rel=1e-3)
    losses = [-a.double().log_softmax(-1)[t] for a, t in zip(cut, text.continuation[0, 1:])]  # noqa: B905
    assert got["loss"] == pytest.approx(sum(map(float, losses)) / (T - 1), rel=1e-4)
    assert got["tokens"] == T and got["kl"]["low"] is None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt-oss"])
def test_a_cache_from_which_nothing_goes_has_no_divergence(family: str) -> None:
    model, text = tiny(family), tiny_text()
    stock = [trace.stock(model, text)]
    for recipe in (kvsieve.recipe("full"), kvsieve.recipe("knorm", budget=P + T)):
        got = cell.figures(model, recipe, [text], stock)
        assert abs(got["kl"]["mean"]) < 1e-8 and got["agreement"]["mean"] == 1
        assert max(got["layer_error"]) < 1e-4 and max(got["attention_error"]) < 1e-4
        assert got["loss"] == pytest.approx(got["loss_full"], abs=1e-5)
    cut = cell.figures(model, kvsieve.recipe("knorm", budget=8), [text], stock)
    assert cut["kl"]["mean"] > 1e-4 and cut["layer_error"][-1] > 1e-3


def test_bins_cover_the_continuation_and_average_to_the_whole() -> None:
    sample = [tiny_text(0), tiny_text(1)]
    stock = [trace.stock(tiny("llama"), text) for text in sample]
    got = cell.figures(tiny("llama"), kvsieve.recipe("knorm", budget=8), sample, stock)
    bins = got["bins"]
    assert [b["start"] for b in bins[1:]] == [b["end"] for b in bins[:-1]]
    assert bins[0]["start"] == 0 and bins[-1]["end"] == T and len(bins) == cell.BINS
    for whole, name in ((got["kl"]["mean"], "kl"), (got["layer_error"][-1], "error")):
        total = sum(b[name] * (b["end"] - b["start"]) for b in bins)
        assert total / T == pytest.approx(whole)
    assert got["cache"]["bytes_kept"] < got["cache"]["bytes_full"]


def test_only_counted_tokens_count() -> None:
    text = tiny_text()
    some = torch.zeros(T, dtype=torch.bool)
    some[[1, 4]] = True
    model, recipe = tiny("llama"), kvsieve.recipe("knorm", budget=8)
    stock = [trace.stock(model, text)]
    whole = cell.Apart.of(stock[0], trace.compressed(model, text, recipe)[0], text)
    part = Text(prefix=text.prefix, continuation=text.continuation, counted=some)
    got = cell.figures(model, recipe, [part], stock)
    assert got["tokens"] == 2
    assert got["kl"]["mean"] == pytest.approx(float(whole.kl[1] + whole.kl[4]) / 2)
    assert got["loss"] == pytest.approx(float(whole.loss[1] + whole.loss[4]) / 2)
    assert got["layer_error"][0] == pytest.approx(whole.outputs[:, 0].mean().item())
    empty = [b for b in got["bins"] if not b["tokens"]]
    assert sum(b["tokens"] for b in got["bins"]) == 2
    assert empty and all(b["kl"] is None and b["error"] > 0 for b in empty)


def test_looking_leaves_no_hooks_and_repeated_prompts_are_not_looked_at() -> None:
    model, text = tiny("llama"), tiny_text()

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    before = hooks()
    stock = trace.stock(model, text)
    recipe = kvsieve.recipe("kvzip", budget=20, repeat_ids=(5, 6))
    got = cell.figures(model, recipe, [text], [stock])
    assert 0 < got["kl"]["mean"] < 50
    assert hooks() == before


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", reference.KINDS)
def test_samples_have_the_sizes_asked_for(kind: str, loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    source = texts.sampled(kind, tokenizer, n=2, seed=3, prefix=256, length=64)
    again = texts.sampled(kind, tokenizer, n=1, seed=4, prefix=256, length=64)
    assert torch.equal(source.texts[1].prefix, again.texts[0].prefix)
    for text in source.texts:
        exact = kind not in texts.CHAINS
        assert text.prefix.shape[1] == 256 if exact else 200 < text.prefix.shape[1] <= 256
        assert text.continuation.shape == (1, 64)
        words = tokenizer.convert_ids_to_tokens(text.continuation[0].tolist())
        assert "<unk>" not in words
        if kind == "retrieval":
            assert words[0] == "<q>" and words[1] == words[3] and words[6] == "<eos>"
            assert text.counted[:7].tolist() == [False, False, True, True, True, True, False]


def test_the_model_follows_its_samples(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    for kind in ("retrieval", "reasoning"):
        source = texts.sampled(kind, tokenizer, n=1, seed=0, prefix=256, length=64)
        text = source.texts[0]
        stock = trace.stock(model, text)
        right = stock.logits[:-1].argmax(-1) == text.continuation[0, 1:]
        assert right[text.counted[:-1]].float().mean() > 0.95


def test_a_continuation_without_an_answer_is_refused(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(RecipeError, match="no answer"):
        texts.sampled("retrieval", loaded[1], n=1, seed=0, prefix=64, length=2)


def test_samples_that_cannot_be_made_are_refused(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    with pytest.raises(RecipeError, match="Did you mean 'retrieval'"):
        texts.sampled("retrival", tokenizer, n=1, seed=0, prefix=256, length=8)
    with pytest.raises(RecipeError, match="fewer than the 900"):
        texts.sampled("walk", tokenizer, n=1, seed=0, prefix=256, length=900)
    with pytest.raises(RecipeError, match="doesn't fit"):
        texts.sampled("walk", tokenizer, n=1, seed=0, prefix=4, length=8)


def test_windows_are_spread_and_do_not_touch(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    words = [f"L{number}" for number in range(100)]
    source = texts.windows(" ".join(words), "lines", tokenizer, n=3, prefix=20, length=10)
    found = [
        tokenizer.convert_ids_to_tokens(torch.cat([t.prefix, t.continuation], 1)[0].tolist())
        for t in source.texts
    ]
    assert found == [words[a : a + 30] for a in (0, 33, 66)]
    assert source.facts["text"] == "lines" and len(source.facts["text_sha256"]) == 16
    with pytest.raises(RecipeError, match="room for 3"):
        texts.windows(" ".join(words), "lines", tokenizer, n=4, prefix=20, length=10)
    with pytest.raises(RecipeError, match="doesn't know"):
        texts.windows("Call me Ishmael.", "moby", tokenizer, n=1, prefix=2, length=1)


# -- rows ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return reference.load("float32", "cpu")


@pytest.fixture
def plan() -> sweep.Sweep:
    source = Source(name="tiny", facts={"text": "tiny"}, texts=[tiny_text(0), tiny_text(1)])
    return sweep.Sweep(
        subject=Subject(model="tiny", weights="0", device="cpu", dtype="float32"),
        sources=[source],
        asked=every(["knorm", "snapkv"], ["25%", "90%"]),
        prefix=P,
        continuation=T,
        seed=0,
    )


def test_every_cell_has_a_row_and_failures_are_rows(plan: sweep.Sweep) -> None:
    heard: list[tuple[str, int]] = []
    note = lambda *told: heard.append(told)  # noqa: E731
    found = list(sweep.measure(plan, tiny("llama"), progress=note))
    named = [(row["method"], row["budget"]) for row in found]
    assert named == [
        ("full", None),
        *[(m, b) for m in ("knorm", "snapkv") for b in ("25%", "90%")],
    ]
    assert ("tiny: knorm 25%", 1) in heard and sum(done for _, done in heard) == 8
    for row in found:
        assert json.loads(json.dumps(row)) == row
        assert set(row) - sweep.FIGURES == set(plan.identities()[0])
    # snapkv protects a window of 32: 25 % of 40 tokens has no room for it.
    failed = [row for row in found if row["error"] is not None]
    assert [(r["method"], r["budget"]) for r in failed] == [("snapkv", "25%")]
    assert "BudgetError" in failed[0]["error"] and "kl" not in failed[0]
    assert failed[0]["refused"] and not found[0]["refused"]
    assert found[1]["kl"]["mean"] > found[0]["kl"]["mean"]


def test_known_cells_are_skipped_and_others_are_not(plan: sweep.Sweep) -> None:
    keys = [sweep.key(row) for row in plan.identities()]
    assert len(set(keys)) == 5
    left = list(sweep.measure(plan, tiny("llama"), set(keys[:-1])))
    assert [sweep.key(row) for row in left] == keys[-1:]
    other = dict(plan.identities()[-1]) | {"dtype": "bfloat16"}
    assert sweep.key(other) not in keys


def test_methods_are_asked_for_by_name() -> None:
    found = every(["knorm", "full", "knorm:interval=8"], ["10%", "20"])
    assert [(x.method, x.budget, x.options) for x in found] == [
        ("full", None, {}),
        *[("knorm", b, {}) for b in ("10%", "20")],
        *[("knorm", b, {"interval": 8}) for b in ("10%", "20")],
    ]
    with pytest.raises(UnknownMethod, match="snapkv"):
        every(["snapvk"], ["10%"])
    with pytest.raises(RecipeError, match="needs a budget"):
        every(["snapkv"], [])


def read(path: Path) -> list[dict[str, Any]]:
    return rows_of(path, "fidelity", 1)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fidelity.jsonl"
    assert read(path) == []
    path.write_text('{"kind": "fidelity", "version": 1}\n{"kind": "fide')
    assert len(read(path)) == 1
    path.write_text('{"kind": "fidelity", "version": 2}\n')
    with pytest.raises(RecipeError, match="version 1"):
        read(path)


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    for name, content in (("a", b"12"), ("b", b"13")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content * 100_000)
    a, b = (ledger.fingerprint(tmp_path / name) for name in "ab")
    assert a != b and a == ledger.fingerprint(tmp_path / "a")
    with pytest.raises(RecipeError, match="no weight files"):
        ledger.fingerprint(tmp_path)


# -- the command -----------------------------------------------------------------------------------

COMMAND = [
    *("bench", "fidelity", "--methods", "knorm,snapkv", "--budgets", "25%"),
    *("--samples", "retrieval", "--prefix", "96", "--continuation", "8", "--n", "2"),
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_command_measures_once_and_says_what_was_refused(tmp_path: Path) -> None:
    runner, path = CliRunner(), tmp_path / "fidelity.jsonl"
    first = runner.invoke(app, [*COMMAND, "--json", "--out", str(tmp_path)])
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    assert rows == read(path)
    assert [row["method"] for row in rows] == ["full", "knorm", "snapkv"]
    assert rows[0]["model"] == "reference" and abs(rows[0]["kl"]["mean"]) < 1e-8
    assert first.exit_code == 0 and "refused: retrieval, snapkv 25%" in first.stderr
    again = runner.invoke(app, [*COMMAND, "--out", str(tmp_path)])
    assert again.exit_code == 0 and "knorm" in again.stdout
    assert len(read(path)) == 3, "nothing is measured again"


def test_a_cell_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("out of memory")

    runner, path = CliRunner(), tmp_path / "fidelity.jsonl"
    command = [*COMMAND[:2], "--methods", "knorm", *COMMAND[4:], "--out", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(cell, "compressed", broken)
        first = runner.invoke(app, command)
    assert first.exit_code == 1 and "2 of 2 cells failed" in first.stderr
    assert all("out of memory" in row["error"] and not row["refused"] for row in read(path))
    assert runner.invoke(app, command).exit_code == 0
    assert [row["error"] is None for row in read(path)] == [False, False, True, True]


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text(reference.sample("retrieval", seed=1, length=400).prompt)
    options = ["--methods", "knorm", "--budgets", "10", "--text", str(path)]
    sizes = ["--prefix", "64", "--continuation", "8", "--n", "2"]
    done = CliRunner().invoke(app, [*COMMAND[:2], *options, *sizes, "--json"])
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["story.txt"] * 2 and rows[0]["seed"] is None


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    model = byte_model.save(tmp_path / "model")
    path = tmp_path / "story.txt"
    path.write_text("A story of a fox, a crow and a piece of cheese. " * 10)
    options = ["--methods", "kvzip,knorm", "--budgets", "50%", "--model", model]
    sizes = ["--prefix", "64", "--continuation", "6", "--n", "2", "--text", str(path)]
    done = CliRunner().invoke(app, [*COMMAND[:2], *options, *sizes, "--json"])
    assert done.exit_code == 0, done.stderr
    full, kvzip, knorm = (json.loads(line) for line in done.stdout.splitlines())
    assert full["kl"]["mean"] < 1e-8 < min(kvzip["kl"]["mean"], knorm["kl"]["mean"])
    assert full["weights"] == ledger.fingerprint(Path(model)) and full["dtype"] == "float32"
    asked = byte_model.tokenizer().encode(REPEAT, add_special_tokens=False)
    assert kvzip["recipe"]["repeat_ids"] == asked, "kvzip asks in the tokens of this model"


@pytest.mark.slow
def test_a_killed_run_loses_one_cell_at_most(tmp_path: Path) -> None:
    path = tmp_path / "killed" / sweep.FILE
    command = [sys.executable, "-c", "from kvsieve.cli import main; main()", *COMMAND[:2]]
    command += ["--methods", "random,knorm,keydiff,lagkv,streaming-llm", *COMMAND[4:], "--out"]
    running = subprocess.Popen([*command, str(path.parent)], stderr=subprocess.DEVNULL)
    while running.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < 2):
        time.sleep(0.02)
    running.kill()
    running.wait()
    before = read(path)
    assert 2 <= len(before) < 6, "it was killed in between"
    subprocess.run([*command, str(path.parent)], check=True, capture_output=True)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    resumed, whole = (
        [row | {"seconds": None} for row in read(folder / sweep.FILE)]
        for folder in (path.parent, tmp_path / "whole")
    )
    assert resumed == whole and len(whole) == 6
    assert read(path)[: len(before)] == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "nosuch"], "Unknown method"),
        (["--budgets", "0%"], "fraction"),
        (["--budgets", ","], "--budgets is empty"),
        (["--samples", "retrieve"], "retrieval"),
        (["--n", "0"], "--n 0"),
        (["--prefix", "4096"], "don't fit"),
        (["--text", "nosuch.txt"], "Can't read"),
        (["--text", "nosuch.txt", "--seed", "1"], "leave them out"),
        (["--model", "nosuch"], "--text"),
        (["--out", "pyproject.toml"], "is a file"),
    ],
)
def test_bad_input_ends_with_2(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", "fidelity", *options])
    assert done.exit_code == 2, done.output
    assert said in done.stderr
