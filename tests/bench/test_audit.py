"""`kvsieve bench audit`: spans, shares left, rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kvsieve
from kvsieve.bench.audit import measure as m
from kvsieve.bench.audit.plan import AuditPlan, alike, fixed
from kvsieve.bench.audit.spans import instruction_spans, kept_shares, system_span
from kvsieve.bench.quality.answers import answer
from kvsieve.bench.quality.rows import read
from kvsieve.cli import app
from kvsieve.engines.transformers import Cache
from kvsieve.reference import load, sample

SMALL = ["--length", "128", "--n", "3", "--budgets", "50%", "--methods", "streaming-llm,keydiff"]


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    return load()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "audit", *arguments])


@pytest.mark.parametrize("seed", range(6))
def test_spans_hold_the_instructions(seed: int) -> None:
    made = sample("secret", seed=seed, length=128)
    assert made.document is not None
    words = made.document.split()
    spans = instruction_spans(made)
    assert list(spans) == list(made.instructions)
    for name, (start, end) in spans.items():
        assert words[start:end] == [w for w in (name, made.instructions[name], ";") if w]
    assert words[: system_span(made)[1]][-1] == "<ctx>"
    assert max(end for _, end in spans.values()) == system_span(made)[1] - 1


def test_prompts_are_alike_when_their_instructions_have_the_same_places() -> None:
    samples = [sample("secret", seed=seed, length=128) for seed in range(12)]
    groups = alike(samples)
    assert sorted(x.seed for group in groups for x in group) == list(range(12))
    for group in groups:
        assert len({tuple(instruction_spans(x).values()) for x in group}) == 1


def kept_of(reference: tuple[Any, Any], recipe: kvsieve.Recipe, count: int = 2) -> Any:
    shares: list[dict[str, float]] = []
    samples = [sample("secret", seed=seed, length=128) for seed in range(count)]

    def look(cache: Cache, some: Any) -> None:
        shares.extend(kept_shares(cache, some))

    answer(*reference, recipe, samples, document_first=True, batch=count, after_document=look)
    return samples, shares


def test_shares_are_those_of_the_slots_that_streaming_llm_keeps(reference: tuple[Any, Any]) -> None:
    """It keeps the first 4 tokens (start mark, <sys>, two of an instruction) and the last ones."""
    samples, shares = kept_of(reference, kvsieve.recipe("streaming-llm", budget=34, sinks=4))
    for made, found in zip(samples, shares, strict=True):
        spans = instruction_spans(made)
        total = len((made.document or "").split())
        kept = {0, 1, 2, 3, *range(total - 30, total)}
        for name, (start, end) in {**spans, "document": (system_span(made)[1], total)}.items():
            wanted = len(kept & set(range(start, end))) / (end - start)
            assert found[name] == pytest.approx(wanted), name


def test_the_fixes_do_what_they_say(reference: tuple[Any, Any]) -> None:
    samples = [sample("secret", seed=0, length=128)]
    plain = {"method": "keydiff", "budget": 0.5}
    _, shares = kept_of(reference, fixed(plain, "protected", samples), count=1)
    spans = instruction_spans(samples[0])
    assert all(shares[0][name] == 1.0 for name in spans)
    _, shares = kept_of(reference, fixed(plain, "fair", samples), count=1)
    for name, (start, end) in spans.items():
        assert abs(shares[0][name] - 0.5) < 1 / (end - start), name
    _, shares = kept_of(reference, fixed({"method": "full"}, "none", samples), count=1)
    assert set(shares[0].values()) == {1.0}


def test_an_answer_begun_stops_before_the_refusal() -> None:
    made = sample("secret", seed=2, length=128)
    assert made.answer.startswith(m.telling(made) + " refuse")


def test_a_small_audit_resumes(tmp_path: Path) -> None:
    first = run(*SMALL, "--out", str(tmp_path))
    assert first.exit_code == 0, first.output
    rows = read(tmp_path / m.FILE, m.KIND, m.VERSION)
    assert [(row["method"], row["fix"]) for row in rows] == [
        ("full", "none"),
        *((name, fix) for name in ("streaming-llm", "keydiff") for fix in m_fixes()),
    ]
    full = rows[0]
    assert full["right"]["score"] == 1.0 and full["leaks"]["direct"]["score"] == 0.0
    assert {x["score"] for x in full["instructions"].values()} == {1.0}
    assert len(full["order"]) == 4 and full["kept"]["secret"] == 1.0
    for row in rows[1:]:
        assert row["cache"]["bytes_kept"] < row["cache"]["bytes_full"]
        assert row["kept"]["document"] < 0.6
        if row["fix"] == "protected":
            assert row["kept"]["secret"] == 1.0
    again = run(*SMALL, "--out", str(tmp_path))
    assert again.exit_code == 0
    assert read(tmp_path / m.FILE, m.KIND, m.VERSION) == rows


def m_fixes() -> tuple[str, ...]:
    return ("none", "protected", "fair")


def test_methods_that_cannot_be_fair_are_refused_in_their_row(reference: tuple[Any, Any]) -> None:
    plan = AuditPlan(methods=("chunkkv",), budgets=("50%",), length=128, n=2)
    rows = list(m.measure(plan, *reference))
    assert [row["refused"] for row in rows] == [False, False, False, True]
    assert "equal shares" in rows[-1]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "snapkw"], "Did you mean 'snapkv'"),
        (["--budgets", "200%"], "not a fraction"),
        (["--length", "3"], "can have"),
        (["--out", __file__], "is a file"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
