"""The training recipe: it runs, learns, and goes on after an interruption as if there were none."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from kvsieve.reference.vocabulary import IDS, WORDS

RECIPE = Path(__file__).parents[2] / "recipes" / "reference_model"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(RECIPE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPE))
    import data

    return data


@pytest.mark.parametrize("course", ["whole", "first-answers"])
def test_a_batch_depends_on_seed_and_step_alone(data: ModuleType, course: str) -> None:
    def made(seed: int, step: int) -> list[torch.Tensor]:
        return list(data.batch(data.COURSES[course], seed, step, 0.9, 4096))

    first, again, later = made(1, 7), made(1, 7), made(1, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == first[1].shape and first[0].numel() >= 4096 * 0.9
    assert first[0].shape != later[0].shape or not torch.equal(first[0], later[0])


@pytest.mark.parametrize("task", ["retrieval", "multi-hop", "instructions"])
def test_the_loss_is_on_the_answers_alone(data: ModuleType, task: str) -> None:
    words, weights = data.make_row(random.Random(3), data.COURSES["first-answers"], task, 512)
    inside, seen = False, 0
    for word, weight in zip(words, weights, strict=True):
        assert weight == (0.0 if not inside else 8.0 if seen == 1 else 1.0)
        inside = (inside or word == "<a>") and word != "<eos>"
        seen += word == "<a>"
    assert seen >= 1 and words[-1] == "<eos>"


def test_short_rows_are_filled_with_padding_that_costs_nothing(data: ModuleType) -> None:
    ids, weights = data.batch(data.COURSES["whole"], 1, 0, 0.0, 4096)
    assert ids.shape == (32, 128) and (ids == IDS["<pad>"]).any()
    assert not weights[ids == IDS["<pad>"]].any()
    assert {WORDS[i] for i in ids[:, 0].tolist()} == {"<bos>"}


@pytest.mark.slow
def test_the_evaluation_writes_a_row_for_every_cell(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    lengths = ("--lengths", 128, 2048, "--kinds", "secret", "walk")
    shown = run("evaluate.py", "--out", out, "--documents", 2, *lengths)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    cells = [(row["family"], row["length"], row["n"]) for row in rows]
    assert cells == [("secret", 128, 2), ("secret", 2048, 2), ("walk", 128, 2)]
    assert "secret" in shown and all(0 <= row["right"] <= row["n"] for row in rows)


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    run("train.py", "--smoke", "--out", tmp_path / "whole")
    run("train.py", "--smoke", "--out", tmp_path / "parts", "--stop-at", 5)
    assert "resume at step 5" in run("train.py", "--smoke", "--out", tmp_path / "parts")
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "parts")
    )
    assert whole["step"] == parts["step"] == 12
    for name, weight in whole["model"].items():
        assert torch.equal(weight, parts["model"][name]), name


@pytest.mark.slow
def test_refining_starts_from_the_weights_of_the_run(tmp_path: Path) -> None:
    run("train.py", "--smoke", "--out", tmp_path / "run", "--stop-at", 6)
    run(
        "train.py",
        "--smoke",
        "--refine",
        tmp_path / "run",
        "--out",
        tmp_path / "more",
        "--stop-at",
        0,
    )
    before, after = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("run", "more")
    )
    assert after["settings"]["course"] == "first-answers" and after["step"] == 0
    for name, weight in before["model"].items():
        assert torch.equal(weight, after["model"][name]), name


@pytest.mark.slow
def test_other_settings_do_not_resume(tmp_path: Path) -> None:
    run("train.py", "--smoke", "--out", tmp_path, "--stop-at", 2)
    command = [sys.executable, str(RECIPE / "train.py"), "--smoke", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--seed", "9"], capture_output=True, text=True)
    assert done.returncode != 0 and "give the same options" in done.stderr


@pytest.mark.slow
def test_the_loss_falls_and_the_export_loads(tmp_path: Path) -> None:
    shown = run("train.py", "--smoke", "--steps", 100, "--out", tmp_path / "run")
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", shown)]
    assert losses[-1] < losses[0] - 1
    run("export.py", "--run", tmp_path / "run", "--to", tmp_path / "model")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.num_hidden_layers == 1 and model.dtype is torch.bfloat16


@pytest.mark.slow
def test_several_runs_are_exported_as_their_mean(tmp_path: Path) -> None:
    for seed in (1, 2):
        run("train.py", "--smoke", "--seed", seed, "--out", tmp_path / str(seed), "--stop-at", 0)
    run("export.py", "--run", tmp_path / "1", tmp_path / "2", "--to", tmp_path / "model")
    one, two = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("1", "2")
    )
    written = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(written[name], ((one[name] + two[name]) / 2).bfloat16())
    assert not torch.equal(written[name], one[name].bfloat16())
