"""`kvsieve run`: the text, the report, the JSON object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvsieve
from kvsieve import reference
from kvsieve.cli.generation import Streamer
from kvsieve.cli.settings import with_request

from .support import call, call_json

ANSWER = reference.sample("reasoning", seed=5, steps=12).answer


def run(*arguments: str, story: Path) -> Any:
    return call_json("run", "--prompt-file", str(story), *arguments)


def test_the_json_object_has_exactly_the_documented_fields(story: Path) -> None:
    ran = run("--method", "snapkv", "--budget", "40", story=story)
    assert list(ran) == [
        *("version", "text", "method", "budget", "chosen", "prompt_tokens", "new_tokens"),
        *("tokens_per_second", "seconds", "cache"),
    ]
    assert set(ran["seconds"]) == {"prefill", "decode", "compress"}
    assert set(ran["cache"]) == {"bytes_full", "bytes_kept", "bytes_peak", "slots"}
    assert (ran["version"], ran["method"], ran["budget"]) == (1, "snapkv", "40 slots")


def test_a_method_that_chooses_needs_no_budget_and_says_what_it_chose(story: Path) -> None:
    ran = run("--method", "dbudgetkv", "--set", "tolerance=0.2", story=story)
    assert ran["budget"] == "100%"
    layers = [sum(layer) / 4 for layer in ran["cache"]["slots"]]
    decoded = ran["new_tokens"] - 1
    assert ran["chosen"] == [[ran["prompt_tokens"], sum(layers) / 4 - decoded]]
    assert layers[0] == layers[1] == ran["prompt_tokens"] + decoded > min(layers[2:])
    called = call("run", "--method", "dbudgetkv", "--prompt-file", str(story))
    assert "budget 100% at most, " in called.err and "of the tokens chosen" in called.err
    assert run("--method", "knorm", "--budget", "60", story=story)["chosen"] is None


def test_the_numbers_are_those_of_the_run(story: Path) -> None:
    ran = run("--method", "streaming-llm", "--budget", "40", "--max-new-tokens", "3", story=story)
    assert ran["prompt_tokens"] == len(story.read_text("utf-8").split())
    assert ran["new_tokens"] == len(ran["text"].split()) == 3
    assert ran["cache"]["slots"] == [[40] * 4] * 4  # per layer, per KV head
    assert 0 < ran["cache"]["bytes_kept"] <= ran["cache"]["bytes_peak"]
    assert ran["tokens_per_second"] > 0 and ran["seconds"]["prefill"] > 0


def test_without_compression_the_answer_is_right_and_ends_by_itself(story: Path) -> None:
    ran = run("--method", "full", story=story)
    assert ran["text"] == ANSWER and ran["budget"] is None
    assert ran["new_tokens"] == len(ANSWER.split()) + 1  # the end mark is not shown


def test_text_is_all_there_is_on_stdout(story: Path) -> None:
    called = call("run", "--method", "full", "--prompt-file", str(story))
    assert (called.code, called.out) == (0, ANSWER + "\n")
    assert "method    full, no budget" in called.err and "Error" not in called.err


def test_a_prompt_comes_from_text_stdin_or_a_sample(story: Path) -> None:
    text = story.read_text("utf-8")
    base = ("run", "--method", "full")
    sample = ("--sample", "reasoning", "--seed", "5", "--steps", "12")
    assert call(*base, "--prompt", text).out == ANSWER + "\n"
    assert call(*base, "--prompt-file", "-", stdin=text).out == ANSWER + "\n"
    sampled = call(*base, *sample)
    assert sampled.out == ANSWER + "\n" and "answer    right" in sampled.err


def test_a_wrong_answer_is_called_wrong() -> None:
    sample = ("--sample", "reasoning", "--seed", "5", "--steps", "12")
    called = call("run", "--method", "full", *sample, "--max-new-tokens", "3")
    assert called.code == 0 and "answer    wrong" in called.err


def test_options_reach_the_method(story: Path) -> None:
    settings = ("--set", "sinks=3", "--set", "schedule=each-step", "--set", "recent=0.25")
    short = ("--max-new-tokens", "8")
    few = run("--method", "knorm", "--budget", "20", *settings, *short, story=story)
    assert few["cache"]["slots"] == [[20] * 4] * 4
    shared = ("--method", "adakv", "--set", "scorer=h2o", "--set", "normalise=true")
    uneven = run(*shared, "--budget", "20%", "--set", "floor=0", *short, story=story)
    assert len({n for layer in uneven["cache"]["slots"] for n in layer}) > 1


def test_protected_tokens_need_room(story: Path) -> None:
    base = ("run", "--prompt-file", str(story), "--method", "knorm", "--budget", "40")
    assert call(*base, "--protect", "0:30", "--max-new-tokens", "2").code == 0
    refused = call(*base, "--protect", "0:30", "--protect", "35:45")
    assert refused.code == 2 and "40 in protected spans" in refused.err


def test_a_recipe_file_says_it_all(story: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('method = "streaming-llm"\nbudget = 24\nsinks = 2\n', "utf-8")
    ran = run("--recipe", str(recipe), "--max-new-tokens", "8", story=story)
    assert ran["method"] == "streaming-llm" and ran["cache"]["slots"][0] == [24] * 4
    both = call("run", "--recipe", str(recipe), "--budget", "9", "--prompt-file", str(story))
    assert both.code == 2 and "give it alone" in both.err


def test_the_seed_decides_at_a_temperature(story: Path) -> None:
    hot = ("--method", "full", "--temperature", "3", "--max-new-tokens", "12")
    first, same, other = (run(*hot, "--seed", seed, story=story)["text"] for seed in "112")
    assert first == same != other


def test_an_own_model_runs_the_same_way(story: Path, own_model: str) -> None:
    base = ("--model", own_model, "--dtype", "float32")
    ran = run(*base, "--method", "full", "--max-new-tokens", "9", story=story)
    assert ran["text"] == " ".join(ANSWER.split()[:9])
    zipped = run(
        *base, "--method", "kvzip", "--budget", "50%", "--max-new-tokens", "2", story=story
    )
    assert zipped["cache"]["bytes_kept"] < zipped["cache"]["bytes_peak"]


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["naïve – 漢字", "plain", "é"])
def test_streaming_never_shows_half_a_character(text: str) -> None:
    pieces: list[str] = []
    streamer = Streamer(Bytes(), pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for byte in text.encode():
        streamer.put(torch.tensor([byte]))
        assert text.startswith("".join(pieces))
    streamer.end()
    assert "".join(pieces) == text


class Words:
    """A tokenizer that numbers the request."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert text == "\n\nRepeat the previous context exactly." and not add_special_tokens
        return [7, 8, 9]


def test_kvzip_is_given_its_request_in_the_tokens_of_the_model() -> None:
    bare = kvsieve.recipe("kvzip", budget="50%", chunk=64)
    filled = with_request(bare, Words())
    assert filled.options == {"chunk": 64, "repeat_ids": (7, 8, 9)}
    assert filled.budget == bare.budget
    given = kvsieve.recipe("kvzip", budget="50%", repeat_ids=(1,))
    other = kvsieve.recipe("snapkv", budget="50%")
    assert with_request(given, Words()) is given and with_request(other, Words()) is other
