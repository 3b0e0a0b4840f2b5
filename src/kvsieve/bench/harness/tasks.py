"""The harness's tasks, loaded by name: local ones with our data, the others as the harness does."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from kvsieve.bench.harness import ruler
from kvsieve.bench.harness.checks import HarnessError
from kvsieve.bench.harness.grading import gsm8k_answer, same_answer
from kvsieve.bench.harness.local import LOCAL, Local, read
from kvsieve.bench.harness.sentences import offline_sentences
from kvsieve.errors import choices


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A task of the harness; ``facts`` say in the rows where its examples come from."""

    name: str
    task: Any
    metric: str
    facts: dict[str, Any]

    @property
    def fewshot(self) -> int:
        """Examples in the prompt."""
        return int(self.task.get_config("num_fewshot") or 0)


def library(name: str) -> Any:
    """Return a module of the extra ``harness``.

    Raises:
        HarnessError: it isn't installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise HarnessError(
            f"This needs lm-evaluation-harness ({error.name} is missing): `make harness` in a "
            "checkout, else pip install 'kvsieve[harness]'."
        ) from error


@cache
def _manager() -> Any:
    """Return the index of the harness's tasks, which takes seconds to make."""
    return library("lm_eval.tasks").TaskManager()


def load(
    names: Sequence[str], data: Path | None, fewshot: int | None, tokenizer: Any = None
) -> list[Loaded]:
    """Load tasks by name; groups of the harness become their tasks.

    ``data``: the folder of the tasks in ``LOCAL``, which are taken from there alone; None: those
    too come from the hub. ``fewshot``: examples in the prompt, in place of the task's own number.
    ``tokenizer``: the model's, of which RULER makes prompts.

    Raises:
        HarnessError: an unknown task, a missing file or field, or data that can't be loaded.
    """
    manager = _manager()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    library("datasets").disable_progress_bars()
    for name in names:
        if not (name in LOCAL or ruler.parse(name) or name in manager.all_tasks):
            raise HarnessError(f"Unknown task {name!r}. {_near(name, manager.all_tasks)}")
    found: list[Loaded] = []
    for name in dict.fromkeys(names):
        if name in LOCAL:
            found.append(_local(manager, name, LOCAL[name], data))
        elif ruler.parse(name):
            found += _ruler(manager, name, tokenizer)
        else:
            found += _by_name(manager, name)
    for loaded in found:
        _set_fewshot(loaded, fewshot)
    return found


def _set_fewshot(loaded: Loaded, asked: int | None) -> None:
    own = loaded.task.get_config("num_fewshot")
    if asked and own == 0:
        raise HarnessError(
            f"The task {loaded.name!r} has no examples to show: leave out --fewshot."
        )
    loaded.task.set_config(key="num_fewshot", value=own or 0 if asked is None else asked)
    loaded.task.set_fewshot_seed(seed=0)


def _near(name: str, known: Sequence[str]) -> str:
    """Near matches only: the harness has thousands of names."""
    hint = choices(name, [*known, *LOCAL, "ruler_4k"]).partition("Possible:")[0].strip()
    return hint or f"From --data: {', '.join(LOCAL)}; the harness's own: `lm-eval ls tasks`."


def _local(manager: Any, name: str, local: Local, data: Path | None) -> Loaded:
    facts: dict[str, Any] = {"harness_task": local.base, "data_sha256": None}
    if name == "ifeval":
        facts["sentences"] = offline_sentences()
    spec: Any = local.base
    if data is not None:
        rows, digest = read(local, data)
        facts["data_sha256"] = digest
        spec = _config(manager, local.base)
        spec = {n: x for n, x in spec.items() if n not in ("tag", "training_split")}
        spec["custom_dataset"] = _dataset(local.split, rows)
    task = _load(manager, spec, name)[local.base]
    return Loaded(name=name, task=task, metric=local.metric, facts=facts)


def _dataset(split: str, rows: list[dict[str, Any]]) -> Any:
    def made(**ignored: Any) -> dict[str, Any]:
        return {split: library("datasets").Dataset.from_list(rows)}

    return made


def _ruler(manager: Any, name: str, tokenizer: Any) -> list[Loaded]:
    parsed = ruler.parse(name)
    assert parsed is not None and tokenizer is not None, "a task of RULER, with a tokenizer"
    leaves, length = parsed
    made = []
    with ruler.making(leaves, tokenizer):
        for leaf in leaves:
            config = _config(manager, leaf)
            task = _load(manager, ruler.spec(config, length, tokenizer), name)[leaf]
            facts = {"harness_task": leaf, "data_sha256": None, "max_seq_length": length}
            shown = f"{leaf}_{length // 1024}k"
            made.append(Loaded(name=shown, task=task, metric=str(length), facts=facts))
    return made


def _config(manager: Any, name: str) -> dict[str, Any]:
    """Return a task's whole configuration: the harness completes none that is given in part."""
    path = manager.task_index[name].yaml_path
    return library("lm_eval.tasks._yaml_loader").load_yaml(path, resolve_func=True)


def _by_name(manager: Any, name: str) -> list[Loaded]:
    made = []
    for leaf, task in _load(manager, name, name).items():
        metrics = task.get_config("metric_list") or [{"metric": "acc"}]
        facts = {"harness_task": leaf, "data_sha256": None}
        made.append(Loaded(name=leaf, task=task, metric=str(metrics[0]["metric"]), facts=facts))
    return made


def _load(manager: Any, spec: Any, name: str) -> dict[str, Any]:
    try:
        return manager.load([spec])["tasks"]
    except (OSError, ConnectionError, ImportError, LookupError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = f"; {LOCAL[name].file} in --data DIR would do" if name in LOCAL else ""
        raise HarnessError(
            f"Can't load the task {name!r} (its data is on the Hugging Face Hub{hint}): {reason}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a task came to under one model.

    ``values``: the metric of each example, where it is a number; ``scores``: everything that the
    harness made of them, as "metric,filter".
    """

    metric: str
    score: float
    values: list[float] | None
    scores: dict[str, float]
    examples: int


def evaluate(lm: Any, loaded: Loaded, limit: int | None, chat: bool) -> Outcome:
    """Run a task; ``limit``: its first examples only."""
    module = library("lm_eval.api.task")
    with patch.object(module, "tqdm", partial(module.tqdm, disable=True)):
        done = library("lm_eval.evaluator").evaluate(
            lm=lm,
            task_dict={"tasks": {loaded.task.task_name: loaded.task}},
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    name = loaded.task.task_name
    scores = {
        key: float(value)
        for key, value in done["results"][name].items()
        if isinstance(value, int | float)
        and "_stderr" not in key
        and "," in key
        # RULER's lengths that were not asked for.
        and not (key.partition(",")[0].isdigit() and value == -1)
    }
    samples = done["samples"][name]
    if loaded.name == "gsm8k":
        return _gsm8k(samples, scores)
    first = samples[0]["filter"]
    chosen = [sample.get(loaded.metric) for sample in samples if sample["filter"] == first]
    numbers = all(isinstance(value, bool | int | float) for value in chosen)
    metric = f"{loaded.metric},{first}"
    return Outcome(
        metric=metric,
        score=scores[metric],
        values=[float(value) for value in chosen] if numbers else None,
        scores=scores,
        examples=len(chosen),
    )


def _gsm8k(samples: list[dict[str, Any]], scores: dict[str, float]) -> Outcome:
    """Compare what was written, not what a filter found in it."""
    first = samples[0]["filter"]
    values = [
        float(same_answer(gsm8k_answer(sample["doc"]["answer"]), sample["resps"][0][0]))
        for sample in samples
        if sample["filter"] == first
    ]
    score = sum(values) / len(values)
    return Outcome(
        metric="math_verify",
        score=score,
        values=values,
        scores={"math_verify": score, **scores},
        examples=len(values),
    )
