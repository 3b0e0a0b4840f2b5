"""Public benchmarks through lm-evaluation-harness (extra ``harness``), under any recipe."""
