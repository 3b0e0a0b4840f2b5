# pyright: reportMissingImports=false
"""Serving measured: methods in vLLM with an equal pool of blocks, one process after another.

``python -m kvsieve.bench.serving`` is the process that serves once: it reads a ``Load`` as JSON
from its standard input and prints the figures as JSON on its last line. Steps and preemptions are
counted in the scheduler, and don't depend on what else the machine does; seconds do.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from kvsieve.bench import rows
from kvsieve.bench.rows import Row

KIND, VERSION = "serve", 1

IDENTITY = (
    *("kind", "version", "engine", "method", "config", "model", "requests", "prompt", "output"),
    *("kv_blocks", "block", "chunk", "dtype", "device", "threads", "round", "cpu", "versions"),
    "commit",
)

MARK = "KVSIEVE-FIGURES "


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is served: ``requests`` random prompts of ``prompt`` tokens, ``output`` tokens each.

    ``kv_blocks``: blocks of the pool, vLLM's null block included; ``chunk``: most tokens in one
    step; ``model``: a folder or name.
    """

    model: str
    requests: int
    prompt: int
    output: int
    kv_blocks: int
    block: int = 32
    chunk: int = 2048
    dtype: str = "float32"
    threads: int = 1


def measure(
    load: Load,
    methods: Mapping[str, Mapping[str, Any] | None],
    rounds: int = 1,
    done: Set[str] = frozenset(),
    on_cell: Callable[[str, int], None] = lambda name, number: None,
) -> Iterator[Row]:
    """Yield a row per method and round; ``methods`` maps names to the plugin's configuration.

    Methods take turns within a round. Rows whose key is in ``done`` are skipped.
    """
    for number in range(rounds):
        for name, config in methods.items():
            on_cell(name, number)
            row = identity(load, name, config, number)
            if rows.key(row, IDENTITY) not in done:
                yield row | served_elsewhere(load, config)


def identity(load: Load, name: str, config: Mapping[str, Any] | None, number: int) -> Row:
    """Return the part of a row that says what it is of."""
    facts = asdict(load)
    return {
        "kind": KIND,
        "version": VERSION,
        "engine": "vllm",
        "method": name,
        "config": None if config is None else dict(config),
        **facts,
        "model": os.path.basename(load.model.rstrip("/")),
        "device": "cpu",
        "round": number,
        "cpu": rows.cpu(),
        "versions": rows.versions() | {"vllm": _vllm()},
        "commit": rows.commit(),
    }


def _vllm() -> str:
    from kvsieve.engines.vllm.compat import version

    return version()


def served_elsewhere(load: Load, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Serve in a process of its own and return its figures.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(load.threads),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "kvsieve.bench.serving"],
        input=json.dumps({"load": asdict(load), "config": config}),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    for line in reversed(done.stdout.splitlines()):
        if line.startswith(MARK):
            return json.loads(line[len(MARK) :])
    raise RuntimeError(f"vLLM failed: {(done.stderr or done.stdout).strip()[-800:]}")


def main() -> None:
    """Serve once: the process that ``served_elsewhere`` starts."""
    asked = json.load(sys.stdin)
    figures = serve(Load(**asked["load"]), asked["config"])
    print(MARK + json.dumps(figures), flush=True)


def serve(load: Load, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Serve a load in this process and return its figures."""
    from vllm import LLM

    llm = LLM(
        model=load.model,
        dtype=load.dtype,
        block_size=load.block,
        max_model_len=load.prompt + load.output,
        max_num_batched_tokens=max(load.chunk, load.requests),
        max_num_seqs=load.requests,
        num_gpu_blocks_override=load.kv_blocks,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        additional_config={} if config is None else {"kvsieve": dict(config)},
    )
    _warm(llm, load)
    return _timed(llm, load)


def _warm(llm: Any, load: Load) -> None:
    _submit(llm, [prompt[: load.block] for prompt in _prompts(llm, load)[:2]], 4)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def _timed(llm: Any, load: Load) -> dict[str, Any]:
    from kvsieve.engines.vllm.metrics import TALLY

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool, preempt = scheduler.kv_cache_manager.block_pool, scheduler._preempt_request
    preempted: list[str] = []

    def counted(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    _submit(llm, _prompts(llm, load), load.output)
    running: list[int] = []
    free: list[int] = []
    tokens = 0
    before = TALLY.to_dict()
    start = time.perf_counter()
    while engine.has_unfinished_requests():
        for out in engine.step():
            tokens += len(out.outputs[0].token_ids) if out.finished else 0
        running.append(len(scheduler.running))
        free.append(pool.get_num_free_blocks())
    seconds = time.perf_counter() - start
    after = TALLY.to_dict()
    return {
        "steps": len(running),
        "preemptions": len(preempted),
        "mean_running": sum(running) / len(running),
        "most_running": max(running),
        "least_free_blocks": min(free),
        "output_tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "compactions": after["compactions"] - before["compactions"],
        "compaction_seconds": after["seconds"] - before["seconds"],
        "blocks_freed": after["blocks_freed"] - before["blocks_freed"],
        "side_bytes": after["side_bytes"],
    }


def _submit(llm: Any, prompts: Sequence[list[int]], tokens: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        llm.llm_engine.add_request(f"{number}-{tokens}", {"prompt_token_ids": prompt}, params)


def _prompts(llm: Any, load: Load) -> list[list[int]]:
    size = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    r = random.Random(0)
    return [[r.randrange(3, size) for _ in range(load.prompt)] for _ in range(load.requests)]


if __name__ == "__main__":
    main()
