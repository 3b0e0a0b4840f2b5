"""Answers of the reference model served by vLLM, beside those of Transformers.

Both follow the same recipe at the same block columns (``kvsieve.columns``), greedily: they keep
the same slots and, but for rounding, say the same. vLLM gets all prompts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from kvsieve.bench import rows
from kvsieve.bench.elsewhere import answered, vllm_version
from kvsieve.bench.intervals import share
from kvsieve.bench.quality.rows import origin
from kvsieve.bench.rows import Row
from kvsieve.compose import Recipe, recipe
from kvsieve.engines.vllm.effective import effective
from kvsieve.engines.vllm.settings import Settings
from kvsieve.reference import Sample
from kvsieve.reference.loader import folder
from kvsieve.reference.samples import VERSION as TASK_VERSION
from kvsieve.reference.sized import sized

KIND, VERSION = "served", 1
FILE = "served.jsonl"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """``n`` tasks of about ``length`` tokens from seeds ``seed`` on, for each kind of ``tasks``.

    ``kv_blocks``: blocks of vLLM's pool; by default nothing is ever preempted.
    """

    tasks: tuple[str, ...] = ("reasoning", "walk", "retrieval")
    length: int = 512
    n: int = 20
    seed: int = 0
    block: int = 32
    kv_blocks: int = 2000
    threads: int = 1

    def samples(self, task: str) -> list[Sample]:
        """Return a task's prompts."""
        return [sized(task, seed=self.seed + i, length=self.length) for i in range(self.n)]


IDENTITY = (
    *("kind", "version", "engine", "task", "task_version", "method", "config"),
    *(field.name for field in fields(Plan) if field.name != "tasks"),
    *("model", "weights", "dtype", "device", "versions", "commit"),
)


def measure(
    plan: Plan,
    configs: Mapping[str, Mapping[str, Any] | None],
    done: Set[str] = frozenset(),
    on_cell: Callable[[str, str], None] = lambda task, name: None,
) -> Iterator[Row]:
    """Yield a row per task and method; ``configs`` maps names to the plugin's configuration.

    Rows whose key is in ``done`` are skipped.
    """
    from kvsieve.reference import load

    model, tokenizer = load("float32", "cpu")
    torch.set_num_threads(plan.threads)
    for task in plan.tasks:
        for name, config in configs.items():
            row = identity(plan, task, name, config)
            if rows.key(row, IDENTITY) not in done:
                on_cell(task, name)
                yield row | figures(plan, model, tokenizer, plan.samples(task), config)


def identity(plan: Plan, task: str, name: str, config: Mapping[str, Any] | None) -> Row:
    """Return the part of a row that says what it is of."""
    asked = asdict(plan)
    del asked["tasks"]
    return {
        "kind": KIND, "version": VERSION, **origin(), "engine": "vllm", **asked,
        "task": task, "task_version": TASK_VERSION, "method": name,
        "config": None if config is None else dict(config),
        "versions": rows.versions() | {"vllm": vllm_version()},
    }  # fmt: skip


def figures(
    plan: Plan, model: Any, tokenizer: Any, samples: list[Sample], config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Ask both engines, and count who is right and where they say the same tokens."""
    prompts = [tokenizer(made.prompt, add_special_tokens=False).input_ids for made in samples]
    lengths = [made.answer_tokens + 1 for made in samples]
    asked = {
        "model": str(folder()), "config": config, "block": plan.block,
        "kv_blocks": plan.kv_blocks, "prompts": prompts, "lengths": lengths,
    }  # fmt: skip
    served = answered("kvsieve.bench.served_process", asked, plan.threads)
    built = as_served(config, plan.block)
    pairs = zip(prompts, lengths, strict=True)
    beside = [in_transformers(model, built, prompt, length) for prompt, length in pairs]
    return {
        "vllm": graded(tokenizer, samples, served["tokens"]),
        "transformers": graded(tokenizer, samples, beside),
        "same_tokens": sum(a == b for a, b in zip(served["tokens"], beside, strict=True)),
        "answer_tokens": sum(map(len, served["tokens"])),
        "compactions": served["compactions"],
        "preemptions": served["preemptions"],
    }


def as_served(config: Mapping[str, Any] | None, block: int) -> Recipe:
    """Return the recipe by which Transformers does what vLLM does."""
    settings = Settings.read({"kvsieve": config})
    if settings is None:
        return recipe("full")
    return effective(settings.recipe, block, settings.policy).recipe


@torch.no_grad()
def in_transformers(model: Any, built: Recipe, prompt: list[int], length: int) -> list[int]:
    """Return up to ``length`` tokens, the end mark included, answered greedily."""
    from kvsieve.engines.transformers import Cache

    ids = torch.tensor([prompt])
    with Cache(model, built, prompt_length=len(prompt)) as cache:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
            max_new_tokens=length,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def graded(tokenizer: Any, samples: list[Sample], answers: list[list[int]]) -> dict[str, Any]:
    """Return the share right with its interval, and which were."""
    right = [
        int(made.grade(tokenizer.decode(tokens, skip_special_tokens=True)))
        for made, tokens in zip(samples, answers, strict=True)
    ]
    return {**share(right), "right": right}
