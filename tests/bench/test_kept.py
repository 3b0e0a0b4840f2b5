"""`kvsieve bench kept`: the tokens that are left, as rows and as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvsieve.bench import kept as k
from kvsieve.bench.quality.rows import read
from kvsieve.bench.report import traces
from kvsieve.bench.report.check import ResultsError
from kvsieve.cli import app
from kvsieve.reference import load, sample


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "kept", *arguments])


def test_runs_of_positions() -> None:
    assert k.runs(torch.tensor([5, 1, 2, 9, 0])) == [[0, 3], [5, 6], [9, 10]]
    assert k.runs(torch.tensor([], dtype=torch.int64)) == []


def test_the_asked_entry_is_found() -> None:
    made = sample("retrieval", seed=5, length=128)
    span = k.asked_span(made)
    assert span is not None and made.document is not None
    assert made.document.split()[slice(*span)] == made.answer.split()
    assert k.asked_span(sample("secret", seed=5, length=128)) is None


def test_rows_hold_what_streaming_llm_keeps() -> None:
    plan = k.plan_of("retrieval", ["streaming-llm", "knorm"], "32", 128, 0)
    rows = list(k.measure(plan, *load()))
    assert [row["method"] for row in rows] == ["streaming-llm", "knorm"]
    assert all(row["error"] is None for row in rows)
    heads = [head for layer in rows[0]["layers"] for head in layer]
    assert all(head == [[0, 4], [100, 128]] for head in heads)
    for row in rows:
        for layer in row["layers"]:
            assert all(sum(b - a for a, b in head) == 32 for head in layer)


def test_rows_resume_and_are_drawn(tmp_path: Path) -> None:
    arguments = ["--methods", "streaming-llm,knorm", "--budget", "25%", "--length", "128"]
    first = run(*arguments, "--out", str(tmp_path))
    assert first.exit_code == 0, first.output
    rows = read(tmp_path / k.FILE, k.KIND, k.VERSION)
    assert run(*arguments, "--out", str(tmp_path)).exit_code == 0
    assert read(tmp_path / k.FILE, k.KIND, k.VERSION) == rows
    page, text = tmp_path / "page.html", tmp_path / "tables.md"
    done = CliRunner().invoke(
        app, ["report", str(tmp_path), "-o", str(page), "--markdown", str(text)]
    )
    assert done.exit_code == 0, done.output
    assert page.read_text().count('<figure class="trace"') == 2
    assert "Kept of one document" in text.read_text()


def test_a_picture_has_a_bar_for_each_run() -> None:
    row = {
        "length": 100, "layers": [[[[0, 10]], [[50, 60], [90, 100]]]], "asked": [20, 25],
        "method": "m", "budget": "10%", "recipe": {"method": "m", "budget": 0.1, "window": 4},
        "right": True,
    }  # fmt: skip
    drawn = traces.picture(row)
    assert drawn.count('class="kept"') == 2 and drawn.count("M") == 3
    assert 'x="200.0"' in drawn and 'width="50.0"' in drawn
    assert "M0.0 0h100.0v6H0.0z" in drawn and "M900.0 7h100.0" in drawn
    assert traces.title(row) == "m window=4, 10%: answered right"
    cells = traces.table([row]).rows[0]
    assert [cell.order for cell in cells[2:]] == [0.25, 0.0, 0.25, 0.0, 0.25, 0.0]


def test_rows_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / k.FILE).write_text(json.dumps({"kind": "kept", "version": 9}) + "\n")
    with pytest.raises(ResultsError, match="line 1"):
        traces.read(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "walk"], "Nothing to measure"),
        (["--task", "retreival"], "Did you mean 'retrieval'"),
        (["--budget", "0"], "keeps nothing"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
