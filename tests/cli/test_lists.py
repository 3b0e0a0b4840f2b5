"""`kvsieve methods`, `show`, `sample`, and the tables in the documents."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvsieve
from kvsieve import reference
from kvsieve.catalogue import DOCUMENTS, FULL, catalogue, document, methods_table, refresh
from kvsieve.registry import methods

from .support import call, call_json

ROOT = Path(__file__).parents[2]


def test_methods_as_json() -> None:
    entries = call_json("methods")
    assert [entry["name"] for entry in entries] == list(methods())
    fields = "name paper year phases scope needs layout engines certainty".split()
    assert all(list(entry) == fields for entry in entries)
    by_name = {entry["name"]: entry for entry in entries}
    assert by_name["full"] | {"phases": [], "scope": None, "needs": []} == by_name["full"]
    assert by_name["g-kv"]["phases"] == ["prefill", "decode"]
    assert by_name["kvzip"]["needs"] == ["replay of the prompt"]
    assert (by_name["adakv"]["scope"], by_name["adakv"]["layout"]) == ("layer", "ragged")
    assert (by_name["laprox"]["scope"], by_name["snapkv"]["scope"]) == ("model", "head")


def test_methods_as_a_table() -> None:
    called = call("methods")
    assert (called.code, called.err) == (0, "")
    first_words = {line.split()[0] for line in called.out.splitlines() if line.strip()}
    assert set(methods()) <= first_words


@pytest.mark.parametrize("name", methods())
def test_show_explains_every_method(name: str) -> None:
    called = call("show", name)
    assert called.code == 0 and called.out.startswith(f"{name}: ")
    for option in methods()[name].options():
        assert f"\n  {option} " in called.out
    assert "Differs from the paper" in called.out
    assert f"arxiv.org/abs/{methods()[name].arxiv}" in called.out or not methods()[name].arxiv


def test_show_says_what_kvzip_asks_a_model() -> None:
    assert "Repeat the previous context exactly." in call("show", "kvzip").out
    assert "Repeat the previous context exactly." not in call("show", "snapkv").out


@pytest.mark.parametrize("kind", reference.KINDS)
def test_sample_prints_the_prompt_and_nothing_else(kind: str) -> None:
    called = call("sample", kind, "--seed", "3")
    assert called == (0, reference.sample(kind, seed=3).prompt, "")


def test_sample_has_sizes() -> None:
    short, long = (call("sample", "reasoning", "--steps", n).out for n in ("5", "50"))
    assert len(short.split()) < len(long.split())
    refused = call("sample", "reasoning", "--length", "100")
    assert refused.code == 2 and "steps" in refused.err


def test_version_and_help() -> None:
    assert call("--version") == (0, f"kvsieve {kvsieve.__version__}\n", "")
    assert call("--help").code == call().code == 0
    for command in ("run", "compare", "calibrate", "sample", "methods", "show", "bench"):
        assert command in call().out
        assert call(command, "--help").code == 0


def test_the_markdown_table_has_every_method() -> None:
    lines = methods_table().splitlines()
    assert len(lines) == 2 + len(catalogue())
    assert all(line.count(" | ") == len(FULL) - 1 for line in lines)
    assert "[SnapKV](https://arxiv.org/abs/2404.14469)" in methods_table(("name", "paper"))


def test_a_document_is_refreshed_between_its_markers(tmp_path: Path) -> None:
    before = "a\n<!-- methods -->\nstale\n<!-- /methods -->\nb\n"
    (tmp_path / "README.md").write_text(before, "utf-8")
    assert refresh(tmp_path) == [tmp_path / "README.md"]
    after = (tmp_path / "README.md").read_text("utf-8")
    assert after.startswith("a\n<!-- methods -->\n| name |") and after.endswith("-->\nb\n")
    assert "stale" not in after and refresh(tmp_path) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_documents_are_up_to_date(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert any(f"<!-- {marker} -->" in text for marker in DOCUMENTS[name])
    assert document(ROOT, name) == text, "run: python -m kvsieve.catalogue"
