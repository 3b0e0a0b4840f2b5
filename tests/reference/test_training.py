"""The training recipe: it runs, learns, and goes on after an interruption as if there were none."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "reference_model"


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(RECIPE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
