"""Measure the shipped model with the full cache: exact match by family and length, fresh seeds.

    python recipes/reference_model/evaluate.py --out benchmarks/reference_accuracy.jsonl

A row is one (family, length): documents of exactly that many tokens, prompt and answers together.
An answer counts if every token of it, the end mark included, is the model's first choice given
what precedes (which is what greedy decoding gives, up to its first error).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

import kvsieve
from kvsieve.reference import KINDS, load, tasks_lookup
from kvsieve.reference.vocabulary import IDS

LENGTHS = (128, 256, 512, 1024, 2048)
_FIRST_SEED = 900_000
"""Training draws from other seeds: these documents were never seen."""


def secret_row(rng: random.Random, length: int) -> data.Row:
    """A document with all instructions, asked for its secret alone."""
    order = list(tasks_lookup.INSTRUCTIONS)
    rng.shuffle(order)
    tokens = length - 16
    entries = max(4, min(tasks_lookup.MAX_ENTRIES, tokens // 10))
    made = tasks_lookup.lookup(rng, tokens, entries, instructions=order)
    secret = made.instructions["secret"]
    asked, answer = tasks_lookup.question(secret), [*made.answer(secret), "<eos>"]
    known = [*made.document, *asked]
    return [*known, *answer], [False] * len(known) + [True] * len(answer)


def row(kind: str, rng: random.Random, length: int) -> data.Row:
    """Make a document of a family."""
    return secret_row(rng, length) if kind == "secret" else data.make_row(rng, kind, length)


def answers(row_: data.Row) -> list[tuple[int, int]]:
    """Return the spans (start, end) of the answers in a row."""
    answered = [False, *row_[1], False]
    starts = [i for i in range(len(row_[1])) if answered[i + 1] and not answered[i]]
    ends = [i + 1 for i in range(len(row_[1])) if answered[i + 1] and not answered[i + 2]]
    return list(zip(starts, ends, strict=True))


@torch.no_grad()
def exact(model: Any, kind: str, length: int, least: int, most_documents: int) -> tuple[int, int]:
    """Return (right, asked) over documents until ``least`` answers were asked for."""
    right = asked = documents = 0
    while asked < least and documents < most_documents:
        rng = random.Random(f"evaluate {_FIRST_SEED + documents} {kind} {length}")
        made = row(kind, rng, length)
        ids = torch.tensor([[IDS[word] for word in made[0]]])
        choice = model(ids, use_cache=False).logits[0, :-1].argmax(-1)
        hit = choice == ids[0, 1:]
        spans = answers(made)
        right += sum(bool(hit[start - 1 : end - 1].all()) for start, end in spans)
        asked += len(spans)
        documents += 1
    return right, asked


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share."""
    share, spread = right / asked, z * z / asked
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / asked + spread / (4 * asked)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write rows, show a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, appended to")
    parser.add_argument("--answers", type=int, default=200, help="at least so many a cell")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, _ = load()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvsieve": kvsieve.__version__,
    }
    table = Table("family", *map(str, LENGTHS), title="Exact match, full cache")
    console, commit = Console(), _commit()
    for kind in track(KINDS, "families", console=Console(stderr=True)):
        shown = []
        for length in LENGTHS:
            right, asked = exact(model, kind, length, options.answers, options.answers)
            result = {
                "kind": "reference_accuracy", "family": kind, "length": length, "n": asked,
                "right": right, "exact": right / asked, "interval": wilson(right, asked),
                "seed": _FIRST_SEED, "dtype": "float32", "device": "cpu", "versions": versions,
                "commit": commit,
            }  # fmt: skip
            with options.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            shown.append(f"{right}/{asked} {right / asked:.1%}")
        table.add_row(kind, *shown)
    console.print(table)


if __name__ == "__main__":
    main()
