"""Where nothing is evicted, vLLM is what it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import engine, prompts, serve

LENGTHS = [20, 100, 333, 64]

SCRIPT = """
import json, sys
sys.path[:0] = [{tests!r}, {here!r}]
from serving import engine, prompts, serve
with engine(None, dtype={dtype!r}) as llm:
    run = serve(llm, prompts({lengths!r}), 80)
print("RESULT" + json.dumps([[one.tokens, one.logprobs] for one in run.served]))
"""


def without_plugin(dtype: str) -> Any:
    """Serve in a process in which kvsieve's plugin is not loaded."""
    here = Path(__file__).parent
    code = SCRIPT.format(tests=str(here.parent), here=str(here), dtype=dtype, lengths=LENGTHS)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VLLM_PLUGINS": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    return json.loads(line[len("RESULT") :])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_byte_identical_to_stock_vllm(dtype: str) -> None:
    stock = without_plugin(dtype)
    for config in (None, {"method": "full"}, {"method": "g-kv", "budget": 1024}):
        with engine(config, dtype=dtype) as llm:
            run = serve(llm, prompts(LENGTHS), 80)
        assert [[one.tokens, one.logprobs] for one in run.served] == stock, config
