"""Train the reference model: `python recipes/reference_model/train.py --out DIR`.

The same command resumes an interrupted run from its last checkpoint and ends with the same weights
(on the same machine and thread count). `--refine DIR` starts from the weights of a finished run and
trains them on first answers. `--form` and `--seed` make a second model, to see whether a
finding holds. `--smoke` trains a tiny model for a few steps.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import data
import torch
from model import FORMS, LanguageModel
from optimizer import Optimizer
from rich.console import Console
from torch.nn import functional as F

CHECKPOINT = "checkpoint.pt"
_SMOKE = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}


@dataclass(frozen=True)
class Settings:
    """All that decides about the weights at the end; a resumed run must have the same."""

    steps: int = 3000
    seed: int = 1
    tokens: int = 4096
    warm_up: int = 60
    decay: float = 0.5
    smoke: bool = False
    course: str = "whole"
    peak: float = 1.0
    form: str = "qwen3"

    def rate(self, step: int) -> float:
        """Factor on the learning rates: warm-up to `peak`, constant, then linear decay to 2 %."""
        left = (self.steps - step) / (self.steps * self.decay)
        return self.peak * min(1.0, (step + 1) / self.warm_up, max(0.02, left))


class Run:
    """The state of a training run, and its checkpoint."""

    def __init__(self, settings: Settings, out: Path, device: str) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.path, self.device = settings, out / CHECKPOINT, device
        shape = FORMS[settings.form]
        if settings.smoke:
            shape = replace(shape, **_SMOKE)
        self.model = LanguageModel(shape).to(device)
        self.optimizer = Optimizer(self.model)
        compiled = torch.compile(self.model.model, dynamic=False)
        self.trunk = self.model.model if settings.smoke else compiled
        self.step, self.seconds = 0, 0.0

    def start_from(self, folder: Path) -> None:
        """Take over the weights (not the optimizer's state) of another run's checkpoint."""
        state = torch.load(folder / CHECKPOINT, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])

    def resume(self) -> bool:
        """Load the checkpoint, if there is one; raise ValueError where it is of other settings."""
        if not self.path.exists():
            return False
        state: dict[str, Any] = torch.load(self.path, map_location=self.device, weights_only=True)
        before = Settings(**state["settings"])
        if before != self.settings:
            raise ValueError(
                f"{self.path} was trained with {before}, asked for is {self.settings}: "
                "give the same options, or another --out"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        return True

    def save(self) -> None:
        """Write the checkpoint; a crash leaves the old one or the new one, never half a file."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "settings": asdict(self.settings),
            "shape": asdict(self.model.shape),
            "step": self.step,
            "seconds": self.seconds,
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.path)

    def train_step(self) -> tuple[float, float, int]:
        """One step; return its loss, the share of answer tokens that were right, its tokens."""
        begin, settings = time.perf_counter(), self.settings
        share = self.step / settings.steps
        ids, weights = data.batch(
            data.COURSES[settings.course], settings.seed, self.step, share, settings.tokens
        )
        ids, weights = ids.to(self.device), weights[:, 1:].to(self.device)
        answered = weights > 0
        with torch.autocast(self.device.split(":")[0], torch.bfloat16):
            hidden = self.trunk(ids)[:, :-1]
            logits = self.model.logits(hidden[answered])
        target, weights = ids[:, 1:][answered], weights[answered]
        losses = F.cross_entropy(logits.float(), target, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        self.optimizer.step(settings.rate(self.step))
        right = (logits.argmax(-1) == target).float().mean().item()
        self.step += 1
        self.seconds += time.perf_counter() - begin
        return loss.item(), right, ids.numel()


def train(run: Run, save_seconds: float, console: Console, stop_at: int | None = None) -> None:
    """Train to the end, or to step `stop_at`; save on the way and at the end."""
    settings, saved = run.settings, time.monotonic()
    shown: list[tuple[float, float, int]] = []
    since = run.seconds
    last = settings.steps if stop_at is None else min(stop_at, settings.steps)
    while run.step < last:
        shown.append(run.train_step())
        if len(shown) == 25 or run.step == last:
            _show(console, run, shown, run.seconds - since)
            shown, since = [], run.seconds
        if time.monotonic() - saved > save_seconds:
            run.save()
            saved = time.monotonic()
    run.save()


def _show(
    console: Console, run: Run, shown: Sequence[tuple[float, float, int]], seconds: float
) -> None:
    losses, rights, tokens = zip(*shown, strict=True)
    speed = sum(tokens) / seconds
    left = (run.settings.steps - run.step) * run.settings.tokens / speed / 60
    console.print(
        f"step [bold]{run.step}[/]/{run.settings.steps}  loss {sum(losses) / len(losses):.4f}  "
        f"tokens right {sum(rights) / len(rights):.4f}  {speed:,.0f} tokens/s  "
        f"{run.seconds / 60:.1f} min, {left:.0f} min left",
        soft_wrap=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--steps", type=int, help="default 3000; 600 with --refine, 12 with --smoke"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--form", default="qwen3", choices=FORMS)
    parser.add_argument("--course", choices=data.COURSES, help="default whole; see data.py")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--save-seconds", type=float, default=120, help="between checkpoints")
    parser.add_argument("--stop-at", type=int, help="save and end at this step, to go on later")
    parser.add_argument(
        "--refine", type=Path, help="folder of a finished run: train its weights on first answers"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny model, a few steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(_settings(options), options.out, options.device)
    console = Console()
    if run.resume():
        console.print(f"resume at step {run.step}")
    elif options.refine is not None:
        run.start_from(options.refine)
    train(run, options.save_seconds, console, options.stop_at)


def _settings(options: argparse.Namespace) -> Settings:
    chosen = Settings(seed=options.seed, form=options.form)
    if options.smoke:
        chosen = replace(chosen, steps=12, tokens=512, warm_up=4, smoke=True)
    if options.refine is not None:
        steps = chosen.steps if options.smoke else 600
        chosen = replace(chosen, steps=steps, course="first-answers", peak=0.4, decay=0.9)
    if options.course is not None:
        chosen = replace(chosen, course=options.course)
    return chosen if options.steps is None else replace(chosen, steps=options.steps)


if __name__ == "__main__":
    main()
