"""vLLM in this process on the reference model, with everything it schedules written down."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# Small helpers of the sampler would be compiled by a C++ compiler in every process.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from kvsieve.reference.loader import folder

BLOCK = 32
VOCAB = 576


@dataclass
class Served:
    """One request: its tokens, their log-probabilities, and the forwards ``(n0, tokens)``."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forwards: list[tuple[int, int]] = field(default_factory=list)
    preempted: int = 0
    finish: str | None = None


@dataclass
class Run:
    """Several requests served together."""

    served: list[Served]
    steps: int = 0
    least_free: int = 1 << 60
    most_running: int = 0


@contextmanager
def engine(config: dict[str, Any] | None, **options: Any) -> Iterator[LLM]:
    """Open vLLM on the reference model under ``config``, in fp32, and close it completely."""
    given = {
        "model": str(folder()),
        "dtype": "float32",
        "block_size": BLOCK,
        "max_model_len": 2048,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "additional_config": {} if config is None else {"kvsieve": config},
    }
    threads = torch.get_num_threads()
    llm = None
    try:
        llm = LLM(**(given | options))
        torch.set_num_threads(1)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        torch.set_num_threads(threads)


def scheduler(llm: LLM) -> Any:
    """Return the scheduler of an engine that runs in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]


def free_blocks(llm: LLM) -> int:
    """Return how many blocks nobody holds."""
    return scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Return random tokens that mean nothing, and don't repeat.

    Equal tokens have equal keys in the first layer, and which of two equal scores wins would be
    left to rounding.
    """
    r = random.Random(seed)
    return [r.sample(range(3, VOCAB), n) for n in lengths]


def serve(
    llm: LLM, given: Sequence[list[int]], tokens: int, params: dict[str, Any] | None = None
) -> Run:
    """Serve all prompts at once, ``tokens`` each, greedily; no token comes twice (see ``prompts``).

    Log-probabilities are those of the model, whatever the penalty does.
    """
    made = Run(served=[Served(prompt) for prompt in given])
    core = llm.llm_engine
    with _written_down(scheduler(llm), made):
        for i, prompt in enumerate(given):
            sampling = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": 1}
            sampling |= {"repetition_penalty": 1e6}
            core.add_request(
                str(i), {"prompt_token_ids": prompt}, SamplingParams(**(sampling | (params or {})))
            )
        while core.has_unfinished_requests():
            for out in core.step():
                if out.finished:
                    done = out.outputs[0]
                    one = made.served[int(out.request_id)]
                    one.tokens, one.finish = list(done.token_ids), done.finish_reason
                    one.logprobs = [
                        step[token].logprob
                        for step, token in zip(done.logprobs, done.token_ids, strict=True)
                    ]
            made.steps += 1
            made.least_free = min(made.least_free, free_blocks(llm))
    return made


@contextmanager
def _written_down(watched: Any, run: Run) -> Iterator[None]:
    schedule, preempt = watched.schedule, watched._preempt_request

    def recorded(*args: Any, **kwargs: Any) -> Any:
        out = schedule(*args, **kwargs)
        at = {new.req_id: new.num_computed_tokens for new in out.scheduled_new_reqs}
        cached = out.scheduled_cached_reqs
        at |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for key, count in out.num_scheduled_tokens.items():
            run.served[number(key)].forwards.append((at[key], count))
        run.most_running = max(run.most_running, len(out.num_scheduled_tokens))
        return out

    def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
        run.served[number(request.request_id)].preempted += 1
        return preempt(request, *args, **kwargs)

    watched.schedule, watched._preempt_request = recorded, counted
    try:
        yield
    finally:
        watched.schedule, watched._preempt_request = schedule, preempt


def number(request_id: str) -> int:
    """Return the number that ``serve`` gave a request."""
    return int(request_id.split("-")[0])
