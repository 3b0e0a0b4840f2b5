"""Make golden vectors by running the presses of NVIDIA/kvpress on tiny random models.

Run in the peer environment (``requirements.txt``)::

    .venv-peer/bin/python tests/peers/make_kvpress_vectors.py

Every press runs as its users run it, inside ``with press(model)`` around one prefill; what it
returned from ``score`` and what it left in the cache (or marked as masked) is written to
``vectors/``, next to the tensors it had seen. What each tensor means and what each press computes
is in ``vectors/README.md``.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kvpress
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SEED = 9
MARGIN = 2e-5  # relative
B, S = 2, 96
SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
H, D = SHAPE["num_key_value_heads"], SHAPE["head_dim"]
G = SHAPE["num_attention_heads"] // H
SNAP: dict[str, Any] = {"window_size": 16, "kernel_size": 5}
KIND = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def snapkv(ratio: float) -> kvpress.SnapKVPress:
    """SnapKV with a window that fits 96 tokens."""
    return kvpress.SnapKVPress(compression_ratio=ratio, **SNAP)


def expected(**options: Any) -> kvpress.ExpectedAttentionPress:
    """Expected attention at one half."""
    return kvpress.ExpectedAttentionPress(compression_ratio=0.5, **options)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One press to run, as a factory (presses keep state), and how it has to be run."""

    press: Callable[[], Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    eager: bool = False
    one_by_one: bool = False


def case(press: Callable[..., Any], ratio: float = 0.5, **parameters: Any) -> Case:
    """A case whose parameters are the press's own."""
    given = {"compression_ratio": ratio, **parameters}
    return Case(press=lambda: press(**given), parameters=given)


def expected_case(**options: Any) -> Case:
    """A case of expected attention, its defaults written out."""
    defaults = {"n_future_positions": 512, "n_sink": 4, "use_covariance": True}
    given = {**defaults, "use_vnorm": True, "epsilon": 0.0, **options}
    return Case(press=lambda: expected(**given), parameters={"compression_ratio": 0.5, **given})


def compactor_case(blending: float) -> Case:
    """A case of Compactor, row by row: the peer standardises over the whole batch.

    Chunks of 28 divide the 84 tokens between sinks and end, so that none is padded.
    """
    given = {"sink_size_start": 8, "sink_size_end": 4, "chunk_size": 28, "sketch_dimension": 48}
    given |= {"compression_ratio": 0.5, "blending": blending}

    def press() -> Any:
        made = kvpress.CompactorPress(**given)
        inner = made._leverage_press.compute_leverage_scores

        def seeded(*args: Any) -> Tensor:
            torch.manual_seed(SEED)
            return inner(*args)

        made._leverage_press.compute_leverage_scores = seeded
        return made

    return Case(press=press, parameters=given, one_by_one=True)


def peer_sketch(columns: int) -> Tensor:
    """The sketch [H, D, columns] that Compactor draws for every layer and row of one."""
    torch.manual_seed(SEED)
    return torch.randn(1, H, D, columns)[0] / columns**0.5


def wrapped(outer: Callable[..., Any], base: str, ratio: float, **parameters: Any) -> Case:
    """A case of a press over another press, ``base`` being snapkv or knorm."""
    inner = snapkv if base == "snapkv" else lambda r: kvpress.KnormPress(compression_ratio=r)
    given = {"press": base, "compression_ratio": ratio, **(SNAP if base == "snapkv" else {})}
    return Case(
        press=lambda: outer(press=inner(ratio), **parameters),
        parameters={**given, **parameters},
        one_by_one=outer in (kvpress.CriticalAdaKVPress, kvpress.ChunkKVPress),
    )


ADA: dict[str, Any] = {"alpha_safeguard": 0.2}
CRITICAL: dict[str, Any] = {"epsilon": 1e-4, "first_stage_ratio": 0.5}
CASES: dict[str, Case] = {
    "knorm": case(kvpress.KnormPress),
    "streaming_llm": case(kvpress.StreamingLLMPress, n_sink=4),
    "observed_attention": Case(
        press=lambda: kvpress.ObservedAttentionPress(compression_ratio=0.5),
        parameters={"compression_ratio": 0.5},
        eager=True,
    ),
    "tova": case(kvpress.TOVAPress),
    "snapkv": case(kvpress.SnapKVPress, **SNAP),
    "keydiff": case(kvpress.KeyDiffPress),
    "expected": expected_case(),
    "expected_eps": expected_case(epsilon=1e-2),
    "expected_nocov": expected_case(use_covariance=False),
    "expected_novnorm": expected_case(use_vnorm=False),
    "expected_nocov_novnorm": expected_case(use_covariance=False, use_vnorm=False),
    "expected_one_future": expected_case(n_future_positions=1),
    "adakv_snapkv": wrapped(kvpress.AdaKVPress, "snapkv", 0.5, **ADA),
    "adakv_snapkv_75": wrapped(kvpress.AdaKVPress, "snapkv", 0.75, **ADA),
    "adakv_knorm": wrapped(kvpress.AdaKVPress, "knorm", 0.5, **ADA),
    "adakv_knorm_75": wrapped(kvpress.AdaKVPress, "knorm", 0.75, **ADA),
    "criticalkv_snapkv": wrapped(kvpress.CriticalKVPress, "snapkv", 0.5, **CRITICAL),
    "criticalkv_snapkv_75": wrapped(kvpress.CriticalKVPress, "snapkv", 0.75, **CRITICAL),
    "critical_adakv_snapkv": wrapped(kvpress.CriticalAdaKVPress, "snapkv", 0.5, **ADA, **CRITICAL),
    "critical_adakv_snapkv_75": wrapped(
        kvpress.CriticalAdaKVPress, "snapkv", 0.75, **ADA, **CRITICAL
    ),
    "lagkv": case(kvpress.LagKVPress, n_sink=4, lag_size=16, cross_scoring=False),
    "lagkv_cross": case(kvpress.LagKVPress, n_sink=4, lag_size=16, cross_scoring=True),
    "lagkv_short": case(kvpress.LagKVPress, n_sink=4, lag_size=128, cross_scoring=False),
    "cur": case(kvpress.CURPress, num_sinks=4, leverage_type="kv_product", local_window_size=16),
    "cur_ragged": case(
        kvpress.CURPress, num_sinks=4, leverage_type="kv_product", local_window_size=20
    ),
    "chunkkv_knorm": wrapped(kvpress.ChunkKVPress, "knorm", 0.5, chunk_length=20),
    "chunkkv_knorm_75": wrapped(kvpress.ChunkKVPress, "knorm", 0.75, chunk_length=8),
    "chunkkv_snapkv": wrapped(kvpress.ChunkKVPress, "snapkv", 0.5, chunk_length=16),
    "compactor": compactor_case(0.35),
    "compactor_attention": compactor_case(0.0),
    "cur_avg_global": case(
        kvpress.CURPress, num_sinks=4, leverage_type="kv_avg", use_local_approximation=False
    ),
}
PYRAMIDS: list[dict[str, Any]] = [
    {"compression_ratio": 0.5, "window_size": 16, "kernel_size": 5, "beta": 20},
    {"compression_ratio": 0.7, "window_size": 16, "kernel_size": 5, "beta": 20},
    {"compression_ratio": 0.5, "window_size": 4, "kernel_size": 5, "beta": 2},
    {"compression_ratio": 0.5, "window_size": 4, "kernel_size": 5, "beta": 20},
    {"compression_ratio": 0.7, "window_size": 4, "kernel_size": 5, "beta": 5},
]
THRESHOLDS: list[tuple[str, float, int]] = [
    ("knorm", -4.7, 16),
    ("knorm", -4.9, 1),
    ("keydiff", -0.3, 16),
    ("keydiff", 0.1, 40),
]
TEMPLATE = (
    "<|system|>\nanswer the question\n<|user|>\n{{ messages[0]['content'] }}<|end|>\n<|assistant|>"
)
WORDS = (
    "Repeat the previous context exactly part of starting with answer question . , "
    "<|system|> <|user|> <|end|> <|assistant|> <unk>"
).split()


def build(kind: str, layers: int) -> PreTrainedModel:
    """A tiny random model, its norm weights random too, so that leaving one out shows."""
    torch.manual_seed(SEED)
    config_type, model_type = KIND[kind]
    model = model_type(config_type(num_hidden_layers=layers, **SHAPE)).eval().float()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    return model


def prompt(batch: int) -> Tensor:
    """Token ids [B, S], none twice in a row: equal tokens have keys of equal norm in layer 0."""
    generator = torch.Generator().manual_seed(SEED)
    rows = [torch.randperm(SHAPE["vocab_size"], generator=generator)[:S] for _ in range(batch)]
    return torch.stack(rows)


@dataclass
class Seen:
    """What the layers' attention saw, one entry per call and layer."""

    calls: list[dict[str, Tensor]] = field(default_factory=list)

    @contextmanager
    def watch(self, model: PreTrainedModel) -> Iterator[None]:
        """Note queries, keys, values and layer inputs while the block runs (sdpa only)."""
        inner = ALL_ATTENTION_FUNCTIONS["sdpa"]
        hidden: dict[int, Tensor] = {}

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden[module.layer_idx] = kwargs["hidden_states"].clone()

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *a, **k) -> Any:
            entry = {"query": query, "key": key, "value": value}
            entry["hidden"] = hidden[module.layer_idx]
            self.calls.append({name: tensor.clone() for name, tensor in entry.items()})
            return inner(module, query, key, value, *a, **k)

        hooks = [
            layer.self_attn.register_forward_pre_hook(before, with_kwargs=True)
            for layer in model.model.layers
        ]
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = inner
            for hook in hooks:
                hook.remove()


def grouped(query: Tensor) -> Tensor:
    """[B, H*G, T, D] -> [B, H, G, T, D]."""
    batch, _, length, dim = query.shape
    return query.reshape(batch, H, G, length, dim)


def tap(press: Any) -> list[Tensor]:
    """Let ``press.score`` leave a copy of every answer; later in-place changes do not reach it."""
    answers: list[Tensor] = []
    score = press.score

    def tapped(*args: Any, **kwargs: Any) -> Tensor:
        result = score(*args, **kwargs)
        answers.append(result.detach().clone())
        return result

    press.score = tapped
    return answers


def kept_mask(keys: Tensor, left: Tensor) -> Tensor:
    """Which keys [B, H, S, D] are still in the cache, as [B, H, S]."""
    same = (keys.unsqueeze(3) == left.unsqueeze(2)).all(-1)
    mask = same.any(-1)
    if not (mask.sum(-1) == left.shape[2]).all():
        raise SystemExit("equal keys: the kept set cannot be read from the cache")
    return mask


def unmasked(module: nn.Module, batch: int) -> Tensor:
    """The complement of the peer's masked positions, as [B, H, S]."""
    mask = torch.ones(batch, H, S, dtype=torch.bool)
    mask[module.masked_key_indices] = False
    return mask


@torch.no_grad()
def run(model: PreTrainedModel, press: Any, ids: Tensor, full: list[Tensor]) -> dict[str, Tensor]:
    """Prefill under a press; scores, the wrapped press's scores and kept sets, [L, B, H, S]."""
    taps = {"score": tap(press)} if hasattr(press, "score") else {}
    if hasattr(press, "press"):
        taps["base_score"] = tap(press.press)
    cache = DynamicCache()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    with press(model):
        model.model(input_ids=ids, past_key_values=cache)
    kept = []
    for index, layer in enumerate(model.model.layers):
        if layer.self_attn.masked_key_indices is not None:
            kept.append(unmasked(layer.self_attn, len(ids)))
        else:
            kept.append(kept_mask(full[index], cache.layers[index].keys))
    out = {name: torch.stack(answers) for name, answers in taps.items()}
    return {**out, "kept": torch.stack(kept)}


def chunk_means(score: Tensor, length: int) -> Tensor:
    """Give each slot of ``score [L, B, H, S]`` the mean of its chunk, summed over heads."""
    chunks = [x.mean(-1, keepdim=True).expand_as(x) for x in score.sum(2).split(length, -1)]
    return torch.cat(chunks, -1)[:, :, None].expand(score.shape)


def check_margin(name: str, out: dict[str, Tensor], chunk: int | None = None) -> None:
    """Refuse vectors in which rounding could move a slot over the line (CriticalKV aside)."""
    if name.startswith("critical"):
        return
    shape = out["kept"].shape
    base = out.get("base_score")
    if base is not None and chunk is not None:
        base = chunk_means(base, chunk)
    score = (out["score"] if base is None else base.reshape(*shape[:2], -1)).double()
    kept = out["kept"].reshape(score.shape)
    line = score.masked_fill(kept, -torch.inf).amax(-1, keepdim=True)
    gap = ((score - line).abs() / line.abs()).masked_fill(~kept, torch.inf).min().item()
    if gap < MARGIN:
        raise SystemExit(f"{name}: a kept score within {gap:.1e} of a dropped one; change SEED")


def run_case(model: PreTrainedModel, what: Case, ids: Tensor, full: list[Tensor]) -> dict:
    """Run one case; row by row where the peer mixes up the rows of a batch."""
    model.set_attn_implementation("eager" if what.eager else "sdpa")
    if what.one_by_one:
        rows = [
            run(model, what.press(), ids[b : b + 1], [k[b : b + 1] for k in full])
            for b in range(len(ids))
        ]
        out = {name: torch.cat([row[name] for row in rows], dim=1) for name in rows[0]}
    elif what.eager:  # other kernels: the keys in the cache differ in the last bits
        eager_keys = prefill(model, ids)
        out = run(model, what.press(), ids, eager_keys)
    else:
        out = run(model, what.press(), ids, full)
    model.set_attn_implementation("sdpa")
    return out


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The uncompressed keys of each layer."""
    cache = DynamicCache()
    model.model(input_ids=ids, past_key_values=cache)
    return [layer.keys for layer in cache.layers]


def layer_inputs(model: PreTrainedModel, ids: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What each layer saw, with the weights that scorers may ask for."""
    seen = Seen()
    with seen.watch(model):
        keys = prefill(model, ids)
    out = {"ids": ids, "inv_freq": model.model.rotary_emb.inv_freq.clone()}
    for index, (layer, call) in enumerate(zip(model.model.layers, seen.calls, strict=True)):
        attention, name = layer.self_attn, f"layer{index}"
        out[f"{name}.query"] = grouped(call["query"])
        for key in ("key", "value", "hidden"):
            out[f"{name}.{key}"] = call[key]
        out[f"{name}.w_o"] = attention.o_proj.weight.data.clone()
        out[f"{name}.w_q"] = attention.q_proj.weight.data.clone()
        if hasattr(attention, "q_norm"):
            out[f"{name}.q_norm"] = attention.q_norm.weight.data.clone()
    return out, keys


def write(path: Path, tensors: dict[str, Tensor], parameters: dict[str, Any]) -> None:
    """Save with the parameters as a JSON string in the file's header."""
    plain = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    header = {"kvpress": "0.5.5", "seed": SEED, "model": SHAPE, **parameters}
    save_file(plain, path, metadata={"parameters": json.dumps(header)})


def make_scores(kind: str, out: Path) -> None:
    """All score and wrapper presses on a two-layer model."""
    model, ids = build(kind, 2), prompt(B)
    tensors, full = layer_inputs(model, ids)
    for name, what in CASES.items():
        got = run_case(model, what, ids, full)
        check_margin(name, got, what.parameters.get("chunk_length"))
        for key, value in got.items():
            tensors[f"{name}.{key}"] = value
    tensors["compactor.sketch"] = peer_sketch(48)
    config = model.config
    facts = {
        "scaling": model.model.layers[0].self_attn.scaling,
        "rope_theta": config.rope_parameters["rope_theta"],
        "rms_norm_eps": config.rms_norm_eps,
        "cases": {name: what.parameters for name, what in CASES.items()},
    }
    write(out / f"kvpress_{kind}.safetensors", tensors, facts)


def make_pyramid(out: Path) -> None:
    """PyramidKV's budgets need more layers: four, and only scores and kept sets are written."""
    model, ids = build("llama", 4), prompt(B)
    full, tensors = prefill(model, ids), {}
    for index, parameters in enumerate(PYRAMIDS):
        got = run(model, kvpress.PyramidKVPress(**parameters), ids, full)
        check_margin(f"pyramidkv {index}", got)
        tensors[f"case{index}.score"], tensors[f"case{index}.kept"] = got["score"], got["kept"]
        tensors[f"case{index}.lengths"] = got["kept"].sum(-1)[:, 0, 0]
    write(out / "kvpress_pyramidkv.safetensors", tensors, {"cases": PYRAMIDS})


def make_dms(out: Path) -> None:
    """The threshold wrapper (no compression ratio): what it left, [L, B, H, S]; no inputs."""
    bases = {"knorm": kvpress.KnormPress, "keydiff": kvpress.KeyDiffPress}
    tensors = {}
    for kind in KIND:
        model, ids = build(kind, 2), prompt(B)
        full = prefill(model, ids)
        for index, (name, threshold, window) in enumerate(THRESHOLDS):
            press = kvpress.DMSPress(
                press=bases[name](), threshold=threshold, sliding_window_size=window
            )
            got = run(model, press, ids, full)
            near = (got["base_score"] - threshold).abs().min().item()
            if near < MARGIN * abs(threshold):
                raise SystemExit(f"{name} {threshold}: a score is {near:.1e} away")
            tensors[f"{kind}.case{index}.kept"] = got["kept"]
    write(out / "kvpress_dms.safetensors", tensors, {"cases": THRESHOLDS})


def save_tokenizer(folder: str, template: str | None) -> None:
    """A word-level tokenizer that knows the peer's prompts, so that no hub is asked."""
    vocab = {word: index for index, word in enumerate(["\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pattern = Regex(r"<\|\w+\|>|\n|\w+|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(folder)


@torch.no_grad()
def run_kvzip(model: PreTrainedModel, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    """Prefill, replay and compress; what the replay saw per chunk and layer, scores, kept set."""
    press = kvpress.KVzipPress(compression_ratio=0.5, **options)
    seen, out, spans = Seen(), {}, []
    prepare, compress = press.prepare, press.compress_post

    def noted_prepare(*args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
        pairs = prepare(*args, **kwargs)
        start = press.prefix_length
        for index, (chunk, fed) in enumerate(pairs):
            out[f"chunk{index}.fed"] = fed[0]
            spans.append((start, start + chunk.shape[1]))
            start += chunk.shape[1]
        return pairs

    def noted_compress(*args: Any, **kwargs: Any) -> None:
        out["replay_score"] = press.score_val.clone()
        compress(*args, **kwargs)
        out["score"] = press.score_val.clone()

    press.prepare, press.compress_post = noted_prepare, noted_compress
    with seen.watch(model), press(model):
        model.model(input_ids=ids, past_key_values=DynamicCache())
    layers = len(model.model.layers)
    for call, index in zip(seen.calls[:layers], range(layers), strict=True):
        out[f"layer{index}.key"], out[f"layer{index}.value"] = call["key"], call["value"]
    for number, call in enumerate(seen.calls[layers:]):
        name = f"chunk{number // layers}.layer{number % layers}"
        out[f"{name}.query"] = grouped(call["query"])
        out[f"{name}.key"] = call["key"][:, :, S:]
        out[f"{name}.row_norm"] = call["hidden"].norm(dim=-1)
    out["kept"] = torch.stack([unmasked(layer.self_attn, 1) for layer in model.model.layers])
    out["spans"] = torch.tensor(spans)
    return out


def make_kvzip(out: Path) -> None:
    """KVzip with and without a chat template, in one chunk and in three, and its variants."""
    model, ids = build("llama", 2), prompt(1)
    runs: dict[str, tuple[str | None, dict[str, Any]]] = {
        "plain": (None, {}),
        "chat": (TEMPLATE, {"chunk_size": 40}),
        "chat_layerwise": (TEMPLATE, {"chunk_size": 40, "layerwise": True}),
        "chat_plus": (TEMPLATE, {"chunk_size": 40, "kvzip_plus_normalization": True}),
    }
    tensors: dict[str, Tensor] = {"ids": ids}
    for index, layer in enumerate(model.model.layers):
        tensors[f"layer{index}.w_o"] = layer.self_attn.o_proj.weight.data
    for name, (template, options) in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            save_tokenizer(folder, template)
            model.config.name_or_path = folder
            got = run_kvzip(model, ids, **options)
        for key, value in got.items():
            shared = key.startswith("layer")
            if shared or name in ("plain", "chat") or key in ("replay_score", "score", "kept"):
                tensors[key if shared else f"{name}.{key}"] = value
    facts = {"compression_ratio": 0.5, "n_sink": 4, "runs": {k: v[1] for k, v in runs.items()}}
    write(out / "kvpress_kvzip.safetensors", tensors, facts)


def make_model(out: Path) -> None:
    """The tiny Llama's weights: the very model of the two-layer Llama and KVzip vectors."""
    model = build("llama", 2)
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    config = {**SHAPE, "num_hidden_layers": 2, "model_type": "llama"}
    write(out / "tiny_llama.safetensors", state, {"config": config})


def main() -> None:
    """Write all kvpress vectors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vectors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    for kind in KIND:
        make_scores(kind, args.out)
    make_pyramid(args.out)
    make_dms(args.out)
    make_kvzip(args.out)
    make_model(args.out)


if __name__ == "__main__":
    main()
