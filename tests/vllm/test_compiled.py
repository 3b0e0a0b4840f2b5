"""The same under ``torch.compile``: attention is where vLLM cuts the graph, compaction with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

SCRIPT = """
import json, sys
sys.path[:0] = [{tests!r}, {here!r}]
from replaying import replay, watching
from serving import BLOCK, engine, free_blocks, prompts, serve
from test_replay import LENGTHS, configured
from kvsieve import reference
from kvsieve.engines.vllm.effective import effective
from kvsieve.engines.vllm.settings import Settings

config = configured("g-kv", "after-prompt")
settings = Settings.read({{"kvsieve": config}})
made = effective(settings.recipe, BLOCK, settings.policy)
with engine(config, enforce_eager=False, max_num_batched_tokens=256,
            num_gpu_blocks_override=200) as llm:
    whole = free_blocks(llm)
    with watching(llm) as kept:
        run = serve(llm, prompts(LENGTHS), 110)
    leaked = whole - free_blocks(llm)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    compiled = worker.model_runner.model.model.compiled
found = replay(reference.load()[0], made, run.served, kept)
print("RESULT" + json.dumps([compiled, leaked, found.compared, found.events, found.unequal,
                             found.logprob]))
"""


@pytest.mark.slow
@pytest.mark.skipif(which("g++") is None, reason="the compiler's code is compiled by g++")
def test_compiled_models_keep_the_same_slots() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(tests=str(here.parent), here=str(here))],
        env={**os.environ, "TORCHDYNAMO_DISABLE": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    compiled, leaked, compared, events, unequal, logprob = json.loads(line[len("RESULT") :])
    assert compiled and leaked == 0
    assert compared > 500 and events > 0 and unequal == []
    assert logprob <= 2e-4, "compiled code rounds in another order"
