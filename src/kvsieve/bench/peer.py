"""Time kvpress, or let it answer, in an environment of its own; talks to ``remote.py`` in JSON
lines.

Stands alone: it runs under another Python, where kvsieve is not installed. A request is
``{"do": name, ...}`` on stdin, the answer one line on stdout.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch


def press_of(method: str, ratio: float) -> Any:
    """Return kvpress's press of that name, set as kvsieve's default."""
    k: Any = import_module("kvpress")
    window = {"window_size": 32, "kernel_size": 5}

    def scored(name: str, **options: Any) -> Any:
        return getattr(k, name)(compression_ratio=ratio, **options)

    presses = {
        "adakv": lambda: k.AdaKVPress(scored("SnapKVPress", **window)),
        "chunkkv": lambda: k.ChunkKVPress(scored("SnapKVPress", **window), chunk_length=20),
        "compactor": lambda: scored("CompactorPress", blending=0.35),
        "criticalkv": lambda: k.CriticalKVPress(scored("SnapKVPress", **window)),
        "cur": lambda: scored("CURPress"),
        "expected-attention": lambda: k.AdaKVPress(scored("ExpectedAttentionPress", epsilon=0.01)),
        "keydiff": lambda: scored("KeyDiffPress"),
        "knorm": lambda: scored("KnormPress"),
        "kvzip": lambda: scored("KVzipPress"),
        "lagkv": lambda: scored("LagKVPress", n_sink=4, lag_size=128),
        "leverage": lambda: scored("LeverageScorePress", sketch_dimension=48),
        "pyramidkv": lambda: scored("PyramidKVPress", **window),
        "random": lambda: scored("RandomPress"),
        "snapkv": lambda: scored("SnapKVPress", **window),
        "streaming-llm": lambda: scored("StreamingLLMPress", n_sink=4),
        "tova": lambda: scored("TOVAPress"),
    }
    if method not in presses:
        raise LookupError(f"kvpress has no {method!r} to compare with here.")
    return presses[method]()


class Peer:
    """The state between requests: a model, a prompt, a press and its cache."""

    def model(self, config: dict[str, Any], dtype: str, device: str, seed: int) -> dict[str, Any]:
        """Build the model."""
        transformers: Any = import_module("transformers")
        self.close()
        torch.manual_seed(seed)
        built = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config))
        self.device = torch.device(device)
        self.built = built.to(device=self.device, dtype=getattr(torch, dtype)).eval()
        return {}

    def open(self, folder: str, dtype: str, device: str) -> dict[str, Any]:
        """Load a model from its folder; answer with the token ids that end its answers."""
        transformers: Any = import_module("transformers")
        self.close()
        self.device = torch.device(device)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        self.built = loaded.to(self.device).eval()
        ends = self.built.generation_config.eos_token_id
        return {"ends": ends if isinstance(ends, list) else [ends]}

    @torch.no_grad()  # kvzip reads a second time when its press is left
    def answer(
        self,
        prompt: list[int],
        read: int,
        method: str | None,
        slots: int,
        limit: int,
        ends: list[int],
        seed: int,
        interval: int | None = None,
    ) -> dict[str, Any]:
        """Read ``prompt[:read]`` under the press, then the rest without, and answer greedily.

        ``method`` None: no press. ``interval``: read without, and cut to ``slots`` after so many
        tokens of the answer, again and again. The rest is fed token by token: layers may hold
        unequal numbers of slots, and one mask for all of them would let questions look ahead.
        """
        transformers: Any = import_module("transformers")
        self.close()
        torch.manual_seed(seed)  # some presses draw numbers
        self.cache = transformers.DynamicCache(config=self.built.config)
        ids = torch.tensor([prompt], device=self.device)
        self.position = read
        press, reading, writing = self._presses(method, slots, read, interval)
        with reading:
            self.token, prefill = self.forward(ids[:, :read], None)
        for place in range(read, len(prompt)):
            prefill += self._next(ids[:, place : place + 1])
        tokens, decode = [self.token.item()], 0.0
        with writing:
            while len(tokens) < limit and tokens[-1] not in ends:
                decode += self._next(self.token)
                tokens.append(self.token.item())
        seconds = {"prefill": prefill, "decode": decode}
        return {"tokens": tokens, "seconds": seconds, "press": _settings(press), **self.bytes()}

    def _presses(self, method: str | None, slots: int, read: int, interval: int | None) -> Any:
        """Return a press, and what to read and to write under."""
        nothing = contextlib.nullcontext()
        if method is None:
            return None, nothing, nothing
        if interval is not None:
            kvpress: Any = import_module("kvpress")
            press = kvpress.DecodingPress(press_of(method, 0.0), interval, slots)
            return press, nothing, press(self.built)
        # kvpress keeps int(length * (1 - ratio)) slots.
        press = press_of(method, max(0.0, 1 - (slots + 0.1) / read))
        return press, press(self.built), nothing

    def _next(self, token: torch.Tensor) -> float:
        """Feed a token ``[1, 1]`` at the next position; return the seconds."""
        here = torch.full_like(token, self.position)
        self.token, spent = self.forward(token, here)
        self.position += 1
        return spent

    def prefill(
        self, prompt: list[list[int]], method: str, slots: int, interval: int | None
    ) -> dict[str, Any]:
        """Read the prompt under the press; ``interval``: compress while decoding, too."""
        kvpress: Any = import_module("kvpress")
        transformers: Any = import_module("transformers")
        self.close()
        ids = torch.tensor(prompt, device=self.device)
        self.position, self.count, self.interval = ids.shape[1], 0, interval
        # kvpress keeps int(length * (1 - ratio)) slots.
        press = press_of(method, 1 - (slots + 0.1) / ids.shape[1])
        if interval is not None:
            later = kvpress.DecodingPress(press_of(method, 0.0), interval, slots)
            press = kvpress.PrefillDecodingPress(press, later)
        self.cache = transformers.DynamicCache(config=self.built.config)
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(press(self.built))
        gc.collect()
        self.token, seconds = self.forward(ids, None)
        if interval is None:
            self.stack.close()  # as kvpress's own pipeline does
        return {"seconds": seconds}

    def steps(self, count: int) -> dict[str, Any]:
        """Decode."""
        gc.collect()
        gc.disable()
        seconds, events = [], []
        for _ in range(count):
            here = torch.full_like(self.token[:1], self.position)
            self.token, spent = self.forward(self.token, here)
            self.position, self.count = self.position + 1, self.count + 1
            seconds.append(spent)
            events.append(self.interval is not None and self.count % self.interval == 0)
        gc.enable()
        return {"seconds": seconds, "events": events}

    def bytes(self) -> dict[str, Any]:
        """Measure the cache's storages."""
        tensors = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return {"bytes_kept": sum(storages.values())}

    def close(self) -> dict[str, Any]:
        """Forget the cache and leave the press."""
        if hasattr(self, "stack"):
            self.stack.close()
        self.cache: Any = None
        return {}

    def threads(self, count: int) -> dict[str, Any]:
        """Set the threads; answer with the versions here."""
        torch.set_num_threads(count)
        names = ("kvpress", "torch", "transformers")
        return {"python": sys.version.split()[0], **{name: version(name) for name in names}}

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, positions: torch.Tensor | None) -> Any:
        """Run tokens; return the greedy ones and the seconds."""
        self.drain()
        start = time.perf_counter()
        out = self.built(
            input_ids=ids,
            past_key_values=self.cache,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        token = out.logits[:, -1:].argmax(-1)
        self.drain()
        return token, time.perf_counter() - start

    def drain(self) -> None:
        """Wait for a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _settings(press: Any) -> str | None:
    """Return a press's name and settings, without the ratio, which the length decides."""
    if press is None:
        return None
    found = {n: x for n, x in vars(press).items() if n[0] != "_" and n != "compression_ratio"}
    if "press" in found:
        found["press"] = _settings(found["press"])
    return f"{type(press).__name__}({', '.join(f'{n}={x}' for n, x in found.items())})"


def main() -> None:
    """Answer requests until stdin ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not disturb
    peer = Peer()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(peer, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
