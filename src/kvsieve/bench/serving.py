"""Serving measured: methods in vLLM with an equal pool of blocks, one process after another.

``serving_process`` is the process that serves once. Steps and preemptions are counted in the
scheduler, and don't depend on what else the machine does; seconds do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from kvsieve.bench import rows
from kvsieve.bench.elsewhere import answered, vllm_version
from kvsieve.bench.rows import Row

KIND, VERSION = "serve", 2

IDENTITY = (
    *("kind", "version", "engine", "method", "config", "model", "load", "kv_blocks"),
    *("block", "chunk", "dtype", "device", "threads", "round", "cpu", "versions"),
    "commit",
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is served: random prompts, all sent at once.

    ``load``: "16x200+600" is 16 prompts of 200 tokens with answers of 600; commas join several,
    which are sent in turns. ``kv_blocks``: blocks of the pool, vLLM's null block included;
    ``chunk``: most tokens in one step; ``model``: a folder or name.

    Raises:
        ValueError: a load that can't be read.
    """

    model: str
    load: str
    kv_blocks: int
    block: int = 32
    chunk: int = 2048
    dtype: str = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> list[tuple[int, int, int]]:
        """Return ``(requests, tokens of prompt, tokens of answer)`` of each part of the load."""
        found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", part.strip())
                 for part in self.load.split(",")]  # fmt: skip
        if None in found:
            raise ValueError(f"{self.load!r} is no load. Give REQUESTSxPROMPT+ANSWER: 16x200+600.")
        return [(int(m[1]), int(m[2]), int(m[3])) for m in found if m]

    def sizes(self) -> list[tuple[int, int]]:
        """Return every request's tokens of prompt and answer, the parts in turns."""
        columns = [[(prompt, answer)] * count for count, prompt, answer in self.parts()]
        return [size for turn in zip_longest(*columns) for size in turn if size is not None]

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(prompt + answer for prompt, answer in self.sizes())


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
                asked = {"load": asdict(load), "config": config}
                yield row | answered("kvsieve.bench.serving_process", asked, load.threads)


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
        "versions": rows.versions() | {"vllm": vllm_version()},
        "commit": rows.commit(),
    }
