"""`kvsieve compare`: one table, one JSON object, failures in their rows."""

from __future__ import annotations

from pathlib import Path

from kvsieve import reference

from .support import call, call_json

SAMPLE = ("--sample", "retrieval", "--seed", "1", "--length", "128")
TASK = reference.sample("retrieval", seed=1, length=128)


def test_each_method_is_marked_against_the_known_answer() -> None:
    compared = call_json("compare", *SAMPLE, "--methods", "knorm", "--budget", "4")
    assert compared["version"] == 1
    assert compared["sample"] == {"kind": "retrieval", "seed": 1, "answer": TASK.answer}
    full, knorm = compared["runs"]
    assert (full["method"], full["text"], full["right"]) == ("full", TASK.answer, True)
    assert (knorm["method"], knorm["budget"], knorm["right"]) == ("knorm", "4 slots", False)
    assert knorm["text"] != TASK.answer


def test_its_runs_are_the_objects_of_run(story: Path) -> None:
    compared = call_json("compare", "--prompt-file", str(story), "--methods", "full")
    ran = call_json("run", "--prompt-file", str(story), "--method", "full")
    (only,) = compared["runs"]
    assert list(only) == [*ran, "right"]
    assert only["right"] is None and compared["sample"] is None
    assert (only["text"], only["cache"]) == (ran["text"], ran["cache"])


def test_a_failing_method_keeps_its_row() -> None:
    base = ("compare", *SAMPLE, "--methods", "snapkv,streaming-llm", "--budget", "20")
    full, snapkv, streaming = call_json(*base, code=1)["runs"]
    assert list(snapkv) == ["version", "method", "error"] and "no room" in snapkv["error"]
    assert full["right"] and streaming["cache"]["slots"] == [[20] * 4] * 4
    called = call(*base)
    assert called.code == 1 and called.err == ""
    assert "Error: A budget of 20 slots" in called.out


def test_a_budget_too_small_for_the_prompt_fails_in_its_row() -> None:
    base = ("compare", *SAMPLE, "--methods", "g-kv,random", "--budget", "5%")
    _, g_kv, random = call_json(*base, code=1)["runs"]
    assert "no room" in g_kv["error"] and "text" in random


def test_the_table_has_a_row_and_a_mark_per_method() -> None:
    called = call("compare", *SAMPLE, "--methods", "full,knorm", "--budget", "4")
    assert called.code == 0
    head = next(line for line in called.out.splitlines() if line.startswith("method"))
    columns = "method right kept full % peak slots tok/s s answer"
    assert head.split() == columns.split()
    rows = {line.split()[0]: line for line in called.out.splitlines() if line.strip()}
    assert "right" in rows["full"] and TASK.answer in rows["full"] and "wrong" in rows["knorm"]


def test_options_go_where_they_belong() -> None:
    base = ("compare", *SAMPLE, "--methods", "snapkv,streaming-llm,g-kv", "--budget", "40")
    runs = call_json(*base, "--set", "window=8", "--set", "g-kv.window=60", code=1)["runs"]
    failed = {run["method"] for run in runs if "error" in run}
    assert failed == {"g-kv"}  # its 60 protected tokens don't fit; the other windows are 8
    nobody = call(*base, "--set", "windw=8")
    assert nobody.code == 2 and "Did you mean 'window'" in nobody.err
    stranger = call(*base, "--set", "tova.window=8")
    assert stranger.code == 2 and "no such method here" in stranger.err


def test_unusable_input_stops_everything() -> None:
    for given, message in {
        ("--methods", "random,nope", "--budget", "9"): "Unknown method 'nope'",
        ("--methods", "random,dbudgetkv"): "'random' needs a --budget",
        ("--methods", "random", "--budget", "0"): "keeps nothing",
        ("--methods", " , "): "--methods is empty",
        ("--methods", "random", "--budget", "9", "--set", "random.sead=1"): "no option 'sead'",
    }.items():
        called = call("compare", *SAMPLE, *given)
        assert (called.code, called.out) == (2, "") and message in called.err
