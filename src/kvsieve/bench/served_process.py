# pyright: reportMissingImports=false
"""The process in which vLLM answers the prompts of ``kvsieve.bench.served``, all at once."""

from __future__ import annotations

from typing import Any

from kvsieve.bench.elsewhere import answer
from kvsieve.bench.serving_process import Steps


def serve(asked: dict[str, Any]) -> dict[str, Any]:
    """Answer ``prompts`` greedily, up to ``lengths`` tokens each; return the tokens."""
    from vllm import LLM, SamplingParams

    from kvsieve.engines.vllm.metrics import TALLY

    prompts, lengths, config = asked["prompts"], asked["lengths"], asked["config"]
    longest = max(len(p) + n for p, n in zip(prompts, lengths, strict=True))
    llm = LLM(
        model=asked["model"],
        dtype="float32",
        block_size=asked["block"],
        max_model_len=longest,
        max_num_seqs=len(prompts),
        num_gpu_blocks_override=asked["kv_blocks"],
        enforce_eager=True,
        enable_prefix_caching=False,
        additional_config={} if config is None else {"kvsieve": config},
    )
    steps = Steps(llm.llm_engine.engine_core.engine_core.scheduler)  # type: ignore[attr-defined]
    out = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [SamplingParams(temperature=0, max_tokens=length) for length in lengths],
        use_tqdm=False,
    )
    return {
        "tokens": [list(one.outputs[0].token_ids) for one in out],
        "compactions": TALLY.compactions,
        "preemptions": steps.preempted,
    }


if __name__ == "__main__":
    answer(serve)
