"""The report and the recommendation, from a few made-up rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvsieve.bench.report import aggregate, check, reading, tables
from kvsieve.bench.report.aggregate import Estimate, pooled
from kvsieve.bench.report.plots import Style
from kvsieve.cli import app

Row = dict[str, Any]
Save = Callable[..., Path]

EVIL = "<script>alert('x')</script>|`$\\alpha$` & \"q\"\u202e\ud800\0"
VOID = {"meta", "path", "use", "link"}


def row(method: str = "snapkv", kept: int = 100, low: float = -0.02, **changes: Any) -> Row:
    """Return a row whose paired difference is half of ``low`` on average."""
    marks = {"score": 0.9, "low": 0.8, "high": 0.95, "right": [1] * 9 + [0]}
    return {
        "kind": "quality",
        "version": 1,
        "engine": "transformers",
        "model": "reference-v1",
        "weights": "sha256:12",
        "task": "reasoning",
        "task_version": 1,
        "setting": "decode",
        "length": 512,
        "method": method,
        "budget": "10%",
        "recipe": {},
        "seed": 0,
        "n": 10,
        "metric": "exact",
        **marks,
        "prefix": 0.95,
        "full": marks,
        "difference": {"mean": low / 2, "low": low, "high": 0.0},
        "cache": {"bytes_full": 1000, "bytes_kept": kept, "bytes_peak": kept + 10},
        "seconds": {"prefill": 0.1, "decode": 1.0, "compress": 0.01},
        "tokens_per_second": 50.0,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "versions": {"kvsieve": "0.1.0"},
        "commit": "abc1234",
        "error": None,
        **changes,
    }


def failed(method: str = "h2o", error: str = "out of memory", **changes: Any) -> Row:
    made = row(method, error=error, **changes)
    return {k: v for k, v in made.items() if k not in ("score", "full", "cache", "difference")}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def made(*rows: Row, name: str = "results", tail: str = "") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        lines = "".join(json.dumps(r) + "\n" for r in rows) + tail
        (folder / reading.FILE).write_text(lines, "utf-8")
        return folder

    return made


ROWS = (
    row(),
    row(seed=1, cache={"bytes_full": 1000, "bytes_kept": 120, "bytes_peak": None}),
    row("knorm", kept=250, budget="25%", tokens_per_second=None),
    row("h2o", recipe={"recent": 4}, length=None, setting="query-aware"),
    row("h2o", recipe={"recent": 8}, length=None, setting="query-aware", prefix=None),
    row("full", kept=1030, budget=None),
    failed(EVIL, error=EVIL, setting="query-aware"),
    row(EVIL, model=EVIL, task=EVIL, recipe={EVIL: EVIL}, versions={EVIL: EVIL}, weights=EVIL),
    row(EVIL, model=EVIL, task=EVIL, recipe={}, versions={EVIL: EVIL}, weights=EVIL),
)


class Page(HTMLParser):
    """The tags of a page, checked to be closed in turn, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def make(folder: Path) -> tuple[bytes, bytes]:
    """Return the page and the Markdown of a folder."""
    page, markdown = folder / "page.html", folder / "tables.md"
    done = call("report", folder, "-o", page, "--markdown", markdown)
    assert done.exit_code == 0, done.output
    return page.read_bytes(), markdown.read_bytes()


@pytest.fixture
def made(save: Save) -> tuple[str, str]:
    page, markdown = make(save(*ROWS))
    return page.decode(), markdown.decode()


def test_data_is_shown_as_text(made: tuple[str, str]) -> None:
    page = Page(made[0])
    shown = "<script>alert('x')</script>|`$\\alpha$` & \"q\"\ufffd\ufffd\ufffd"
    assert page.text.count(shown) > 8
    assert [tag for tag, _ in page.seen].count("script") == 1
    assert "alert(&#39;x&#39;)" in made[0] and "alert('x')" not in made[0]


def test_the_page_needs_nothing_else(made: tuple[str, str]) -> None:
    page = Page(made[0])
    ids = [attrs["id"] for _, attrs in page.seen if "id" in attrs]
    assert len(ids) == len(set(ids)) > 100
    for tag, attrs in page.seen:
        assert tag not in ("link", "img", "iframe", "object") and "src" not in attrs
        for name in ("href", "xlink:href"):
            target = attrs.get(name)
            assert target is None or (target[0] == "#" and target[1:] in ids), (tag, target)
    for clip in {attrs["clip-path"] for _, attrs in page.seen if "clip-path" in attrs}:
        assert clip is not None and clip[5:-1] in ids
    assert "prefers-color-scheme: dark" in made[0] and "#fe0001" not in made[0]


def test_every_task_and_setting_has_a_plot_and_a_table(made: tuple[str, str]) -> None:
    page = Page(made[0])
    names = [tag for tag, _ in page.seen]
    assert names.count("figure") == 3 and names.count("table") == 10
    labels = [attrs.get("aria-label") for tag, attrs in page.seen if tag == "figure"]
    assert any("reasoning, decode, length 512." in str(label) for label in labels)
    drawn = {i.split("-")[2] for _, a in page.seen if "-series" in (i := str(a.get("id")))}
    pressed = {f"series{attrs['data-series']}" for _, attrs in page.seen if "data-series" in attrs}
    assert drawn == pressed and len(drawn) == 6
    for term in ("h2o recent=4", "h2o recent=8", "KV cache", "abc1234", "kvsieve 0.1.0"):
        assert term in page.text


def test_a_table_shows_what_was_measured(made: tuple[str, str]) -> None:
    lines = made[1].splitlines()
    (seeds,) = [line for line in lines if line.startswith("| snapkv | 10% |")]
    assert "| 10% | 11.0% |" in seeds and "| 20 | 110 bytes | 110 bytes |" in seeds
    (knorm,) = [line for line in lines if line.startswith("| knorm |") and "bytes" in line]
    assert "\\[0.800, 0.950\\]" in knorm and "| -0.010 \\[-0.020, +0.000\\] |" in knorm
    assert any(line.startswith("| full cache |") for line in lines)
    (broken,) = [line for line in lines if line.startswith("| reasoning | query-aware | 512 ")]
    assert broken.count("\\<script\\>") == 2 and " | 512 | " in broken


def test_markdown_cells_cannot_be_broken(made: tuple[str, str]) -> None:
    widths: set[int] = set()
    for line in (*made[1].splitlines(), ""):
        if not line.startswith("|"):
            assert len(widths) < 2, "rows of one table have as many cells"
            widths = set()
        else:
            widths.add(line.replace("\\\\", "").replace("\\|", "").count("|"))
    assert "<script" not in made[1].replace("\\<", "")


def test_equal_rows_give_equal_bytes(save: Save) -> None:
    one = make(save(*ROWS, name="one"))
    other = make(save(*reversed(ROWS), name="other"))
    assert one == other
    changed = make(save(*ROWS[:-1], name="changed"))
    assert one[0] != changed[0] and one[1] != changed[1]


def test_the_last_row_of_a_cell_counts(save: Save) -> None:
    again = row(kept=500, commit="def5678")
    folder = save(row(), failed("snapkv", seed=1), again, row(seed=1), tail='{"kind": "qual')
    found = reading.read(folder)
    assert [r["cache"]["bytes_kept"] for r in found.rows] == [500, 100] and not found.failed
    assert [remark.split(":")[0] for remark in found.remarks()] == [
        "These rows differ in their commit",
        "Left out",
    ]
    done = call("report", folder, "--markdown", folder / "x.md")
    assert "differ in their commit" in done.stderr and "1 line(s)" in done.stderr


def test_failed_rows_alone_make_a_page(save: Save) -> None:
    page, markdown = make(save(failed()))
    assert b"nothing to plot" in page and b"out of memory" in markdown
    Page(page.decode())


def test_pooling() -> None:
    one, other = Estimate(0.5, 0.4, 0.6), Estimate(0.9, 0.7, 1.0)
    assert pooled([(10, one)]) == one
    both = pooled([(100, one), (300, other)])
    assert both.mean == pytest.approx(0.25 * 0.5 + 0.75 * 0.9)
    assert both.low == pytest.approx(0.8 - (0.025**2 + 0.15**2) ** 0.5)
    assert both.high == pytest.approx(0.8 + (0.025**2 + 0.075**2) ** 0.5)
    same = pooled([(50, one)] * 4)
    assert same.mean - same.low == pytest.approx(0.1 / 2), "four times the prompts, half the width"


def test_the_full_cache_counts_each_prompt_once() -> None:
    better = ROWS[0]["full"] | {"score": 1.0, "high": 1.0}
    rows = [row(), row("knorm"), row("h2o"), row(seed=1, full=better)]
    assert aggregate.full_score(rows).mean == pytest.approx(0.95)
    (section,) = aggregate.sections(rows)
    first = tables.points(section.panels[0]).rows[0]
    assert [cell.text for cell in first][::6] == ["full cache", "20"]


def test_styles_differ() -> None:
    seen = {(s.colour, s.marker) for s in map(Style, range(56))}
    assert len(seen) == 56


# Smaller to larger: knorm 10% loses on average, snapkv 12% within 1 %, h2o 25% nothing at all.
CASE = (
    row("knorm", kept=100, low=-0.03),
    row("snapkv", kept=120, low=-0.009),
    row("h2o", kept=250, low=0.0, budget="25%"),
    row("full", kept=1030, low=0.0, budget=None),
)


def advice(folder: Path, max_loss: str, *more: str) -> Any:
    given = ("--task", "reasoning", "--max-loss", max_loss, *more)
    done = call("recommend", folder, *given, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("max_loss", "verdict", "method", "smaller"),
    [
        ("3%", "holds", "knorm", None),
        ("2%", "holds", "snapkv", "knorm"),
        ("1%", "holds", "snapkv", None),
        ("0.009", "holds", "snapkv", None),
        ("0.5%", "holds", "h2o", "snapkv"),
        ("0", "holds", "h2o", None),
    ],
)
def test_the_smallest_that_holds(
    save: Save, max_loss: str, verdict: str, method: str, smaller: str | None
) -> None:
    found = advice(save(*CASE), max_loss)
    assert (found["verdict"], found["choice"]["method"]) == (verdict, method)
    beside = found["smaller_by_mean"]
    assert (beside and beside["method"]) == smaller
    assert found["considered"] == 3 and found["closest"] is None


def test_only_the_mean_or_nothing(save: Save) -> None:
    folder = save(*CASE[:2])
    found = advice(folder, "0.5%")
    assert (found["verdict"], found["choice"]["method"]) == ("mean only", "snapkv")
    assert found["smaller_by_mean"] is None
    found = advice(folder, "0.1%")
    assert (found["verdict"], found["choice"]) == ("none", None)
    assert found["closest"]["method"] == "snapkv"
    command = ("recommend", folder, "--task", "reasoning", "--max-loss")
    assert "ONLY BY THE MEAN" in call(*command, "0.5%").stdout
    nothing = call(*command, "0.1%").stdout
    assert "keep the full cache" in nothing and "Closest: snapkv at 10%" in nothing


def test_every_setting_must_hold(save: Save) -> None:
    aware = {"setting": "query-aware"}
    other = (
        row("snapkv", kept=120, low=-0.5, **aware),
        row("h2o", kept=250, low=0.0, budget="25%", **aware),
        row("knorm", kept=100, low=-0.03, **aware),
    )
    folder = save(*CASE, *other)
    assert advice(folder, "1%")["choice"]["method"] == "h2o"
    alone = advice(folder, "1%", "--setting", "decode")
    assert alone["choice"]["method"] == "snapkv" and alone["setting"] == "decode"
    assert list(alone["choice"]["differences"]) == ["decode"]


def test_what_was_not_measured_everywhere_is_left_out(save: Save) -> None:
    longer = row("h2o", kept=260, low=0.0, budget="25%", length=1024)
    folder = save(*CASE, longer, failed("h2o", length=1024))
    found = advice(folder, "3%")
    assert found["choice"]["method"] == "h2o" and found["considered"] == 1
    assert found["choice"]["bytes_kept"] == 255
    assert found["left_out"] == {
        "h2o at 10%": "failed: out of memory",
        "knorm at 10%": "no rows of decode, length 1024",
        "snapkv at 10%": "no rows of decode, length 1024",
    }


def test_the_rows_it_rests_on_are_printed(save: Save) -> None:
    seeds = [row("snapkv", kept=120 + 2 * s, low=-0.008, seed=s) for s in (0, 1)]
    folder = save(*CASE[::2], *seeds)
    shown = call("recommend", folder, "--task", "reasoning").stdout
    assert shown.startswith("snapkv at 10%: 121 bytes kept on average, 12.1% of full")
    assert "rules out a loss above 1% in every setting" in shown
    lines = [line.split()[1:3] + line.split()[-5:] for line in shown.splitlines()[-3:]]
    one, both = ["-0.004", "[-0.008,", "+0.000]"], ["-0.004", "[-0.007,", "-0.001]"]
    assert lines == [
        ["512", "0", *one, "120", "bytes"],
        ["512", "1", *one, "122", "bytes"],
        ["all", "all", *both, "121", "bytes"],
    ]
    found = advice(folder, "1%")["choice"]
    assert [r["seed"] for r in found["rows"]] == [0, 1]
    assert found["differences"]["decode"]["low"] == pytest.approx(-0.004 - 0.004 / 2**0.5)


def test_rows_of_two_models_are_not_compared(save: Save) -> None:
    folder = save(*CASE, row("snapkv", kept=50, low=0.0, model="other"))
    done = call("recommend", folder, "--task", "reasoning")
    assert done.exit_code == 2 and "--model" in done.stderr
    assert advice(folder, "1%", "--model", "other")["choice"]["bytes_kept"] == 50


BROKEN: dict[str, tuple[Row | list[Any], str]] = {
    "another version": (row(version=2), "line 1 is of version 2"),
    "another kind": (row(kind="speed"), "kind 'speed'"),
    "no object": ([1], "no JSON object"),
    "no score": ({k: v for k, v in row().items() if k != "score"}, "no 'score'"),
    "no bytes": (row(cache={"bytes_full": 3}), "no 'cache.bytes_kept'"),
    "bytes of nothing": (row(kept=0), "must be a number above 0"),
    "a score of nan": (row(score=float("nan")), "a share from 0 to 1"),
    "a percentage": (row(score=90), "a share from 0 to 1"),
    "true": (row(n=True), "a whole number"),
    "outside": (row(score=0.1), "outside its interval"),
    "reversed": (row(difference={"mean": 0, "low": 0.5, "high": 0.1}), "reversed"),
    "too few marks": (row(n=11), "10 answers are marked"),
    "no method": (row(method=""), "'method' must be text"),
    "failed without a seed": (failed(seed=None), "'seed' must be"),
}


@pytest.mark.parametrize("given", BROKEN)
def test_broken_rows_are_refused(given: str, save: Save) -> None:
    broken, message = BROKEN[given]
    folder = save(broken)  # type: ignore[arg-type]
    for command in (
        ("report", folder, "--markdown", folder / "x"),
        ("recommend", folder, "--task", "x"),
    ):
        done = call(*command)
        assert done.exit_code == 2 and message in done.stderr, done.output
        assert done.stderr.startswith("Error: ") and done.stderr.strip().count("\n") == 0
    assert not (folder / "x").exists()
    assert check.VERSION == 1


def test_bad_input(save: Save, tmp_path: Path) -> None:
    folder, empty = save(*CASE), save(name="empty")
    (tmp_path / "none").mkdir()
    out = ("--markdown", tmp_path / "x.md")
    asked = ("recommend", folder, "--task")
    for arguments, message in (
        (("report", tmp_path / "no", *out), "does not exist"),
        (("report", folder / reading.FILE, *out), "is no folder"),
        (("report", tmp_path / "none", *out), "has no quality.jsonl"),
        (("report", empty, *out), "no rows yet"),
        (("report", folder), "Say where to"),
        (("report", folder, "-o", tmp_path / "x.md", *out), "both name"),
        (("report", folder, "--markdown", tmp_path / "no" / "x.md"), "Can't write"),
        ((*asked, "resoning"), "Did you mean 'reasoning'"),
        ((*asked, "reasoning", "--setting", "decoding"), "Did you mean 'decode'"),
        ((*asked, "reasoning", "--model", "gpt"), "Possible: reference-v1"),
        (("recommend", folder), "--task"),
        *(
            ((*asked, "reasoning", f"--max-loss={loss}"), "below 1, such as 1% or 0.01")
            for loss in ("1", "-1%", "few", "nan", "100%", "%", "")
        ),
    ):
        done = call(*arguments)
        assert done.exit_code == 2 and message in done.stderr, (arguments, done.output)
        assert done.stdout == ""


def test_without_matplotlib(save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = save(*CASE)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = call("report", folder, "-o", tmp_path / "x.html")
    assert done.exit_code == 2 and 'pip install "kvsieve[report]"' in done.stderr
    assert call("report", folder, "--markdown", tmp_path / "x.md").exit_code == 0
