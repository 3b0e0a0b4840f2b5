"""Measure the shipped model with the full cache: exact match by family and length, fresh seeds.

    python recipes/reference_model/evaluate.py --out benchmarks/reference_accuracy.jsonl

The tasks are those of `kvsieve.reference.sample`, one question a document, with seeds that training
never draws. The length of a lookup task is that of its document; that of a chain is prompt and
answer together. An answer counts if every token of it, the end mark included, is the model's first
choice given what precedes: exactly then greedy decoding gives it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvsieve.bench.intervals import wilson
from kvsieve.reference import KINDS, Sample, load
from kvsieve.reference.origin import origin
from kvsieve.reference.sized import sized
from kvsieve.reference.vocabulary import IDS

LENGTHS = (128, 256, 512, 1024, 2048)
_FIRST_SEED = 900_000
_LONGEST_WALK = 1024
"""A walk needs a key a step, so with 128 keys it can't be much longer."""


@torch.no_grad()
def is_right(model: Any, made: Sample) -> bool:
    """Return whether the model's first choices are the answer and the end mark."""
    answer = [IDS[word] for word in [*made.answer.split(), "<eos>"]]
    ids = torch.tensor([[IDS[word] for word in made.prompt.split()] + answer])
    logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits
    return logits[0, :-1].argmax(-1).tolist() == answer


def measure(model: Any, kind: str, length: int, documents: int) -> dict[str, Any]:
    """Return the row of one cell."""
    seeds = range(_FIRST_SEED, _FIRST_SEED + documents)
    right = sum(is_right(model, sized(kind, seed=seed, length=length)) for seed in seeds)
    return {
        "kind": "reference_accuracy", "family": kind, "length": length, "n": documents,
        "right": right, "exact": right / documents, "interval": wilson(right, documents),
        "seed": _FIRST_SEED, "dtype": "float32", "device": "cpu",
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write rows, show a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, appended to")
    parser.add_argument("--documents", type=int, default=200, help="for each family and length")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, _ = load()
    table = Table("family", *map(str, options.lengths), title="Exact match (%), full cache")
    made_by = origin()
    for kind in track(options.kinds, "families", console=Console(stderr=True)):
        shown = []
        for length in options.lengths:
            if kind == "walk" and length > _LONGEST_WALK:
                continue
            row = measure(model, kind, length, options.documents) | made_by
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            shown.append(f"{100 * row['exact']:.1f}")
        table.add_row(kind, *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
