"""`kvsieve bench quality`: cells, rows, resuming, what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import kvsieve
from kvsieve.bench.intervals import paired_difference, share, wilson
from kvsieve.bench.quality import rows as q
from kvsieve.bench.quality import sweep
from kvsieve.bench.quality.answers import answer
from kvsieve.bench.quality.plan import Asked, Plan
from kvsieve.bench.report import reading
from kvsieve.cli import app
from kvsieve.errors import KVSieveError
from kvsieve.reference import load, sample

SMALL = ["--length", "128", "--n", "2", "--budgets", "50%", "--tasks", "retrieval,walk"]
SMALL += ["--settings", "query-agnostic,decode", "--methods", "streaming-llm,random"]


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    return load()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "quality", *arguments])


def test_paired_difference_by_hand() -> None:
    found = paired_difference([1, 0, 0, 1], [1, 1, 1, 0])
    # b = 1, c = 2: mean -1/4; ends (1.5 - 2.5 +- 1.96 sqrt(4 - 1 / 6)) / 6.
    assert found["mean"] == pytest.approx(-0.25)
    assert found["low"] == pytest.approx((-1 - 1.96 * (4 - 1 / 6) ** 0.5) / 6)
    assert found["high"] == pytest.approx((-1 + 1.96 * (4 - 1 / 6) ** 0.5) / 6)
    same = paired_difference([1, 1], [1, 1])
    assert same["mean"] == 0 and same["low"] < 0 < same["high"]
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference([1], [1, 0])


def test_shares_lie_inside_their_intervals() -> None:
    assert share([1, 1, 0, 1]) == {
        "score": 0.75,
        **dict(zip(("low", "high"), wilson(3, 4), strict=True)),
    }
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="nothing"):
        wilson(0, 0)


def test_a_batch_answers_as_its_prompts_do_alone(reference: tuple[Any, Any]) -> None:
    samples = [sample("multi-hop", seed=s, length=128 + 4 * s) for s in range(4)]
    recipe = kvsieve.recipe("keydiff", budget=0.5)
    for first in (False, True):
        alone = answer(*reference, recipe, samples, document_first=first)
        together = answer(*reference, recipe, samples, document_first=first, batch=3)
        for one, other in zip(alone.texts, together.texts, strict=True):
            assert one.split() == other.split()[: len(one.split())]
        assert alone.right == together.right
        assert [n for n, _ in together.reports] == [3, 1]


def test_the_document_is_compressed_before_the_question(reference: tuple[Any, Any]) -> None:
    kept: list[int] = []
    samples = [sample("retrieval", seed=s, length=128) for s in range(2)]
    answer(
        *reference,
        kvsieve.recipe("keydiff", budget=0.25),
        samples,
        document_first=True,
        batch=2,
        after_document=lambda cache, some: kept.append(cache.report.slots[0][0][0]),
    )
    assert kept == [32]


def test_decoding_recipes_hold_the_same_slots() -> None:
    plain = Asked(method="snapkv", budget="25%").plain("decode", 400)
    assert plain == {"method": "snapkv", "budget": 100, "schedule": "every:16", "recent": 32}
    own = Asked(method="keydiff", budget="64", options={"schedule": "each-step"})
    assert own.plain("decode", 400) == {
        "method": "keydiff", "budget": 64, "schedule": "each-step", "recent": 16,
    }  # fmt: skip
    assert Asked(method="keydiff", budget="25%").plain("query-aware", 400)["budget"] == 0.25
    assert Asked(method="full", budget=None).plain("decode", 400) == {"method": "full"}


def test_a_small_sweep_resumes_and_is_read_by_the_report(tmp_path: Path) -> None:
    out = tmp_path / "results"
    first = run(*SMALL, "--out", str(out))
    assert first.exit_code == 0, first.output
    lines = (out / q.FILE).read_text().splitlines()
    assert len(lines) == 2 * 3
    found = reading.read(out)
    assert {row["method"] for row in found.rows} == {"full", "streaming-llm", "random"}
    for row in found.rows:
        if row["method"] == "full":
            assert row["score"] == 1.0 and row["difference"]["mean"] == 0
        else:
            assert row["cache"]["bytes_kept"] < 0.8 * row["cache"]["bytes_full"]
            assert row["score"] < 1.0
    # A line cut by a kill, and one that is gone: only these cells are measured again.
    cut = [*lines[:3], lines[3][:40]]
    (out / q.FILE).write_text("\n".join(cut))
    again = run(*SMALL, "--out", str(out))
    assert again.exit_code == 0, again.output
    rows = q.read(out / q.FILE)
    assert [q.key(row) for row in rows] == [q.key(json.loads(x)) for x in lines]
    assert [row["right"] for row in rows] == [json.loads(x)["right"] for x in lines]
    assert run(*SMALL, "--out", str(out), "--json").stdout == ""  # nothing left to measure


def test_rows_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / q.FILE).write_text(json.dumps({"kind": "quality", "version": 0}) + "\n")
    result = run(*SMALL, "--out", str(tmp_path))
    assert result.exit_code == 2 and "must not be mixed" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "retreival"], "Did you mean 'retrieval'"),
        (["--methods", "snapkw"], "Did you mean 'snapkv'"),
        (["--methods", "snapkv:windw=3"], "Did you mean 'window'"),
        (["--methods", "snapkv:window"], "is no option"),
        (["--budgets", "0%"], "not a fraction"),
        (["--budgets", "much"], "is not a budget"),
        (["--settings", "decode", "--tasks", "secret"], "Nothing to measure"),
        (["--length", "1000000"], "can have"),
        (["--n", "0"], "n=0"),
        (["--budgets", ","], "empty"),
        (["--quick", "--n", "3"], "leave them out"),
        (["--out", __file__], "is a file"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def _plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "methods": ("snapkv", "random"), "budgets": ("10%",), "tasks": ("retrieval",),
        "settings": ("query-aware",), "length": 128, "n": 2, "batch": 2,
    }  # fmt: skip
    return Plan(**settings | changes)


def test_refused_budgets_are_no_failures(reference: tuple[Any, Any]) -> None:
    full, snapkv, random = list(sweep.measure(_plan(), *reference))
    assert full["error"] is None and random["error"] is None
    assert snapkv["refused"] and "leaves no room" in snapkv["error"]


def test_a_crash_is_recorded_and_the_sweep_goes_on(
    reference: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = sweep.answer

    def broken(model: Any, tokenizer: Any, recipe: Any, *rest: Any, **options: Any) -> Any:
        if recipe.method == "random":
            raise AssertionError("out of luck")
        return real(model, tokenizer, recipe, *rest, **options)

    monkeypatch.setattr(sweep, "answer", broken)
    plan = ["--methods", "random,knorm", "--budgets", "50%", "--tasks", "retrieval", "--n", "1"]
    plan += ["--settings", "query-aware", "--length", "128", "--out", str(tmp_path)]
    result = run(*plan)
    assert result.exit_code == 1 and "1 of 3 cells failed" in result.stderr
    full, random, knorm = q.read(tmp_path / q.FILE)
    assert random["error"] == "AssertionError: out of luck" and not random["refused"]
    assert full["error"] is None and knorm["error"] is None
    # Failed cells are tried again; the others are not.
    monkeypatch.setattr(sweep, "answer", real)
    assert run(*plan).exit_code == 0
    assert len(q.read(tmp_path / q.FILE)) == 4
    assert not reading.read(tmp_path).failed


def test_a_full_cache_that_fails_fails_its_cells_only(
    reference: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*rest: Any, **options: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(sweep, "answer", broken)
    found = list(sweep.measure(_plan(), *reference))
    assert [row["error"] for row in found] == ["MemoryError: no room"] * 3


def test_the_model_is_left_as_it_was(reference: tuple[Any, Any]) -> None:
    model, _ = reference
    before = model.config._attn_implementation
    list(sweep.measure(_plan(), *reference))
    assert model.config._attn_implementation == before


def test_unknown_methods_raise_from_python() -> None:
    with pytest.raises(KVSieveError, match="snapkv"):
        _plan(methods=("snapkw",))


@pytest.mark.slow
def test_a_killed_run_loses_at_most_one_cell(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from kvsieve.cli import main; main()",
        "bench",
        "quality",
        *SMALL,
        "--n",
        "6",
    ]
    command += ["--out", str(tmp_path), "--threads", "1"]
    file = tmp_path / q.FILE
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while running.poll() is None and time.monotonic() < deadline:
        if file.exists() and len(file.read_bytes().splitlines()) >= 2:
            break
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    before = q.read(file)
    assert len(before) >= 2
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    after = q.read(file)
    assert after[: len(before)] == before
    assert len({q.key(row) for row in after}) == len(after) == 6
