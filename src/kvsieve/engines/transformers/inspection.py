"""What kvsieve needs to know about a Transformers model, found out before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kvsieve.compose import Recipe
from kvsieve.errors import EngineError, UnsupportedSignal
from kvsieve.interfaces import Signal
from kvsieve.statistics import Identity
from kvsieve.step import LayerInfo, Rotary
from kvsieve.store.rope import rotate

_FIXED_ROTATIONS = {"default", "linear", "llama3", "yarn", "proportional"}


class ModelView:
    """A causal language model as kvsieve sees it.

    Raises:
        EngineError: not a causal decoder of Transformers, compiled, or without layers that can be
            compressed.
    """

    def __init__(self, model: Any) -> None:
        _refuse_other_models(model)
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.decoder: nn.Module = model.get_decoder()
        self.types = _layer_types(self.config)
        self.compressible = [i for i, kind in enumerate(self.types) if kind == "full_attention"]
        if not self.compressible:
            raise EngineError(
                f"{type(model).__name__} has no full-attention layer with a growing cache (its "
                f"layers: {', '.join(sorted(set(self.types)))}); there is nothing to compress."
            )
        self.modules = _attention_modules(self.decoder)
        self.latent = getattr(self.config, "kv_lora_rank", None) is not None

    def layer_infos(self) -> list[LayerInfo]:
        """Return one description per compressible layer, in order."""
        geometry = self._geometry()
        return [
            LayerInfo(
                ordinal=ordinal,
                **geometry,
                output_projection=self._projection(index),
                rotary=None if self.latent else _rotary(self, index),
            )
            for ordinal, index in enumerate(self.compressible)
        ]

    def _geometry(self) -> dict[str, Any]:
        """Return what layer infos say of sizes and bytes; nothing for latents."""
        if self.latent:
            return {}
        config = self.config
        Hq = config.num_attention_heads
        D = getattr(config, "head_dim", None) or config.hidden_size // Hq
        heads = getattr(config, "num_key_value_heads", None) or Hq
        vector = D * self.model.dtype.itemsize
        return {
            "heads": heads,
            "pair_bytes": 2 * vector,
            "query_bytes": Hq * vector,
            "sizes": (D, D),
        }

    def _projection(self, index: int) -> Callable[[], Tensor] | None:
        module = self.modules.get(index)
        matrix = getattr(getattr(module, "o_proj", None), "weight", None)
        if self.latent or matrix is None or not matrix.is_floating_point():
            return None
        Hq = self.config.num_attention_heads
        H = getattr(self.config, "num_key_value_heads", None) or Hq

        def projection() -> Tensor:
            C = matrix.shape[0]
            return matrix.T.reshape(H, Hq // H, -1, C)  # [H, G, Dv, C]

        return projection

    def identity(self) -> Identity:
        """Return what tells this model from others.

        Raises:
            EngineError: its weights can't be read.
        """
        heads = self._geometry().get("heads")
        assert heads is not None, "statistics are refused for latents before"
        Hq = self.config.num_attention_heads
        D = getattr(self.config, "head_dim", None) or self.config.hidden_size // Hq
        return Identity(
            architecture=self.config.model_type,
            layers=len(self.compressible),
            heads=heads,
            group=Hq // heads,
            head_dim=D,
            sample=self._weight_sample(),
        )

    def _weight_sample(self) -> Tensor:
        """Pick a few numbers from each attention weight, and from each vector such as a norm's."""
        attention = [p for _, m in sorted(self.modules.items()) for p in m.parameters()]
        vectors = [p for p in self.decoder.parameters() if p.dim() == 1]
        known = {id(p): p for p in [*attention, *vectors] if p.is_floating_point()}
        if not known or any(p.is_meta for p in known.values()):
            raise EngineError(
                f"The weights of {type(self.model).__name__} can't be read (offloaded?), so that "
                "it can't be told whether statistics belong to it."
            )
        picked = []
        for weight in known.values():
            flat = weight.detach().reshape(-1)
            places = torch.linspace(0, flat.numel() - 1, 8).long()
            picked.append(flat[places.to(flat.device)].float().cpu())
        return torch.cat(picked)

    def check(self, recipe: Recipe) -> None:
        """Check that this model can show what the recipe needs.

        Raises:
            UnsupportedSignal: it can't; says which signal and why. Or statistics are missing, or
                those of another model.
            BudgetError: bytes that don't hold one slot in each head of one row.
        """
        infos = self.layer_infos()
        reasons: dict[Signal, str] = {}
        if self.latent:
            reasons[Signal.VALUES] = "it caches latents, not values"
            reasons[Signal.BEFORE_ATTEND] = "it expands what it caches before it attends"
            reasons[Signal.STATISTICS] = "it caches latents, which can't be calibrated"
        if any(info.output_projection is None for info in infos):
            reasons[Signal.W_O] = "its attention shows no output matrix in floating point"
        if any(info.rotary is None for info in infos):
            reasons[Signal.PRE_ROPE] = "its rotary positions can't be undone (or it caches latents)"
            reasons[Signal.REROTATION] = (
                "it has no rotary positions, or such as can't be undone (or it caches latents)"
            )
        if len(self.compressible) < len(self.types):
            reasons[Signal.REPLAY] = (
                "it has sliding or recurrent layers, which a replay would change"
            )
        for signal in sorted(recipe.needs & reasons.keys(), key=lambda s: s.value):
            raise UnsupportedSignal(
                f"Method {recipe.method!r} needs {signal.value}, which {type(self.model).__name__} "
                f"can't show: {reasons[signal]}. `kvsieve methods` lists what each method needs."
            )
        recipe.check_statistics()
        if Signal.STATISTICS in recipe.needs and recipe.statistics is not None:
            recipe.statistics.check(self.identity())


def _refuse_other_models(model: Any) -> None:
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or (
        getattr(model, "_compiled_call_impl", None) is not None
    ):
        raise EngineError(
            "The model is compiled with torch.compile, which would freeze table sizes. "
            "Pass the model as it was before compiling."
        )
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise EngineError(
            f"{type(model).__name__} is not a Transformers model that generates text. "
            "Load one with AutoModelForCausalLM.from_pretrained."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise EngineError(
            f"{type(model).__name__} is an encoder-decoder; kvsieve compresses decoder-only models."
        )
    # In older releases, hybrid models keep a cache of their own class, of which nothing is known.
    default = getattr(model, "_supports_default_dynamic_cache", None)
    if default is not None and not default():
        raise EngineError(
            f"{type(model).__name__} keeps its own kind of cache instead of the default one, in "
            "this release of Transformers. Hybrid models can be compressed from the release on "
            "in which they share the default cache: upgrade Transformers."
        )


def _layer_types(config: Any) -> list[str]:
    """Return each layer's cache type, as the stock cache would choose it."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=config).layers
    kinds = getattr(config, "layer_types", None) or []
    return [
        # In older releases, linear layers too get a plain layer of their own class's making.
        "full_attention"
        if type(layer) is DynamicLayer and (i >= len(kinds) or kinds[i] == "full_attention")
        else (kinds[i] if i < len(kinds) else type(layer).__name__)
        for i, layer in enumerate(layers)
    ]


def _attention_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    found: dict[int, nn.Module] = {}
    for module in decoder.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "o_proj"):
            found[index] = module
    return found


def _rotary(view: ModelView, index: int) -> Rotary | None:
    """Return the layer's rotation tables, or None where they can't be undone."""
    table, module = getattr(view.decoder, "rotary_emb", None), view.modules.get(index)
    if table is None or module is None:
        return None
    by_type = "layer_type" in inspect.signature(table.forward).parameters
    kind = getattr(table, "rope_type", "default")
    if isinstance(kind, dict):
        kind = kind.get(view.types[index], "default")
    if kind not in _FIXED_ROTATIONS:
        return None

    def tables(positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        extra = (view.types[index],) if by_type else ()
        flat = positions.reshape(1, -1)
        cos, sin = table(like, flat, *extra)
        shape = (*positions.shape, cos.shape[-1])
        return cos.reshape(shape), sin.reshape(shape)

    layout = _layout(inspect.getmodule(type(module)), tables, view)
    if layout is None:
        return None
    return tables if layout == "halves" else _doubled(tables)


def _doubled(tables: Rotary) -> Rotary:
    def doubled(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = tables(positions)
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)

    return doubled


def _layout(modelling: Any, tables: Rotary, view: ModelView) -> str | None:
    """Find out, by trying the model's own function, which rotation layout it uses."""
    apply = getattr(modelling, "apply_rotary_pos_emb", None)
    if apply is None:
        return None
    config = view.config
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    device = next(view.decoder.parameters()).device
    if device.type == "meta":
        return None
    positions = torch.arange(3, 6, device=device)[None]
    x = _probe(D).to(device)
    cos, sin = tables(positions)
    if cos.shape[-1] > D:
        return None
    theirs = apply(x, x, cos, sin)[0]
    if theirs.shape == x.shape and torch.allclose(theirs, rotate(x, cos, sin), atol=1e-5):
        return "halves"
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    if cos.shape[-1] <= D and torch.allclose(theirs, rotate(x, cos, sin), atol=1e-5):
        return "single"
    return None


@cache
def _probe(D: int) -> Tensor:
    return torch.randn(1, 1, 3, D, generator=torch.Generator().manual_seed(0))
