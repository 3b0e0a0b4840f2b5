"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL, _PROMPT, _METHOD, _GENERATION = "Model", "Prompt", "Compression", "Generation"

Model = Annotated[
    str | None,
    typer.Option(
        help="A model on the Hugging Face Hub or in a folder; otherwise the small reference "
        "model that comes with kvsieve.",
        show_default=False,
        rich_help_panel=_MODEL,
    ),
]
DType = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_MODEL)
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda, cuda:1, ... auto is a GPU where there is one (the reference "
        "model: cpu).",
        rich_help_panel=_MODEL,
    ),
]
Prompt = Annotated[
    str | None, typer.Option(help="The prompt.", show_default=False, rich_help_panel=_PROMPT)
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        help="A UTF-8 text file with the prompt; - reads stdin.",
        show_default=False,
        rich_help_panel=_PROMPT,
    ),
]
SampleKind = Annotated[
    str | None,
    typer.Option(
        "--sample",
        help="Make up a prompt of that kind for the reference model and mark the answer (see "
        "`kvsieve sample --help`).",
        show_default=False,
        rich_help_panel=_PROMPT,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(help="With a sample: steps.", show_default=False, rich_help_panel=_PROMPT),
]
Length = Annotated[
    int | None,
    typer.Option(
        help="With a sample: tokens of the prompt.", show_default=False, rich_help_panel=_PROMPT
    ),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat/--no-chat",
        help="Put the prompt into the tokenizer's chat template.",
        rich_help_panel=_PROMPT,
    ),
]
Method = Annotated[str | None, typer.Option(help="See `kvsieve methods`.", rich_help_panel=_METHOD)]
RecipeFile = Annotated[
    Path | None,
    typer.Option(help="A TOML file with method, budget and options.", rich_help_panel=_METHOD),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="What to keep: slots per head (256), a share (10%, 0.1) or bytes (2GiB).",
        show_default=False,
        rich_help_panel=_METHOD,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An option of the method (`kvsieve show METHOD`), or schedule, layout, sinks, "
        "recent. May be repeated.",
        show_default=False,
        rich_help_panel=_METHOD,
    ),
]
Protect = Annotated[
    list[str] | None,
    typer.Option(
        metavar="START:END",
        help="Tokens of the prompt that always stay, e.g. 0:50. May be repeated.",
        show_default=False,
        rich_help_panel=_METHOD,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="Stop after that many tokens; otherwise 2048 (the reference model: enough for its "
        "answers), or what the context leaves.",
        show_default=False,
        rich_help_panel=_GENERATION,
    ),
]
Temperature = Annotated[
    float, typer.Option(help="0 always takes the likeliest token.", rich_help_panel=_GENERATION)
]
Seed = Annotated[
    int,
    typer.Option(help="Seed of the made-up prompt and of sampling.", rich_help_panel=_GENERATION),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
