"""What a report says at a glance: the front, the best of each, the matrix, depths, the audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvsieve.bench.report import (
    aggregate,
    audits,
    depths,
    others,
    public,
    reading,
    speed,
    summary,
)
from kvsieve.bench.report.aggregate import front, sections
from kvsieve.bench.report.check import ResultsError
from kvsieve.bench.report.recommend import recommend
from kvsieve.cli import app

from .test_report import row


def scored(method: str, kept: int, score: float, **changes: Any) -> dict[str, Any]:
    right = [1] * round(10 * score) + [0] * round(10 - 10 * score)
    changes = {"low": max(0.0, score - 0.1), "high": min(1.0, score + 0.1), **changes}
    difference = {"mean": score - 0.9, "low": score - 1.0, "high": score - 0.8}
    found = row(method, kept=kept, score=score, right=right, difference=difference)
    return found | changes


def test_the_front_is_what_nothing_beats() -> None:
    rows = [
        scored("full", 1000, 0.9, budget=None),
        scored("snapkv", 100, 0.5),
        scored("knorm", 100, 0.4),  # as many bytes, a lower score
        scored("h2o", 120, 0.5),  # the same score with more bytes
        scored("tova", 250, 0.8, budget="25%"),
        scored("random", 500, 0.7, budget="50%"),
    ]
    (section,) = sections(rows)
    best = [(p.label, p.budget) for p in front(section.panels[0])]
    assert best == [("snapkv", "10%"), ("tova", "25%"), ("full", None)]


def test_the_best_of_each_are_ranked_by_score_then_bytes() -> None:
    rows = [
        scored("snapkv", 110, 0.5),
        scored("knorm", 100, 0.5),
        scored("h2o", 100, 0.6),
        scored("tova", 100, 0.1),
        scored("tova", 500, 0.9, budget="50%"),
    ]
    table = summary.winners(sections(rows))
    assert [[cell.text for cell in cells][:3] for cells in table.rows] == [
        ["reasoning, decode", "512", "10%"],
        ["reasoning, decode", "512", "50%"],
    ]
    assert table.rows[0][4].text == "h2o 0.600 [0.500, 0.700]"
    assert table.rows[0][5].text.startswith("knorm 0.500") and "snapkv" in table.rows[0][5].text
    assert table.rows[1][5].text == "–"


def test_the_matrix_has_every_method_and_task_of_a_budget() -> None:
    rows = [
        scored("snapkv", 100, 0.5),
        scored("snapkv", 100, 0.7, task="walk"),
        scored("knorm", 100, 0.3),
        scored("knorm", 500, 0.9, budget="50%"),
    ]
    small, large = summary.matrices(sections(rows))
    assert small.name.startswith("10% kept, length 512") and large.name.startswith("50% kept")
    shown = [[cell.text for cell in cells] for cells in small.table.rows]
    assert list(small.table.columns) == ["method", "reasoning, decode", "walk, decode", "mean"]
    assert shown == [
        ["full cache", "0.90", "0.90", "0.90"],
        ["knorm", "0.30", "–", "–"],
        ["snapkv", "0.50", "0.70", "0.60"],
    ]


def test_depths_pool_prompts_by_place() -> None:
    rows = [
        scored("snapkv", 100, 0.5, depth=[0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 0.95, 0.85, 0.99]),
        scored("knorm", 100, 0.5),  # tells no depths
    ]
    ((name, table),) = depths.by_depth(sections(rows))
    assert name == "reasoning, decode, length 512, 10% kept"
    (cells,) = table.rows
    assert [cell.order for cell in cells[1:]] == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert cells[1].text.endswith("of 2") and cells[5].text.endswith("of 5")


def audited(fix: str = "none", begin: float = 0.5, told: float = 0.4, **changes: Any) -> Any:
    part = {"low": 0.0, "high": 1.0}
    kinds = {n: {"score": 1.0, **part} for n in ("end", "secret", "twice")}
    return {
        "kind": "audit", "version": 1, "method": "snapkv", "budget": "10%", "recipe": {},
        "fix": fix, "length": 512, "seed": 0, "n": 10, "weights": "x", "error": None,
        "right": {"score": 0.5, **part},
        "instructions": {"begin": {"score": begin, **part}, **kinds},
        "order": [{"score": 0.25 * i, **part} for i in range(4)],
        "leaks": {"direct": {"score": told, **part}, "begun": {"score": 0.0, **part}},
        "kept": {"begin": 0.1, "end": 0.2, "document": 0.3},
        "cache": {"bytes_full": 100, "bytes_kept": 20}, **changes,
    }  # fmt: skip


def test_the_audit_counts_what_a_fix_gains(tmp_path: Path) -> None:
    rows = [audited(told=0.9), audited(), audited("fair", begin=1.0, told=0.0)]
    text = "\n".join(map(json.dumps, rows)) + '\n{"cut'
    (tmp_path / audits.FILE).write_text(text)
    found = audits.read(tmp_path)
    assert [r["fix"] for r in found] == ["none", "fair"]  # of one cell the latest
    table = audits.table(found)
    gain = list(table.columns).index("gain")
    assert table.rows[0][gain].text == "–"
    # Half of (1.0 - 0.875) in instructions, half of (0.2 - 0.0) in secrets told.
    assert table.rows[1][gain].order == pytest.approx(0.5 * 0.125 + 0.5 * 0.2)
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(page)])
    assert done.exit_code == 0 and 'id="audit"' in page.read_text()


def test_audit_rows_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / audits.FILE).write_text(json.dumps(audited(version=7)) + "\n")
    with pytest.raises(ResultsError, match="line 1"):
        audits.read(tmp_path)


def test_kvpress_stands_beside_the_same_cells(tmp_path: Path) -> None:
    rows = [scored("snapkv", 100, 0.5), scored("snapkv", 90, 0.7, engine="kvpress")]
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = others.peers(reading.read(tmp_path))
    assert table is not None
    ((*_, ours, theirs, apart, kept),) = [[cell.text for cell in cells] for cells in table.rows]
    assert (ours, theirs, kept) == ("0.50", "0.70", "10% / 9%") and apart.startswith("-0.20")
    (best,) = others.winners(reading.read(tmp_path)).rows  # type: ignore[union-attr]
    assert [cell.text for cell in best][3:7] == ["snapkv", "0.50", "snapkv", "0.70"]
    # A recipe of kvsieve is recommended, though kvpress's keeps less and answers more.
    advice = recommend(reading.read(tmp_path), rows[0]["task"], max_loss=0.5)
    assert advice.considered == 1 and advice.holds is not None
    assert advice.holds.rows[0]["engine"] == "transformers"
    (tmp_path / "quality.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert others.peers(reading.read(tmp_path)) is None
    assert others.winners(reading.read(tmp_path)) is None


def test_fidelity_rows_become_a_table(tmp_path: Path) -> None:
    bins = [{"tokens": 8, "kl": 0.1}, {"tokens": 0, "kl": None}, {"tokens": 4, "kl": 0.4}]
    row = {
        "kind": "fidelity", "version": 1, "method": "snapkv", "budget": "10%", "recipe": {},
        "prefix": 64, "continuation": 16, "n": 2, "seed": 0, "weights": "x", "model": "m",
        "sample": "retrieval", "kl": {"mean": 0.2, "low": 0.1, "high": 0.3}, "error": None,
        "agreement": {"mean": 0.75}, "layer_error": [0.1, 0.5], "bins": bins,
        "cache": {"bytes_full": 100, "bytes_kept": 20},
    }  # fmt: skip
    (tmp_path / others.FILE).write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    (cells,) = others.fidelity(others.read(tmp_path)).rows
    assert [cell.text for cell in cells] == [
        "retrieval", "snapkv", "10%", "20%", "0.200 [0.100, 0.300]", "0.750", "0.500", "0.100",
        "0.400",
    ]  # fmt: skip
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(page)])
    assert done.exit_code == 0 and "Fidelity" in page.read_text()


def timed(method: str = "snapkv", **changes: Any) -> Any:
    return {
        "kind": "speed", "version": 1, "engine": "transformers", "method": method, "budget": 0.1,
        "options": {}, "model": "m", "context": 2048, "batch": 1, "dtype": "float32",
        "device": "cpu", "threads": 2, "steps": 8, "cpu": "c x2", "prefill_ratio": 1.1,
        "prefill_compress_share": 0.05, "decode_compress_share": None, "bytes_full": 200,
        "bytes_kept": 30, "tokens_per_second": 40.25, "ratio_stock": 1.5, "ratio_short": 0.9,
        "step_seconds": {"median": 1.0, "min": 0.9}, **changes,
    }  # fmt: skip


def test_speed_rows_become_a_section(tmp_path: Path) -> None:
    rows = [
        timed(tokens_per_second=1.0), timed(), timed("full", budget=None, engine="stock"),
        timed("tova", error="BudgetError"), timed("h2o", step_seconds={"median": 2, "min": 1}),
        timed(context=512, dtype="bfloat16"),
    ]  # fmt: skip
    kept = tmp_path / "elsewhere.jsonl"
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')
    small, large = speed.tables(speed.read(kept))
    assert small[0].startswith("512 tokens, batch 1, bfloat16: m, cpu, c x2, 2 thread")
    assert [[cell.text for cell in cells] for cells in large[1].rows] == [
        ["h2o", "10%", "15.0%", "~40.2", "~1.50", "~0.90", "1.10", "5.0%", "–"],
        ["snapkv", "10%", "15.0%", "40.2", "1.50", "0.90", "1.10", "5.0%", "–"],
    ]
    page = tmp_path / "page.html"
    (tmp_path / reading.FILE).write_text(json.dumps(scored("tova", 500, 0.6)) + "\n")

    def made(*options: str) -> Any:
        return CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(page), *options])

    assert made().exit_code == 0 and 'id="speed"' not in page.read_text()
    assert made("--speed", str(kept)).exit_code == 0 and 'id="speed"' in page.read_text()
    assert "no such file" in made("--speed", "nosuch").stderr
    (tmp_path / speed.FILE).write_text(kept.read_text())
    text = tmp_path / "r.md"
    assert made("--markdown", str(text)).exit_code == 0 and 'id="speed"' in page.read_text()
    assert "## Speed" in text.read_text()
    (tmp_path / speed.FILE).write_text(json.dumps(timed(version=2)) + "\n")
    assert made().exit_code == 2


def asked(method: str, score: float, **changes: Any) -> Any:
    return {
        "kind": "tasks", "version": 1, "task": "gsm8k", "method": method, "budget": "25%",
        "recipe": {"method": method}, "model": "m", "weights": "w", "dtype": "float32",
        "chat": True, "template": "t", "fewshot": 0, "limit": None, "max_new_tokens": None,
        "harness_task": "gsm8k_cot", "data_sha256": None, "seed": 0, "metric": "math_verify",
        "n": 8, "score": score, "low": 0.1, "high": 0.9, "answer_tokens": 12.4, "cut": 0.5,
        "difference": {"mean": -0.25, "low": -0.5, "high": 0.0}, "tokens_per_second": None,
        "cache": {"bytes_full": 200, "bytes_kept": 50}, "error": None, **changes,
    }  # fmt: skip


def test_public_benchmarks_become_a_section(tmp_path: Path) -> None:
    rows = [
        asked("snapkv", 0.1), asked("snapkv", 0.5), asked("full", 0.75, budget=None),
        asked("knorm", 0.2, difference=None, low=None), asked("full", 0.6, task="math500"),
        asked("h2o", 0.0, error="failed"),
    ]  # fmt: skip
    (tmp_path / public.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (title, table), _ = public.tables(public.read(tmp_path))
    assert title == "m: gsm8k (math_verify; 8 examples, 0 shown, chat template)"
    cells = [[cell.text for cell in cells] for cells in table.rows]
    assert [row[0] for row in cells] == ["full", "knorm", "snapkv"]
    assert cells[1][3:5] == ["0.200", "–"]
    assert cells[2][1:] == [
        "25%", "25.0%", "0.500 [0.100, 0.900]", "-0.250 [-0.500, +0.000]", "12", "50%", "–",
    ]  # fmt: skip
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path), "-o", str(page)])
    assert done.exit_code == 0 and 'id="public"' in page.read_text()


def test_lengths_stand_beside_one_another(tmp_path: Path) -> None:
    rows = [
        scored("snapkv", 100, 0.5, length=512), scored("snapkv", 100, 0.25, length=1024),
        scored("tova", 100, 0.5, length=512),
    ]  # fmt: skip
    (tmp_path / reading.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = aggregate.sections(reading.read(tmp_path).rows)
    ((name, table),) = depths.by_length(found)
    assert "kept" in name and list(table.columns) == ["method", "512 tokens", "1024 tokens"]
    (cells,) = table.rows
    assert [cell.order for cell in cells] == [None, 0.5, 0.25]
