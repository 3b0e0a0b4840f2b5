# pyright: reportMissingImports=false
"""The process that serves a ``Load`` once and counts what the scheduler does."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from kvsieve.bench.elsewhere import answer
from kvsieve.bench.serving import Load


def serve(load: Load, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Serve a load in this process and return its figures."""
    from vllm import LLM

    requests = len(load.sizes())
    llm = LLM(
        model=load.model,
        dtype=load.dtype,
        block_size=load.block,
        max_model_len=load.longest,
        max_num_batched_tokens=max(load.chunk, requests),
        max_num_seqs=requests,
        num_gpu_blocks_override=load.kv_blocks,
        hf_overrides=_longer(load),
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        additional_config={} if config is None else {"kvsieve": dict(config)},
    )
    prompts = _prompts(llm, load)
    _submit(llm, [(prompt[: load.block], 4) for prompt, _ in prompts[:2]], "warm")
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return _timed(llm, prompts)


def _longer(load: Load) -> dict[str, Any]:
    """Let a model count further than it was trained for: what it says doesn't matter here."""
    from transformers import AutoConfig

    known = getattr(AutoConfig.from_pretrained(load.model), "max_position_embeddings", None)
    short = known is not None and known < load.longest
    return {"max_position_embeddings": load.longest} if short else {}


@dataclass
class Steps:
    """What an engine's scheduler did, step by step.

    ``plain``: seconds of steps in which no prompt is read and nothing is compacted; ``events`` and
    ``compacting``: compactions of the other steps in which no prompt is read, and their seconds.
    What follows a prompt is left out: it grows with the prompt.
    """

    scheduler: Any
    running: list[int] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    events: int = 0
    compacting: float = 0.0
    preempted: int = 0
    reading: bool = False

    def __post_init__(self) -> None:
        schedule, preempt = self.scheduler.schedule, self.scheduler._preempt_request

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            out = schedule(*args, **kwargs)
            self.reading = any(count > 1 for count in out.num_scheduled_tokens.values())
            return out

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **kwargs)

        self.scheduler.schedule, self.scheduler._preempt_request = scheduled, counted

    def took(self, seconds: float, events: int, compacting: float) -> None:
        """Write down a step that has ended: its seconds, compactions, and the seconds of those."""
        self.running.append(len(self.scheduler.running))
        self.free.append(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())
        if self.reading:
            return
        self.events += events
        self.compacting += compacting
        if not events:
            self.plain.append(seconds)


def _timed(llm: Any, prompts: Sequence[tuple[list[int], int]]) -> dict[str, Any]:
    from kvsieve.engines.vllm.metrics import TALLY

    engine = llm.llm_engine
    steps = Steps(engine.engine_core.engine_core.scheduler)
    _submit(llm, prompts, "timed")
    tokens = 0
    before = TALLY.to_dict()
    start = last = time.perf_counter()
    while engine.has_unfinished_requests():
        events, compacting = TALLY.compactions, TALLY.seconds
        for out in engine.step():
            tokens += len(out.outputs[0].token_ids) if out.finished else 0
        now = time.perf_counter()
        steps.took(now - last, TALLY.compactions - events, TALLY.seconds - compacting)
        last = now
    seconds = last - start
    after = TALLY.to_dict()
    plain = fmean(steps.plain) if steps.plain else None
    event = steps.compacting / steps.events if steps.events else None
    return {
        "steps": len(steps.running),
        "preemptions": steps.preempted,
        "mean_running": fmean(steps.running),
        "most_running": max(steps.running),
        "least_free_blocks": min(steps.free),
        "output_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "compactions": after["compactions"] - before["compactions"],
        "compaction_seconds": after["seconds"] - before["seconds"],
        "decode_step_seconds": plain,
        "event_seconds": event,
        "event_in_steps": event / plain if event and plain else None,
        "blocks_freed": after["blocks_freed"] - before["blocks_freed"],
        "side_bytes": after["side_bytes"],
    }


def _submit(llm: Any, prompts: Sequence[tuple[list[int], int]], name: str) -> None:
    from vllm import SamplingParams

    for number, (prompt, tokens) in enumerate(prompts):
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        llm.llm_engine.add_request(f"{number}-{name}", {"prompt_token_ids": prompt}, params)


def _prompts(llm: Any, load: Load) -> list[tuple[list[int], int]]:
    size = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    r = random.Random(0)
    return [([r.randrange(3, size) for _ in range(prompt)], tokens)
            for prompt, tokens in load.sizes()]  # fmt: skip


if __name__ == "__main__":
    answer(lambda asked: serve(Load(**asked["load"]), asked["config"]))
