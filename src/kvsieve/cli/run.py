"""`kvsieve run`: generate once under a recipe."""

from __future__ import annotations

import typer

from kvsieve.cli import options as o
from kvsieve.cli import prompts, settings
from kvsieve.cli.generation import Outcome, generate
from kvsieve.cli.models import Choice
from kvsieve.cli.output import print_json, summary
from kvsieve.cli.status import Status
from kvsieve.compose import Recipe


def run(
    method: o.Method = None,
    budget: o.Budget = None,
    recipe: o.RecipeFile = None,
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
    """Generate text under one method: the text goes to stdout, a short report to stderr."""
    prompts.check_generation(max_new_tokens, temperature)
    built = settings.asked(recipe, method, budget, set_ or [], protect or [])
    choice = Choice.read(model, dtype, device)
    source = prompts.read(
        prompt, prompt_file, sample,
        seed=seed, steps=steps, length=length, own_model=model is not None,
    )  # fmt: skip
    with Status() as status:
        outcome = _generate(
            built, choice, source, status,
            show=not json, chat=chat, max_new_tokens=max_new_tokens,
            temperature=temperature, seed=seed,
        )  # fmt: skip
    if json:
        print_json(outcome.to_dict())
        return
    typer.echo()
    right = source.right(outcome.text)
    typer.echo(summary(outcome.report, outcome.prompt_tokens, outcome.new_tokens, right), err=True)


def _generate(
    built: Recipe,
    choice: Choice,
    source: prompts.Prompt,
    status: Status,
    *,
    show: bool,
    chat: bool,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
) -> Outcome:
    status.step("loading the model")
    opened = choice.open()
    ids = prompts.encode(source.text, opened, chat)
    limit = prompts.room(ids.shape[1], opened, max_new_tokens, source.sample)
    if not opened.reference:
        built = settings.with_request(built, opened.tokenizer)
    weights = opened.weights()
    status.step(f"reading {ids.shape[1]} tokens")

    def on_text(piece: str) -> None:
        status.token("writing", limit)
        if piece and show:
            status.text(piece)

    return generate(
        weights, opened.tokenizer, built, ids,
        max_new_tokens=limit, temperature=temperature, seed=seed, on_text=on_text,
    )  # fmt: skip
