"""`kvsieve sample`: a prompt for the reference model."""

from __future__ import annotations

from typing import Annotated

import typer

from kvsieve.cli.prompts import make_sample


def sample(
    kind: Annotated[
        str,
        typer.Argument(
            help="retrieval, multi-hop, instructions, secret, reasoning or walk.",
            show_default=False,
        ),
    ],
    steps: Annotated[
        int | None, typer.Option(help="Steps of reasoning.", show_default=False)
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of the prompt.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another prompt.")] = 0,
) -> None:
    """Make up a prompt in the reference model's words and print it."""
    typer.echo(make_sample(kind, seed=seed, steps=steps, length=length).prompt, nl=False)
