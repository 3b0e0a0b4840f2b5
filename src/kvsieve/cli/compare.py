"""`kvsieve compare`: the same prompt under several methods, side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import kvsieve
from kvsieve.cli import options as o
from kvsieve.cli import prompts, settings
from kvsieve.cli.comparison import Row, json_object, print_table
from kvsieve.cli.generation import Outcome, generate
from kvsieve.cli.guard import FAILED, Failed
from kvsieve.cli.models import Choice, Opened
from kvsieve.cli.output import print_json
from kvsieve.cli.status import Status
from kvsieve.compose import Recipe
from kvsieve.errors import BudgetError, EngineError, UnsupportedLayout, UnsupportedSignal

_OF_ONE_METHOD = (BudgetError, EngineError, UnsupportedLayout, UnsupportedSignal, Failed)
"""Errors that end up in a method's row; the other methods go on."""

_WARM_UP = 4
"""Tokens generated before anything is measured."""


def compare(
    methods: Annotated[
        str,
        typer.Option(
            help="Names with commas between; full is always added.", rich_help_panel="Compression"
        ),
    ],
    budget: o.Budget = None,
    set_: o.Set = None,
    protect: o.Protect = None,
    prompt: o.Prompt = None,
    prompt_file: o.PromptFile = None,
    sample: o.SampleKind = None,
    steps: o.Steps = None,
    length: o.Length = None,
    chat: o.Chat = False,
    model: o.Model = None,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    max_new_tokens: o.MaxNewTokens = None,
    temperature: o.Temperature = 0.0,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Run one prompt under several methods and print one table (exit code 1 if one failed).

    --set KEY=VALUE goes to every method that has the option, --set METHOD.KEY=VALUE to one.
    """
    prompts.check_generation(max_new_tokens, temperature)
    asked = settings.several(methods, budget, set_ or [], protect or [])
    recipes = {name: _recipe(name, options) for name, options in asked.items()}
    choice = Choice.read(model, dtype, device)
    source = prompts.read(
        prompt, prompt_file, sample,
        seed=seed, steps=steps, length=length, own_model=model is not None,
    )  # fmt: skip
    with Status() as status:
        rows = _run_all(
            recipes, choice, source, status,
            chat=chat, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        )  # fmt: skip
    if json:
        print_json(json_object(rows, source))
    else:
        print_table(rows, source)
    if any(row.error for row in rows):
        raise typer.Exit(FAILED)


def _recipe(name: str, options: dict[str, Any]) -> Recipe | Exception:
    try:
        return kvsieve.recipe(name, **options)
    except _OF_ONE_METHOD as error:
        return error


def _run_all(
    recipes: dict[str, Recipe | Exception],
    choice: Choice,
    source: prompts.Prompt,
    status: Status,
    *,
    chat: bool,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
) -> list[Row]:
    status.step("loading the model")
    opened = choice.open()
    ids = prompts.encode(source.text, opened, chat)
    limit = prompts.room(ids.shape[1], opened, max_new_tokens, source.sample)
    model = opened.weights()

    def one(name: str, recipe: Recipe, tokens: Any = ids, limit: int = limit) -> Outcome:
        status.step(f"{name}: reading {ids.shape[1]} tokens")
        return generate(
            model, opened.tokenizer, recipe, tokens,
            max_new_tokens=limit, temperature=temperature, seed=seed,
            on_text=lambda _: status.token(f"{name}: writing", limit),
        )  # fmt: skip

    one("warming up", kvsieve.recipe("full"), ids[:, -_WARM_UP:], _WARM_UP)
    return [_row(name, recipe, opened, one, source) for name, recipe in recipes.items()]


def _row(
    name: str, recipe: Recipe | Exception, opened: Opened, one: Any, source: prompts.Prompt
) -> Row:
    try:
        if isinstance(recipe, Exception):
            raise recipe
        if not opened.reference:
            recipe = settings.with_request(recipe, opened.tokenizer)
        outcome = one(name, recipe)
    except _OF_ONE_METHOD as error:
        return Row(method=name, error=str(error))
    return Row(method=name, outcome=outcome, right=source.right(outcome.text))
