"""`kvsieve bench fidelity`: how far each method moves what a model says, without a task."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from kvsieve.cli import cells
from kvsieve.cli import options as o
from kvsieve.cli import sweeps as s
from kvsieve.cli.guard import BadInput
from kvsieve.cli.output import console, table


def fidelity(
    methods: s.Methods = "all",
    budgets: s.Budgets = "10%,25%,50%",
    model: o.Model = None,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    text: Annotated[
        Path | None,
        typer.Option(
            help="A UTF-8 text file to cut prefixes and continuations out of; needed with --model.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            help="Without --text: kinds of `kvsieve sample`, commas between; otherwise "
            "retrieval,reasoning.",
            show_default=False,
        ),
    ] = None,
    prefix: Annotated[int, typer.Option(help="Tokens that are read, then compressed.")] = 512,
    continuation: Annotated[int, typer.Option(help="Tokens that follow, one by one.")] = 128,
    n: Annotated[int, typer.Option(help="Texts in a cell.")] = 8,
    seed: Annotated[
        int | None,
        typer.Option(help="First seed of the samples; otherwise 0.", show_default=False),
    ] = None,
    threads: s.Threads = None,
    out: s.Out = None,
    json: s.Json = False,
) -> None:
    """Compare next-token distributions and layer outputs with the stock cache's.

    Every text is read and compressed, then followed token by token whatever the model would say.
    Rows go to OUT/fidelity.jsonl. Exit code 1 if a cell failed; its row says why.
    """
    s.set_threads(threads)
    from kvsieve.bench.fidelity import sweep as f
    from kvsieve.bench.quality.plan import every
    from kvsieve.bench.quality.rows import read

    for count, option in ((prefix, "--prefix"), (continuation, "--continuation"), (n, "--n")):
        if count < 1:
            raise BadInput(f"{option} {count}: it must be 1 or more.")
    if model is not None and text is None:
        raise BadInput(
            "The samples are in the reference model's words: with --model give a --text."
        )
    if text is not None and (samples is not None or seed is not None):
        raise BadInput("--samples and --seed shape samples: leave them out with --text.")
    asked = every(s.named_methods(methods), s.items(budgets, "--budgets"))
    path = s.rows_file(out, f.FILE)
    known = read(path, f.KIND, f.VERSION) if path else []
    kinds = s.items(samples or "retrieval,reasoning", "--samples")
    sizes = {"n": n, "prefix": prefix, "length": continuation}
    sweep, weights = _open(model, dtype, device, text, kinds, asked, seed or 0, sizes)

    def measure(done: Any, note: Any) -> Any:
        return f.measure(sweep, weights, done, note)

    found = cells.gather(path, known, sweep.identities(), f.key, measure, n, json)
    cells.finish(found, json, _show)


def _open(
    name: str | None,
    dtype: str,
    device: str,
    text: Path | None,
    kinds: list[str],
    asked: Any,
    seed: int,
    sizes: dict[str, int],
) -> tuple[Any, Any]:
    """Load model and texts; return the sweep and the model."""
    from kvsieve.bench.asked import adapted
    from kvsieve.bench.fidelity import sweep as f
    from kvsieve.bench.fidelity import texts as t
    from kvsieve.cli.models import Choice
    from kvsieve.cli.settings import with_request

    opened = Choice.read(name, dtype, device).open()
    prefix, continuation = sizes["prefix"], sizes["length"]
    if opened.context is not None and prefix + continuation > opened.context:
        raise BadInput(
            f"--prefix {prefix} and --continuation {continuation} don't fit: {opened.name} takes "
            f"{opened.context} tokens in all."
        )
    if text is not None:
        sources = [t.windows(_read(text), text.name, opened.tokenizer, **sizes)]
    else:
        sources = [t.sampled(kind, opened.tokenizer, seed=seed, **sizes) for kind in kinds]
    if not opened.reference:
        asked = adapted(asked, lambda recipe: with_request(recipe, opened.tokenizer))
    model = opened.weights()
    made = f.Sweep(
        subject=_subject(opened, name, model),
        sources=sources,
        asked=asked,
        prefix=prefix,
        continuation=continuation,
        seed=seed if text is None else None,
    )
    return made, model


def _subject(opened: Any, name: str | None, model: Any) -> Any:
    from kvsieve.bench.ledger import Subject
    from kvsieve.reference.loader import folder

    if name is None:
        return Subject.of("reference", model, folder())
    return Subject.of(opened.name, model, Path(name) if Path(name).is_dir() else None)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{str(path)!r} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise BadInput(f"Can't read {str(path)!r}: {error.strerror}.") from error


_NUMBERS = ("KL, nats", "same token", "loss +", "layer error", "KL first", "KL last", "bytes")


def _show(found: list[Any]) -> None:
    def source(row: Any) -> str:
        return row.get("sample") or row["text"]

    for name, group in groupby(found, source):
        rows = list(group)
        first = rows[0]
        made = table("method", "budget", *_NUMBERS, right=_NUMBERS, whole=("method",))
        for row in rows:
            made.add_row(row["method"], row["budget"] or "–", *_cells(row))
        out = console()
        out.print(
            f"\n{name}: {first['n']} texts, {first['prefix']} tokens read, then "
            f"{first['continuation']} followed"
        )
        out.print(made)


def _cells(row: Any) -> list[str]:
    if row["error"] is not None:
        return [cells.verdict(row), *[""] * (len(_NUMBERS) - 1)]
    loss = None if row["loss"] is None else row["loss"] - row["loss_full"]
    cache, bins = row["cache"], row["bins"]
    return [
        _figure(row["kl"], ".4f"),
        _figure(row["agreement"], ".3f"),
        "–" if loss is None else f"{loss:+.4f}",
        f"{row['layer_error'][-1]:.3f}",
        *("–" if part["kl"] is None else f"{part['kl']:.4f}" for part in (bins[0], bins[-1])),
        f"{cache['bytes_kept'] / cache['bytes_full']:.1%}",
    ]


def _figure(figure: Any, form: str) -> str:
    mean = f"{figure['mean']:{form}}"
    if figure["low"] is None:
        return mean
    return f"{mean} ({figure['low']:{form}}-{figure['high']:{form}})"
