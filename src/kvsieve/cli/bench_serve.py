"""`kvsieve bench serve`: methods inside vLLM, with an equal pool of blocks."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvsieve.cli import options as o
from kvsieve.cli import settings
from kvsieve.cli.guard import BadInput, Failed
from kvsieve.cli.output import console, table
from kvsieve.cli.serve import plugin_config, require_vllm
from kvsieve.cli.sweeps import Row

_SAME = ("load", "model", "kv_blocks", "block", "chunk", "dtype", "threads", "round", "cpu")
"""What rows have in common that can be compared with each other."""

_LOAD = {"--requests": 16, "--prompt": 200, "--output": 600}


def _part(text: str) -> Any:
    return typer.Option(help=text, show_default=False, min=1)


Requests = Annotated[int | None, _part("Requests of a single load; otherwise 16.")]
Prompt = Annotated[int | None, _part("Tokens of its prompts; otherwise 200.")]
Output = Annotated[int | None, _part("Tokens of its answers; otherwise 600.")]


def serve(
    methods: Annotated[
        str, typer.Option(help="Methods, commas between; the first is the one to compare with.")
    ] = "full,g-kv,snapkv",
    budget: Annotated[str, typer.Option(help="Slots per head.")] = "128",
    set_: o.Set = None,
    policy: Annotated[str, typer.Option(help="after-prompt or chunk.")] = "after-prompt",
    model: o.Model = None,
    kv_blocks: Annotated[int, typer.Option(help="Blocks of the pool, for every method.")] = 65,
    block: Annotated[int, typer.Option(help="Slots of a block.")] = 32,
    load: Annotated[
        list[str] | None,
        typer.Option(
            help="REQUESTSxPROMPT+ANSWER (tokens), all sent at once; commas mix several; may be "
            "given more than once.",
            show_default="16x200+600",
        ),
    ] = None,
    requests: Requests = None,
    prompt: Prompt = None,
    output: Output = None,
    chunk: Annotated[int, typer.Option(help="Most tokens in one step.")] = 2048,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    rounds: Annotated[int, typer.Option(help="Times to measure; methods take turns.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="A JSONL file: rows are added as they finish.", show_default=False),
    ] = None,
    shown: Annotated[
        Path | None,
        typer.Option("--table", help="Measure nothing: print such a file.", show_default=False),
    ] = None,
    json: o.Json = False,
) -> None:
    """Serve the same load under several methods: engine steps, preemptions, tokens per second.

    Steps and preemptions are the scheduler's and repeat exactly; seconds are this machine's.
    "event" is what a compaction while decoding (one request) costs, in plain decode steps.
    """
    from kvsieve.bench import rows
    from kvsieve.bench.serving import IDENTITY, KIND, VERSION, Load, measure

    if shown is not None:
        found = rows.read(shown, KIND, VERSION)
        if not found:
            raise BadInput(f"{str(shown)!r} has no rows of `kvsieve bench serve`.")
        _show(found, json)
        return
    configs = configs_of(methods, budget, set_ or [], policy)
    single = single_load(load, {"--requests": requests, "--prompt": prompt, "--output": output})
    try:
        loads = [
            Load(
                model=_model(model), load=one, kv_blocks=kv_blocks, block=block, chunk=chunk,
                dtype=dtype, threads=threads,
            )
            for one in load or [single]
        ]  # fmt: skip
    except ValueError as error:
        raise BadInput(f"--load {error}") from error
    require_vllm()
    known = {rows.key(row, IDENTITY): row for row in (rows.read(out, KIND, VERSION) if out else [])}

    def said(name: str, number: int) -> None:
        typer.echo(f"round {number + 1}: {name}", err=True)

    measured: list[Row] = []
    try:
        for one in loads:
            for row in measure(one, configs, rounds, known.keys(), said):
                measured.append(row)
                if out:
                    rows.append(out, row)
    except RuntimeError as error:
        raise Failed(str(error)) from error
    _show(measured or list(known.values()), json)


def single_load(load: list[str] | None, parts: dict[str, int | None]) -> str:
    """Return the load that its parts make, as ``--load`` takes it.

    Raises:
        BadInput: parts beside ``--load``.
    """
    given = {name: number for name, number in parts.items() if number is not None}
    if load and given:
        raise BadInput(f"{', '.join(given)} and --load both say what to send: give one of them.")
    count, read, written = (_LOAD | given).values()
    return f"{count}x{read}+{written}"


def configs_of(
    methods: str, budget: str, pairs: Sequence[str], policy: str
) -> dict[str, dict[str, Any] | None]:
    """Return the plugin's configuration of every method; None: vLLM as it is."""
    import kvsieve

    asked = settings.several(methods, budget, pairs, ())
    configs: dict[str, dict[str, Any] | None] = {}
    for name, options in asked.items():
        recipe = kvsieve.recipe(name, **options)
        configs[name] = plugin_config(recipe, policy) if recipe.compresses else None
    return configs


def _model(given: str | None) -> str:
    from kvsieve.reference.loader import folder

    return str(folder()) if given is None else given


def _show(found: Sequence[Row], json: bool) -> None:
    if json:
        for row in found:
            typer.echo(jsonlib.dumps(row))
        return
    numbers = ("blocks", "steps", "preempted", "running", "seconds", "tokens/s", "× first", "event")
    made = table("load", "method", "policy", *numbers, right=numbers, whole=("load", "method"))
    first: dict[str, float] = {}
    for row in found:
        config, rate, event = row["config"] or {}, row["tokens_per_second"], row["event_in_steps"]
        same = jsonlib.dumps([row[name] for name in _SAME])
        made.add_row(
            row["load"],
            row["method"],
            config.get("policy", "–"),
            str(row["kv_blocks"]),
            str(row["steps"]),
            str(row["preemptions"]),
            f"{row['mean_running']:.1f} of {row['most_running']}",
            f"{row['seconds']:.1f}",
            f"{rate:.0f}",
            f"{rate / first.setdefault(same, rate):.2f}",
            "–" if event is None else f"{event:.1f}",
        )
    console().print(made)
