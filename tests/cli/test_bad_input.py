"""Bad input: exit code 2, one paragraph on stderr, before a model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvsieve import reference
from kvsieve.cli.models import Choice

from .support import call

WORDS = ("--prompt", "add")
KNORM = ("--method", "knorm", "--budget", "10")

BEFORE_LOADING: dict[str, tuple[Sequence[str], str]] = {
    "no method": (WORDS, "Name a --method"),
    "unknown method": (("--method", "snapkvv", *WORDS), "Did you mean 'snapkv'"),
    "budget 0": (("--method", "knorm", "--budget", "0", *WORDS), "keeps nothing"),
    "budget -3": (("--method", "knorm", "--budget", "-3", *WORDS), "keeps nothing"),
    "budget 101%": (("--method", "knorm", "--budget", "101%", *WORDS), "not a fraction"),
    "budget 1.5": (("--method", "knorm", "--budget", "1.5", *WORDS), "not a fraction"),
    "budget x": (("--method", "knorm", "--budget", "x", *WORDS), "'x' is not a budget"),
    "no budget": (("--method", "knorm", *WORDS), "needs a budget"),
    "budget of full": (("--method", "full", "--budget", "9", *WORDS), "takes no budget"),
    "no room": (("--method", "snapkv", "--budget", "9", *WORDS), "leaves no room"),
    "no prompt": (KNORM, "in one way"),
    "two prompts": ((*KNORM, *WORDS, "--sample", "walk"), "in one way"),
    "steps alone": ((*KNORM, *WORDS, "--steps", "3"), "with --sample"),
    "unknown sample": ((*KNORM, "--sample", "wolk"), "Did you mean 'walk'"),
    "sample for a model": ((*KNORM, "--sample", "walk", "--model", "x/y"), "leave out --model"),
    "empty prompt": ((*KNORM, "--prompt", " \n"), "The prompt is empty"),
    "unknown words": ((*KNORM, "--prompt", "hello"), "never seen 'hello'"),
    "missing file": ((*KNORM, "--prompt-file", "/no/such"), "No such file"),
    "a directory": ((*KNORM, "--prompt-file", "/"), "Is a directory"),
    "no new tokens": ((*KNORM, *WORDS, "--max-new-tokens", "0"), "must be 1 or more"),
    "not a number": ((*KNORM, *WORDS, "--max-new-tokens", "few"), "--max-new-tokens"),
    "cold": ((*KNORM, *WORDS, "--temperature", "-1"), "must be 0"),
    "set without value": ((*KNORM, *WORDS, "--set", "interval"), "KEY=VALUE"),
    "unknown option": ((*KNORM, *WORDS, "--set", "intervall=3"), "Did you mean 'interval'"),
    "wrong type": ((*KNORM, *WORDS, "--set", "interval=x"), "takes a whole number, not 'x'"),
    "wrong schedule": ((*KNORM, *WORDS, "--set", "schedule=evry:3"), "Did you mean 'every'"),
    "wrong span": ((*KNORM, *WORDS, "--protect", "7"), "START:END"),
    "reversed span": ((*KNORM, *WORDS, "--protect", "7:2"), "start < end"),
    "dtype": ((*KNORM, *WORDS, "--dtype", "float31"), "Did you mean 'float32'"),
    "device": ((*KNORM, *WORDS, "--device", "gpu9"), "Can't use --device gpu9"),
    "no recipe file": (("--recipe", "/no/such.toml", *WORDS), "Can't read the recipe"),
    "unknown flag": ((*KNORM, *WORDS, "--frobnicate"), "--frobnicate"),
}


@pytest.mark.parametrize("given", BEFORE_LOADING)
def test_refused_before_loading(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(choice: Choice) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Choice, "open", loaded)
    arguments, message = BEFORE_LOADING[given]
    called = call("run", *arguments)
    assert (called.code, called.out) == (2, ""), called
    assert called.err.startswith("Error: ") and message in called.err
    assert called.err.strip().count("\n") == 0


def test_files_that_are_no_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    for content, message in {b"\xff\xfe": "not UTF-8", b"": "is empty", b" \n": "is empty"}.items():
        path.write_bytes(content)
        called = call("run", *KNORM, "--prompt-file", str(path))
        assert called.code == 2 and message in called.err
    piped = call("run", *KNORM, "--prompt-file", "-", stdin=b"\xff")
    assert piped.code == 2 and "not UTF-8" in piped.err


def test_a_prompt_beyond_the_context(own_model: str) -> None:
    asked = str(reference.MAX_TOKENS)
    called = call("run", *KNORM, *WORDS, "--max-new-tokens", asked)
    assert called.code == 2 and f"takes {asked} in all" in called.err
    called = call("run", *KNORM, "--prompt", "add " * 8200, "--model", own_model)
    assert called.code == 2 and "8200 + 1" in called.err and f"{asked} in all" in called.err


def test_chat_needs_a_template(own_model: str, tmp_path: Path) -> None:
    for model in ((), ("--model", own_model)):
        called = call("run", *KNORM, *WORDS, "--chat", *model)
        assert called.code == 2 and "no chat template" in called.err
    chatty = tmp_path / "chatty"
    shutil.copytree(own_model, chatty)
    template = "<bos> <ctx> {{ messages[0]['content'] }} <q>"
    (chatty / "chat_template.jinja").write_text(template, "utf-8")
    given = ("run", *KNORM, "--prompt", "gal", "--model", str(chatty), "--max-new-tokens", "1")
    called = call(*given, "--chat")
    assert called.code == 0 and "tokens    4 in the prompt" in called.err
    assert "tokens    1 in the prompt" in call(*given).err


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}', "utf-8")
    for model, message in {
        "nobody/nothing-here": "offline?",
        "./no-such-folder": "no such folder",
        str(tmp_path): "Unrecognized model",
        str(tmp_path / "t5"): "decoder-only",
    }.items():
        called = call("run", *KNORM, *WORDS, "--model", model)
        assert (called.code, called.out) == (2, "") and message in called.err, called
        assert f"{model!r}" in called.err and called.err.strip().count("\n") == 0


def test_a_share_too_small_for_the_prompt_is_bad_input(story: Path) -> None:
    called = call("run", "--method", "g-kv", "--budget", "5%", "--prompt-file", str(story))
    assert (called.code, called.out) == (2, "") and "leaves no room" in called.err
