"""Measure KeyDiff and distinct keys on the reference model, question asked after compression.

    python recipes/distinct_keys/measure.py --out benchmarks/distinct_keys.jsonl

The document is read and compressed; only then come the question and the answer, one token at a
time, so that they are decode steps and stay. An answer counts if every token of it, the end mark
included, is the model's first choice given what precedes: exactly then greedy decoding gives it.
The seeds are those of no training document, and the same for all methods.
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

import kvsieve
from kvsieve.bench.intervals import wilson
from kvsieve.reference import Sample, load, sample
from kvsieve.reference.origin import origin
from kvsieve.reference.vocabulary import IDS

_FIRST_SEED = 910_000

METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "random": {"method": "random"},
    "keydiff": {"method": "keydiff"},
    "keydiff, recent 16": {"method": "keydiff", "recent": 16},
    "distinct-keys": {"method": "distinct-keys"},
    "distinct-keys, recent 0": {"method": "distinct-keys", "recent": 0},
    "distinct-keys, kernel 3, recent 0": {"method": "distinct-keys", "kernel": 3, "recent": 0},
    "distinct-keys, adaptive": {"method": "distinct-keys", "adaptive": True},
    "distinct-keys, adaptive, recent 0": {
        "method": "distinct-keys", "adaptive": True, "recent": 0,
    },
    "distinct-keys, adaptive, kernel 3": {
        "method": "distinct-keys", "adaptive": True, "kernel": 3,
    },
    "distinct-keys, adaptive, kernel 3, recent 0": {
        "method": "distinct-keys", "adaptive": True, "kernel": 3, "recent": 0,
    },
    "adakv of distinct-keys, recent 0": {
        "method": "adakv", "scorer": "distinct-keys", "recent": 0,
    },
}  # fmt: skip


def ids_of(text: str) -> list[int]:
    """Return the token ids of a text of known words."""
    return [IDS[word] for word in text.split()]


@torch.no_grad()
def is_right(model: Any, recipe: kvsieve.Recipe, made: Sample) -> bool:
    """Return whether the model's first choices are the answer and the end mark."""
    assert made.document is not None and made.question is not None, "a lookup task"
    question, answer = ids_of(made.question), [*ids_of(made.answer), IDS["<eos>"]]
    with kvsieve.Cache(model, recipe) as cache:
        model(torch.tensor([ids_of(made.document)]), past_key_values=cache, logits_to_keep=1)
        tokens = [*question, *answer]
        for at, token in enumerate(tokens[:-1]):
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits
            expected = tokens[at + 1] if at + 1 >= len(question) else None
            if expected is not None and int(logits[0, -1].argmax()) != expected:
                return False
    return True


def measure(model: Any, name: str, budget: float, made: Sequence[Sample]) -> dict[str, Any]:
    """Return the row of one method, budget and set of tasks."""
    options = dict(METHODS[name])
    if options["method"] != "full":
        options["budget"] = budget
    recipe = kvsieve.recipe(options.pop("method"), **options)
    outcomes = [is_right(model, recipe, task) for task in made]
    right = sum(outcomes)
    return {
        "kind": "distinct_keys", "name": name, "recipe": recipe.to_dict(), "budget": budget,
        "family": made[0].kind, "n": len(made), "right": right, "exact": right / len(made),
        "interval": wilson(right, len(made)), "seed": made[0].seed,
        "outcomes": "".join("01"[x] for x in outcomes),  # by seed: methods can be paired
        "dtype": "float32", "device": "cpu",
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write rows, show a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, appended to")
    parser.add_argument("--documents", type=int, default=30, help="for each kind and budget")
    parser.add_argument("--kinds", nargs="+", default=["retrieval", "secret"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.25, 0.1])
    parser.add_argument("--length", type=int, default=256, help="tokens of a document")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, _ = load()
    cells = [(kind, budget) for kind in options.kinds for budget in options.budgets]
    title = f"Right of {options.documents}, documents of {options.length} tokens"
    table = Table("method", *(f"{kind} {budget:.0%}" for kind, budget in cells), title=title)
    seeds, made_by = range(_FIRST_SEED, _FIRST_SEED + options.documents), origin()
    for name in track(options.methods, "methods", console=Console(stderr=True)):
        shown = []
        for kind, budget in cells:
            made = [sample(kind, seed=seed, length=options.length) for seed in seeds]
            row = measure(model, name, budget, made) | {"length": options.length} | made_by
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            shown.append(str(row["right"]))
        table.add_row(name, *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
