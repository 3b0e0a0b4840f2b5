"""`kvsieve calibrate`: from text to a file that methods take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kvsieve import reference
from kvsieve.cli.models import Choice
from kvsieve.statistics import TENSORS, Statistics

from .support import call, call_json


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(reference.sample("reasoning", seed=1, steps=60).prompt, "utf-8")
    return path


SMALL = ("--length", "100", "--first", "8", "--recent", "24")


def test_a_file_is_made_and_used(text: Path, story: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    called = call("calibrate", "--text", str(text), "--out", str(out), *SMALL)
    assert called.code == 0 and called.err == ""
    assert f"wrote     {out}" in called.out and "the reference model: a qwen3 of" in called.out
    assert "with expected-attention, q-filters, duo-attention" in called.out
    assert set(Statistics.load(out).tensors) == set(TENSORS)
    for method, sizes in {
        "q-filters": ("--set", "recent=16"),
        "duo-attention": ("--set", "sinks=8", "--set", "recent=24"),
        "expected-attention": (),
    }.items():
        ran = call(
            "run", "--method", method, "--budget", "60", "--set", f"stats={out}", *sizes,
            "--prompt-file", str(story), "--max-new-tokens", "4",
        )  # fmt: skip
        assert ran.code == 0 and "slots " in ran.err, ran.err


def test_several_files_stdin_and_a_limit(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    made = call_json(
        "calibrate", "--text", str(text), "--text", str(text), "--out", str(out), *SMALL
    )
    words = len(text.read_text("utf-8").split())
    assert made["version"] == 1 and made["all_tokens"] == 2 * words
    assert made["out"] == str(out) and made["bytes"] == out.stat().st_size
    model = Statistics.load(out).identity
    assert model is not None and made["model"] == model.plain()
    assert made["tensors"] == {n: list(model.shape(n)) for n in TENSORS}
    few = call_json(
        "calibrate", "--text", str(text), "--out", str(out), *SMALL, "--max-tokens", "150"
    )
    assert (few["tokens"], few["passages"]) == (150, 2) and few["all_tokens"] == words
    piped = tmp_path / "p"
    called = call(
        "calibrate", "--text", "-", "--out", str(piped), *SMALL, "--max-tokens", "150",
        stdin=text.read_text("utf-8"),
    )  # fmt: skip
    assert called.code == 0 and piped.read_bytes() == out.read_bytes()


def test_a_model_of_the_user_gives_the_same_file(
    text: Path, own_model: str, tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "a", tmp_path / "b"
    given = ("calibrate", "--text", str(text), *SMALL)
    assert call(*given, "--out", str(ours)).code == 0
    called = call(*given, "--out", str(theirs), "--model", own_model, "--dtype", "float32")
    assert called.code == 0, called.err
    first, second = Statistics.load(ours), Statistics.load(theirs)
    assert first.identity is not None and second.identity is not None
    assert first.identity.same(second.identity)
    # The tokenizer may put a token of its own in front of a passage.
    assert first.tensors["query_filter"].shape == second.tensors["query_filter"].shape


def test_short_passages_make_no_gates_and_that_is_said(
    text: Path, story: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stats.safetensors"
    called = call("calibrate", "--text", str(text), "--out", str(out), "--length", "64")
    assert called.code == 0
    assert "head gates: Head gates need passages of more than 384 tokens." in called.out
    assert "with expected-attention, q-filters\n" in called.out
    ran = call(
        "run", "--method", "duo-attention", "--budget", "600", "--set", f"stats={out}",
        "--prompt-file", str(story),
    )  # fmt: skip
    assert ran.code == 2 and "has no head_gate, only query_covariance" in ran.err
    assert "more than 384 tokens. Make another with `kvsieve calibrate" in ran.err


BAD: dict[str, tuple[Sequence[str], str]] = {
    "no text": (("--out", "x"), "--text FILE"),
    "no out": (("--text", "TEXT"), "--out stats.safetensors"),
    "missing text": (("--text", "/no/such", "--out", "x"), "Can't read the text file '/no/such'"),
    "a folder": (("--text", "/", "--out", "x"), "Is a directory"),
    "empty": (("--text", "EMPTY", "--out", "x"), "is empty"),
    "not utf-8": (("--text", "BYTES", "--out", "x"), "not UTF-8"),
    "unknown words": (("--text", "WORDS", "--out", "x"), "never seen 'hello'"),
    "no such folder": (("--text", "TEXT", "--out", "/no/such/x"), "there is no such folder"),
    "out is a folder": (("--text", "TEXT", "--out", "/"), "it is a folder"),
    "length": (("--text", "TEXT", "--out", "x", "--length", "5"), "sinks by 2 tokens or more"),
    "max tokens": (("--text", "TEXT", "--out", "x", "--max-tokens", "0"), "exceed the 4 sinks"),
    "sinks": (("--text", "TEXT", "--out", "x", "--sinks", "-1"), "0 or more"),
    "recent": (("--text", "TEXT", "--out", "x", "--recent", "0"), "--recent 1 or more"),
    "dtype": (("--text", "TEXT", "--out", "x", "--dtype", "float31"), "Did you mean 'float32'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_loading(
    case: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(choice: Choice) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Choice, "open", loaded)
    monkeypatch.chdir(tmp_path)
    files = {"EMPTY": b" \n", "BYTES": b"\xff\xfe", "WORDS": b"hello there"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    arguments, message = BAD[case]
    given = [str(text) if x == "TEXT" else x for x in arguments]
    called = call("calibrate", *given)
    assert (called.code, called.out) == (2, ""), called
    assert called.err.startswith("Error: ") and message in called.err
    assert called.err.strip().count("\n") == 0
    assert not (tmp_path / "x").exists()


def test_what_only_the_model_brings_out(text: Path, tmp_path: Path) -> None:
    out, short = tmp_path / "x", tmp_path / "short.txt"
    short.write_text(" ".join(text.read_text("utf-8").split()[:4]), "utf-8")
    called = call("calibrate", "--text", str(short), "--out", str(out))
    assert called.code == 2 and "4 tokens: too few" in called.err
    called = call("calibrate", "--text", str(text), "--out", str(out), "--length", "9999")
    assert called.code == 2 and f"takes {reference.MAX_TOKENS} tokens" in called.err
    assert not out.exists()


def test_a_file_that_cannot_be_written(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Statistics, "save", full)
    called = call("calibrate", "--text", str(text), "--out", str(tmp_path / "x"), *SMALL)
    assert called.code == 1 and "No space left on device" in called.err


@pytest.mark.parametrize("name", ["q-filters", "duo-attention"])
def test_methods_without_a_file_name_the_command_before_loading(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Choice, "open", lambda _: pytest.fail("a model was loaded"))
    called = call("run", "--method", name, "--budget", "600", "--prompt", "add")
    assert called.code == 2 and "`kvsieve calibrate --model MODEL --text FILE" in called.err
    missing = call(
        "run", "--method", name, "--budget", "600", "--prompt", "add", "--set", "stats=/no/such"
    )
    assert missing.code == 2 and "'/no/such'" in missing.err


def test_a_file_of_another_model_is_refused(story: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    assert call("calibrate", "--text", str(text), "--out", str(out), *SMALL).code == 0
    stats = Statistics.load(out)
    assert stats.identity is not None
    stats.identity.sample.add_(torch.ones_like(stats.identity.sample))
    stats.save(out)
    ran = call(
        "run", "--method", "q-filters", "--budget", "100", "--set", f"stats={out}",
        "--prompt-file", str(story),
    )  # fmt: skip
    assert ran.code == 2 and "made from another model" in ran.err and "other weights" in ran.err
