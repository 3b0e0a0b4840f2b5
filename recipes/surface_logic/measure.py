"""Measure the reference model's heads on probes, and what their scores are worth as budgets.

    python recipes/surface_logic/measure.py --out benchmarks/surface_logic.jsonl

Probes are lookups with known sources: what follows a key in its entry is copied into the answer
(surface), the keys themselves, and what stands between, must be read for it (logic). Budgets by
these scores are compared with even ones, with scores from the prompt, with one behaviour alone,
and with the same scores dealt to the heads at random: if that does as well, the scores say nothing.

The question ends the prompt, which is then compressed. An answer counts if every token of it, the
end mark included, is the model's first choice given what precedes. Seeds are those of no training
document; probes and tasks share none.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import kvsieve
from kvsieve.behaviours import Behaviours, Probe
from kvsieve.bench.intervals import wilson
from kvsieve.engines.transformers.heads import measure_heads
from kvsieve.reference import Sample, load, sample
from kvsieve.reference.origin import origin
from kvsieve.reference.vocabulary import IDS

_FIRST_PROBE, _FIRST_SEED = 950_000, 960_000
_WINDOW = {"window": 4, "kernel": 3}


def ids_of(text: str) -> list[int]:
    """Return the token ids of a text of known words."""
    return [IDS[word] for word in text.split()]


def probe_of(made: Sample) -> Probe:
    """Mark, entry by entry along the answer, what is copied and what is only read."""
    words, key = made.prompt.split(), made.answer.split()[0]
    surface: list[int] = []
    logic: list[int] = []
    while True:
        # An entry starts behind a full stop, a semicolon or the document's head, and ends with ;
        at = next(
            i for i, word in enumerate(words)
            if word == key and i + 3 < len(words) and words[i + 3] == ";"
            and words[i - 1] in (";", ".", "<ctx>")
        )  # fmt: skip
        logic.append(at)
        if words[at + 1] != "is":
            surface += [at + 1, at + 2]
            break
        logic.append(at + 1)
        surface.append(at + 2)
        key = words[at + 2]
    answer = [*ids_of(made.answer), IDS["<eos>"]]
    return Probe(prompt=ids_of(made.prompt), answer=answer, surface=surface, logic=logic)


def shuffled(found: Behaviours, seed: int) -> Behaviours:
    """Deal the same pairs of scores to the heads at random."""
    pairs = [
        pair for s, x in zip(found.surface, found.logic, strict=True)
        for pair in zip(s, x, strict=True)
    ]  # fmt: skip
    random.Random(seed).shuffle(pairs)
    H = len(found.surface[0])
    rows = [pairs[i : i + H] for i in range(0, len(pairs), H)]
    tables = [tuple(tuple(pair[n] for pair in row) for row in rows) for n in (0, 1)]
    return Behaviours(surface=tables[0], logic=tables[1])


@torch.no_grad()
def is_right(model: Any, recipe: kvsieve.Recipe, made: Sample) -> bool:
    """Return whether the model's first choices are the answer and the end mark."""
    prompt, answer = ids_of(made.prompt), [*ids_of(made.answer), IDS["<eos>"]]
    with kvsieve.Cache(model, recipe) as cache:
        feed = prompt
        for token in answer:
            logits = model(torch.tensor([feed]), past_key_values=cache, logits_to_keep=1).logits
            if int(logits[0, -1].argmax()) != token:
                return False
            feed = [token]
    return True


def recipes(found: Behaviours, folder: Path, budget: float) -> dict[str, kvsieve.Recipe]:
    """Return what is compared, by name."""
    found.save(folder / "measured.json")
    made: dict[str, kvsieve.Recipe] = {
        name: kvsieve.recipe(name, budget=budget, pooling="max", **_WINDOW)
        for name in ("snapkv", "adakv")
    }
    measured = {"heads": str(folder / "measured.json")}
    options: dict[str, dict[str, Any]] = {
        "from the prompt": {},
        "measured": measured,
        "measured, surface alone": measured | {"surface": 1.0},
        "measured, logic alone": measured | {"surface": 0.0},
    }
    for seed in range(2):
        shuffled(found, seed).save(folder / f"shuffled{seed}.json")
        options[f"shuffled {seed}"] = {"heads": str(folder / f"shuffled{seed}.json")}
    for name, more in options.items():
        made[name] = kvsieve.recipe("surface-logic-kv", budget=budget, **_WINDOW, **more)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, write rows, show a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, appended to")
    parser.add_argument("--probes", type=int, default=50, help="for each of the two kinds")
    parser.add_argument("--documents", type=int, default=30, help="for each kind and budget")
    parser.add_argument("--kinds", nargs="+", default=["retrieval", "multi-hop"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.1, 0.05])
    parser.add_argument("--length", type=int, default=256, help="tokens of a document")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, _ = load()
    console, made_by = Console(stderr=True), origin()
    seeds = range(_FIRST_PROBE, _FIRST_PROBE + options.probes)
    probes = [
        probe_of(sample(kind, seed=seed, length=options.length))
        for kind in ("retrieval", "multi-hop") for seed in seeds
    ]  # fmt: skip
    found = measure_heads(model, list(track(probes, "probes", console=console)))
    shared = {"kind": "surface_logic", "dtype": "float32", "device": "cpu"} | made_by
    table = Table("budgets", "kind", "kept", "right", title=f"Right of {options.documents}")
    with options.out.open("a") as file, tempfile.TemporaryDirectory() as folder:
        scores = {"surface": found.surface, "logic": found.logic, "probes": len(probes)}
        file.write(json.dumps(shared | {"name": "heads"} | scores) + "\n")
        for kind in options.kinds:
            first, n = _FIRST_SEED, options.documents
            made = [sample(kind, seed=first + i, length=options.length) for i in range(n)]
            for budget in options.budgets:
                for name, recipe in recipes(found, Path(folder), budget).items():
                    outcomes = [is_right(model, recipe, task) for task in made]
                    right = sum(outcomes)
                    row = {
                        "name": name, "family": kind, "budget": budget, "n": n, "right": right,
                        "exact": right / n, "interval": wilson(right, n), "seed": first,
                        "length": options.length, "outcomes": "".join("01"[x] for x in outcomes),
                    }  # fmt: skip
                    file.write(json.dumps(shared | row) + "\n")
                    file.flush()
                    table.add_row(name, kind, f"{budget:.0%}", str(right))
    Console().print(table)


if __name__ == "__main__":
    main()
