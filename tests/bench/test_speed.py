"""The speed harness on a tiny model: what rows hold, resuming, the table, the command."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from kvsieve.bench import markdown, rows
from kvsieve.bench.cell import whole_intervals
from kvsieve.bench.models import SHAPES, build, prompt, sharing
from kvsieve.bench.plan import Settings, Spec
from kvsieve.bench.remote import Peer, PeerError, interval
from kvsieve.bench.speed import measure
from kvsieve.bench.table import render
from kvsieve.bench.timing import Step, typical
from kvsieve.bench.variants import Sieve, Stock
from kvsieve.cli import app
from kvsieve.errors import RecipeError

TINY = Settings(
    shape=SHAPES["qwen3-tiny"],
    contexts=(96,),
    batches=(1, 2),
    dtypes=("float32",),
    methods=("full", "knorm", "adakv@40", "snapkv@40", "h2o:recent=4"),
    budget="25%",
    steps=4,
    rounds=2,
    warm_up=1,
)

FIGURES = {
    *("prefill_seconds", "prefill_ratio", "tokens_per_second", "tokens_per_second_best"),
    *("ratio_stock", "bytes_full", "bytes_kept", "bytes_peak", "bytes_layer", "step_seconds"),
    *("prefill_compress_share", "decode_compress_share", "slots", "schedule", "layout"),
    *("model_shape", "parameters", "parameter_bytes", "load"),
}


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    return list(measure(TINY))


def test_every_cell_has_a_row_with_all_fields(measured: list[dict[str, Any]]) -> None:
    names = ["stock", "short", "short", "full", "knorm", "adakv", "snapkv", "h2o"]
    assert [row["method"] for row in measured] == names * 2
    for row in measured:
        assert set(rows.IDENTITY) | FIGURES <= set(row)
        assert row["kind"] == "speed" and row["version"] == 1
        assert row["step_seconds"]["count"] in (4, 128)
        assert json.loads(json.dumps(row)) == row


def test_ratios_and_bytes_are_those_of_the_cell(measured: list[dict[str, Any]]) -> None:
    stock, knorm = measured[0], measured[4]
    assert stock["ratio_stock"] == 1
    ratio = knorm["tokens_per_second"] / knorm["stock_tokens_per_second"]
    assert knorm["ratio_stock"] == pytest.approx(ratio)
    assert knorm["bytes_kept"] < knorm["bytes_full"] == stock["bytes_full"]
    assert knorm["slots"] == 24 and measured[5]["layout"] == "ragged"


def test_measuring_leaves_the_threads_as_they_were(measured: list[dict[str, Any]]) -> None:
    assert torch.get_num_threads() == 1


def test_known_cells_are_skipped(measured: list[dict[str, Any]]) -> None:
    done = {rows.key(row) for row in measured[:-1]}
    left = list(measure(TINY, done))
    assert [rows.key(row) for row in left] == [rows.key(measured[-1])]
    assert not list(measure(TINY, {rows.key(row) for row in measured}))


def test_the_table_marks_noise(measured: list[dict[str, Any]]) -> None:
    row = dict(measured[3])
    shown = []
    for median in (1.0, 2.0):
        row["step_seconds"] = row["step_seconds"] | {"median": median, "min": 1.0}
        console = Console(record=True, width=200, file=io.StringIO())
        console.print(render([row]))
        shown.append("~" in console.export_text().splitlines()[4])
    assert shown == [False, True]


def test_markdown_has_both_precisions_in_a_line_and_no_disturbed_ratio(
    measured: list[dict[str, Any]],
) -> None:
    knorm = next(row for row in measured if row["method"] == "knorm" and row["batch"] == 1)
    calm = {"step_seconds": knorm["step_seconds"] | {"median": 1.0, "min": 1.0}}
    busy = {"step_seconds": knorm["step_seconds"] | {"median": 2.0, "min": 1.0}}
    half = knorm | {"dtype": "bfloat16", "ratio_stock": 9.0} | busy
    table = markdown.full_tables([knorm | {"ratio_stock": 5.25} | calm, half])
    lines = table.splitlines()
    assert lines[0] == "## 96 tokens, batch 1" and len(lines) == 5
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells[:3] == ["knorm", "25%", "5.25"] and cells[4] == "~"
    assert markdown.short_tables([knorm]) == "", "knorm is not among the short tables' methods"


def test_what_a_method_refuses_is_a_row() -> None:
    with pytest.raises(RecipeError, match="no room"):
        Settings(methods=("snapkv@16",))
    share = Settings(
        shape=SHAPES["qwen3-tiny"], contexts=(96,), batches=(1,), dtypes=("float32",),
        methods=("snapkv@10%",), steps=1, rounds=1,
    )  # fmt: skip
    refused = list(measure(share))[-1]
    assert "no room" in refused["error"] and "tokens_per_second" not in refused
    render([refused])


def test_decoding_gives_the_stock_tokens_where_nothing_is_removed() -> None:
    shape = SHAPES["qwen3-tiny"]
    model = build(shape, "float32", "cpu")
    ids = prompt(shape, 40, 2)
    stock = Stock(model, ids)
    sieve = Sieve(sharing(model), ids, Spec(method="full").recipe())
    with torch.no_grad():
        for variant in (stock, sieve):
            variant.prefill()
            variant.steps(5)
        assert torch.equal(stock.token, sieve.token)
        last = stock.token
        stock.rewind()
        stock.steps(5)
    assert torch.equal(stock.token, last)
    sieve.close()


def test_weights_are_shared_but_the_attention_is_not() -> None:
    model = build(SHAPES["qwen3-tiny"], "float32", "cpu")
    twin = sharing(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert model.config is not twin.config


@pytest.mark.parametrize(
    ("text", "budget", "options"),
    [
        ("snapkv", 0.1, {}),
        ("g-kv@1024:interval=64", 1024, {"interval": 64}),
        ("tova:schedule=after-prefill", 0.1, {"schedule": "after-prefill"}),
        ("full", None, {}),
    ],
)
def test_methods_are_named_with_budget_and_options(
    text: str, budget: Any, options: dict[str, Any]
) -> None:
    spec = Spec.parse(text, "10%")
    assert (spec.budget, spec.options) == (budget, options)


@pytest.mark.parametrize("text", ["snapkv:window", "nosuch", "snapkv:wind=3", "snapkv@0"])
def test_wrong_names_are_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        Settings(methods=(text,))


def test_budgets_that_a_context_does_not_fill_are_left_out() -> None:
    specs = TINY.specs(32)
    assert "adakv" not in [spec.method for spec in specs]


def test_cells_of_too_many_tokens_are_left_out() -> None:
    grid = Settings(contexts=(2048, 32768), batches=(1, 4), dtypes=("float32",))
    assert [(g.context, g.batch) for g in grid.groups()] == [(2048, 1), (2048, 4), (32768, 1)]


def test_a_step_costs_its_share_of_the_events() -> None:
    steps = [Step(1.0)] * 7 + [Step(9.0, event=True)]
    assert typical(steps) == 2.0
    assert typical([Step(3.0, event=True)] * 4) == 3.0
    assert typical([Step(1.0), Step(2.0), Step(9.0)]) == 2.0


def test_intervals_are_run_whole() -> None:
    assert interval(Spec.parse("g-kv", "10%")) == 128
    assert interval(Spec.parse("snapkv", "10%")) is None
    assert interval(Spec.parse("h2o", "10%")) == 1
    assert [whole_intervals(32, every) for every in (None, 1, 128, 512)] == [32, 32, 128, 32]


def test_files_survive_a_killed_run(tmp_path: Path, measured: list[dict[str, Any]]) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert rows.read(path) == []
    rows.append(path, measured[0])
    with path.open("a") as file:
        file.write('{"kind": "speed", "vers')
    assert rows.read(path) == measured[:1]
    rows.append(path, measured[1])
    assert rows.read(path) == measured[:2]


COMMAND = [
    *("bench", "speed", "--quick", "--methods", "full,knorm", "--threads", "1", "--steps", "8"),
]


def test_the_command_resumes_from_its_file_and_prints_it(tmp_path: Path) -> None:
    path = tmp_path / "speed.jsonl"
    runner = CliRunner()
    first = runner.invoke(app, [*COMMAND, "--json", "--out", str(path)])
    assert first.exit_code == 0, first.output
    assert [json.loads(line) for line in first.stdout.splitlines()] == rows.read(path)
    assert "no --peer-python" in first.stderr
    again = runner.invoke(app, [*COMMAND, "--out", str(path)])
    assert len(rows.read(path)) == 4 and "knorm" in again.stdout
    shown = runner.invoke(app, ["bench", "speed", "--table", str(path)])
    assert shown.stdout == again.stdout and "0.1M parameters" in shown.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--contexts", "many"],
        ["--dtypes", "int4"],
        ["--methods", "nosuch"],
        ["--device", "abacus"],
        ["--table", "nosuch.jsonl"],
        ["--steps", "0"],
    ],
)
def test_bad_input_ends_with_2(options: list[str]) -> None:
    done = CliRunner().invoke(app, ["bench", "speed", *options])
    assert done.exit_code == 2, done.output


FAKE_KVPRESS = """
class _Press:
    def __init__(self, *args, **options):
        self.options = options
    def __call__(self, model):
        import contextlib
        return contextlib.nullcontext()
SnapKVPress = KnormPress = AdaKVPress = DecodingPress = PrefillDecodingPress = _Press
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The peer's process with a kvpress that does nothing."""
    (tmp_path / "kvpress.py").write_text(FAKE_KVPRESS)
    facts = tmp_path / "kvpress-0.5.5.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 0.5.5\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = Peer(sys.executable, 1)
    yield started
    started.close()


def test_the_peer_takes_its_turns(peer: Peer) -> None:
    settings = Settings(
        shape=SHAPES["qwen3-tiny"], contexts=(96,), batches=(1,), dtypes=("float32",),
        methods=("full", "snapkv@40", "keydiff", "laprox@40"), steps=2, rounds=2, peer=True,
    )  # fmt: skip
    found = {(r["engine"], r["method"]): r for r in measure(settings, peer=peer)}
    row = found["kvpress", "snapkv"]
    assert row["versions"]["kvpress"] == "0.5.5" and row["ratio_stock"] > 0
    assert row["bytes_kept"] == row["bytes_full"], "this kvpress removes nothing"
    assert ("kvpress", "full") not in found
    assert ("kvpress", "laprox") not in found, "kvpress has none"
    assert "KeyDiffPress" in found["kvpress", "keydiff"]["error"]


def test_a_python_without_kvpress_is_refused() -> None:
    with pytest.raises(PeerError, match="nosuch"):
        Peer("/nosuch/python", 1)
