"""`kvsieve bench`: measurements on this machine."""

from __future__ import annotations

import json as jsonlib
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import typer

from kvsieve.cli import bench_options as g
from kvsieve.cli.bench_audit import audit
from kvsieve.cli.bench_fidelity import fidelity
from kvsieve.cli.bench_kept import kept
from kvsieve.cli.bench_quality import quality
from kvsieve.cli.bench_serve import serve
from kvsieve.cli.bench_served import served
from kvsieve.cli.bench_tasks import tasks
from kvsieve.cli.guard import BadInput
from kvsieve.cli.output import console
from kvsieve.cli.sweeps import items

bench = typer.Typer(help="Measure methods on this machine.")


@bench.callback()
def root() -> None:
    """Measure methods on this machine."""


bench.command()(quality)
bench.command()(audit)
bench.command()(kept)
bench.command()(fidelity)
bench.command()(tasks)


@bench.command()
def speed(
    contexts: g.Contexts = "2048,8192,32768",
    batches: g.Batches = "1,4",
    dtypes: g.DTypes = "float32,bfloat16",
    methods: g.Methods = None,
    budget: g.Budget = "10%",
    max_tokens: g.MaxTokens = 32768,
    threads: g.Threads = None,
    device: g.Device = "cpu",
    steps: g.Steps = 32,
    quick: g.Quick = False,
    peer_python: g.PeerPython = None,
    out: g.Out = None,
    table: g.Table = None,
    json: g.Json = False,
) -> None:
    """Measure prefill, decoding, compression and bytes, in turns with stock caches.

    The model is a Qwen3 with random weights. Ratios are taken within a cell, whose caches decode
    in turns, so that they hold on a busy machine, too.
    """
    if table is not None:
        _print(_read(table), json)
        return
    from kvsieve.bench.plan import Settings

    settings = Settings(
        contexts=_numbers(contexts, "--contexts"),
        batches=_numbers(batches, "--batches"),
        dtypes=tuple(items(dtypes)),
        methods=None if methods is None else tuple(items(methods)),
        budget=budget,
        device=_device(device),
        threads=_threads(threads),
        steps=steps,
        max_tokens=max_tokens,
        peer=peer_python is not None,
    )
    _measure(settings.quick() if quick else settings, peer_python, out, json)


bench.command()(serve)
bench.command()(served)


def _measure(settings: Any, peer_python: str | None, out: Path | None, json: bool) -> None:
    from kvsieve.bench import rows
    from kvsieve.bench.remote import Peer
    from kvsieve.bench.speed import measure
    from kvsieve.cli.grid import Grid

    if peer_python is None:
        typer.echo("kvpress is left out: no --peer-python.", err=True)
    opened = nullcontext(None)
    if peer_python is not None:
        opened = closing(Peer(peer_python, settings.threads))
    known = {rows.key(row): row for row in (rows.read(out) if out else [])}
    with opened as peer, Grid(settings) as grid:
        wanted = grid.keys(peer)
        for row in measure(settings, known.keys(), peer, grid.cell):
            if out:
                rows.append(out, row)
            if json:
                typer.echo(jsonlib.dumps(row))
            known[rows.key(row)] = row
    if not json:
        _print([known[key] for key in wanted], json)


def _read(path: Path) -> list[Any]:
    from kvsieve.bench import rows

    found = rows.read(path)
    if not found:
        raise BadInput(f"{str(path)!r} has no rows of `kvsieve bench speed`.")
    return found


def _print(rows: list[Any], json: bool) -> None:
    from kvsieve.bench.table import render

    if json:
        for row in rows:
            typer.echo(jsonlib.dumps(row))
    else:
        console().print(render(rows))


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in items(text))
    except ValueError as error:
        raise BadInput(f"{option} {text!r}: give whole numbers, commas between.") from error


def _device(name: str) -> str:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"--device {name!r} is no device. Use cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: there is no CUDA device here. Use cpu.")
    return name


def _threads(given: int | None) -> int:
    import torch

    return torch.get_num_threads() if given is None else given
