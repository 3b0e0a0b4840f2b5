"""What GPU builders make of a forward, on made-up metadata; and what is refused on GPUs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from paged import caches, fill
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.states import RequestState

import kvsieve
from kvsieve.columns import Columns
from kvsieve.engines.vllm import backend, compat, gpu
from kvsieve.engines.vllm.beside import Request
from kvsieve.engines.vllm.effective import effective
from kvsieve.engines.vllm.gather import TorchMover
from kvsieve.engines.vllm.layer import LayerSieve, Work
from kvsieve.engines.vllm.layouts import Strided
from kvsieve.engines.vllm.metrics import Tally
from kvsieve.engines.vllm.moving import MovingSieve
from kvsieve.engines.vllm.plan import Row, plan
from kvsieve.engines.vllm.refusals import check_config, check_layer
from kvsieve.engines.vllm.runners import RequestsV2, requests_of
from kvsieve.engines.vllm.spec import SieveSpec
from kvsieve.errors import EngineError
from kvsieve.step import LayerInfo

COLUMNS = Columns(block=16, budget=32, interval=16)
PLAIN = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
SIEVED = SieveSpec.of(PLAIN, COLUMNS, 64)
BUILDERS = [gpu.FlashBuilder, gpu.TritonBuilder]


def row(index: int, n0: int, n1: int, prompt: int, start: int) -> Row:
    return Row(index=index, key=str(index), n0=n0, n1=n1, prompt=prompt, start=start)


ROWS = [
    row(0, 70, 71, 40, 0),  # decoding, compacted before
    row(1, 0, 30, 50, 1),  # first part of a prompt
    row(2, 128, 129, 20, 31),  # due after this forward
    row(4, 47, 48, 48, 32),  # not yet compacted, due at the end of its prompt
]
"""Row 3 is padding."""


def metadata(rows: list[Row], width: int = 12, padded: int = 6) -> CommonAttentionMetadata:
    """Return common metadata as a runner makes it, with rows of padding."""
    lengths, counts = torch.zeros(2, padded, dtype=torch.int32)
    for one in rows:
        lengths[one.index], counts[one.index] = one.n1, one.tokens
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)])
    table = torch.arange(padded * width, dtype=torch.int32).view(padded, width)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=padded,
        num_actual_tokens=int(counts.sum()),
        max_query_len=int(counts.max()),
        max_seq_len=int(lengths.max()),
        block_table_tensor=table,
        slot_mapping=torch.zeros(int(counts.sum()), dtype=torch.int64),
        seq_lens_cpu_upper_bound=lengths.clone(),
        req_idx=np.arange(padded)[::-1].copy(),
    )


@pytest.mark.parametrize("policy", ["after-prompt", "chunk"])
def test_narrowed_on_the_device_as_row_by_row(policy: Any) -> None:
    columns = Columns(block=16, budget=32, interval=16, policy=policy)
    made, cam = plan(columns, ROWS), metadata(ROWS)
    before = cam.block_table_tensor.clone()
    wanted, got = backend.narrowed(cam, made), gpu.narrowed(cam, made)
    assert torch.equal(cam.block_table_tensor, before), "vLLM's own table is left alone"
    for name in ("seq_lens", "seq_lens_cpu_upper_bound"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
        assert getattr(got, name).dtype == torch.int32
    assert got.max_seq_len == wanted.max_seq_len
    assert got.block_table_tensor.dtype == torch.int32
    for one, length in zip(made.rows, made.lengths, strict=True):
        own = slice(0, -(-length // 16))
        assert torch.equal(
            got.block_table_tensor[one.index, own], wanted.block_table_tensor[one.index, own]
        )
    assert int(got.seq_lens[0]) < ROWS[0].n1, "something was narrowed"


def test_narrowed_by_hand() -> None:
    cam = metadata([row(0, 70, 71, 40, 0)], width=6, padded=1)
    got = gpu.narrowed(cam, plan(COLUMNS, [row(0, 70, 71, 40, 0)]))
    # 70 // 16 = 4 columns are compacted into 2; the fifth is the one that grows.
    assert got.block_table_tensor[0, :3].tolist() == [0, 1, 4]
    assert got.seq_lens.tolist() == [71 - 2 * 16] and got.max_seq_len == 39


def test_nothing_compacted_is_nothing_changed() -> None:
    rows = [row(0, 0, 30, 50, 0), row(1, 10, 11, 5, 30)]
    cam = metadata(rows)
    assert gpu.narrowed(cam, plan(COLUMNS, rows)) is cam


@pytest.mark.parametrize("builder", BUILDERS)
def test_attention_is_not_captured_under_a_recipe(builder: Any) -> None:
    assert builder.get_cudagraph_support(None, SIEVED) is AttentionCGSupport.NEVER
    theirs = builder.__bases__[1]
    assert theirs in (FlashAttentionMetadataBuilder, TritonAttentionMetadataBuilder)
    assert builder.get_cudagraph_support(None, PLAIN) is theirs.get_cudagraph_support(None, PLAIN)


@pytest.mark.parametrize("builder", BUILDERS)
def test_capture_and_swapped_tables_are_refused(
    builder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(self: Any, spec: Any, names: Any, config: Any, device: Any) -> None:
        self.device = device

    monkeypatch.setattr(builder.__bases__[1], "__init__", init)
    made = builder(SIEVED, ["a"], None, torch.device("cpu"))
    assert made.supports_update_block_table is False
    with pytest.raises(EngineError, match="PIECEWISE"):
        made.build_for_cudagraph_capture(metadata(ROWS))
    plain = builder(PLAIN, ["a"], None, torch.device("cpu"))
    assert plain.supports_update_block_table is builder.supports_update_block_table


@pytest.mark.parametrize("mode", ["FULL", "FULL_DECODE_ONLY"])
def test_full_graphs_are_refused_by_name(mode: str) -> None:
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="auto", enable_prefix_caching=False),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1
        ),
        model_config=SimpleNamespace(
            use_mla=False,
            is_hybrid=False,
            is_encoder_decoder=False,
            runner_type="generate",
            get_total_num_kv_heads=lambda: 4,
        ),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]),
        speculative_config=None,
        kv_transfer_config=None,
    )
    with pytest.raises(EngineError, match="cudagraph_mode"):
        check_config(config)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    check_config(config)


def test_windows_of_gpu_layers_are_seen() -> None:
    check_layer({"sliding_window": (-1, -1)})
    with pytest.raises(EngineError, match="64 tokens"):
        check_layer({"sliding_window": (63, 0)})


class Layer:
    """An attention layer whose writer follows ``order``: 0 keys first, 1 values first."""

    def __init__(self, order: int = 0) -> None:
        [self.kv_cache] = caches(KVCacheLayout.BLNHC, heads=2, size=32)
        self.impl = self
        self.num_kv_heads, self.head_size, self.order = 2, 32, order
        self.sieve = SimpleNamespace(tiles=Strided(32, TorchMover()))

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        halves = cache.transpose(1, 2).split(32, -1)
        for half, new in zip(halves[:: 1 - 2 * self.order], (key, value), strict=True):
            half[slots // 16, slots % 16] = new


def test_a_layout_is_tried_out_before_anything_is_served() -> None:
    right, wrong = Layer(), Layer(order=1)
    gpu.try_out(right)
    assert not bool(right.kv_cache.any()), "zeros are left"
    with pytest.raises(EngineError, match="--attention-backend"):
        gpu.try_out(wrong)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attaching_warns_on_gpus(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = gpu.TritonBuilder.__new__(gpu.TritonBuilder)
    made.device = torch.device(device)
    monkeypatch.setattr(
        backend.SieveBuilder, "attach", lambda self, *_: setattr(self, "layers", [Layer()])
    )
    monkeypatch.setattr(gpu.logger, "propagate", True)
    graphs = SimpleNamespace(cudagraph_mode=CUDAGraphMode.PIECEWISE)
    with caplog.at_level(logging.WARNING, gpu.logger.name):
        made.attach(None, None, SimpleNamespace(compilation_config=graphs))
    assert ("not yet been run on a GPU" in caplog.text) is (device == "cuda")
    graphs.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    with pytest.raises(EngineError, match="PIECEWISE"):
        made.attach(None, None, SimpleNamespace(compilation_config=graphs))


def test_rows_of_model_runner_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    """On vLLM's own table of requests, without its device buffers."""
    states = RequestState.__new__(RequestState)
    states.req_id_to_index = {"a": 5, "b": 3}
    states.index_to_req_id = {5: "a", 3: "b"}
    states.prompt_len = SimpleNamespace(np=np.array([0, 0, 0, 33, 0, 55]))  # type: ignore[assignment]
    requests = requests_of(SimpleNamespace(req_states=states))
    assert isinstance(requests, RequestsV2)
    requests.follow(metadata(ROWS))
    assert requests.row(0) == ("a", 55) and requests.row(2) == ("b", 33)
    assert requests.row(1) is None, "a place that nobody has: a dummy run"
    assert requests.row(6) is None, "padding"
    assert states.remove_request.__func__ is RequestState.remove_request  # type: ignore[attr-defined]
    states.free_indices = []
    states.remove_request("a")
    assert requests.ended({"a", "b"}) == ["a"]


def test_a_builder_reads_its_rows_from_model_runner_v2() -> None:
    made = gpu.TritonBuilder.__new__(gpu.TritonBuilder)
    states = SimpleNamespace(
        index_to_req_id={5: "x", 1: "y"}, prompt_len=SimpleNamespace(np=np.arange(6) * 10)
    )
    made.requests = RequestsV2(SimpleNamespace(req_states=states))
    found = made._rows(metadata(ROWS))
    # req_idx counts down from 5: row 0 is place 5, row 4 is place 1.
    assert [(one.index, one.key, one.n0, one.n1, one.prompt) for one in found] == [
        *((0, "x", 70, 71, 50), (4, "y", 47, 48, 10)),
    ]


def test_moved_as_it_would_be_written() -> None:
    """Several requests due in one forward; with and without poison."""
    recipe = effective(kvsieve.recipe("keydiff", budget=32, schedule="above:48"), 16).recipe
    rows = [row(0, 0, 64, 64, 0), row(1, 95, 96, 40, 64), row(2, 0, 80, 80, 65)]
    made = plan(COLUMNS, rows)
    assert len(made.events) == 3
    table = torch.randperm(64)[: 3 * 8].view(3, 8).int()
    query = torch.randn(145, 4, 32)
    results = []
    for sieve in (LayerSieve, MovingSieve):
        [cache] = caches(KVCacheLayout.BLNHC, blocks=64, heads=2, size=32)
        fill([cache])
        layer = sieve(
            recipe, LayerInfo(ordinal=0, heads=2), Strided(32, TorchMover()), Tally(), heads=2,
            scale=1.0, poison=True,
        )  # fmt: skip
        position = torch.arange(32, dtype=torch.int32).expand(1, 2, -1)  # compacted before
        layer.beside.requests["1"] = Request(columns={"position": position})
        layer.after_attention(query, cache, Work(plan=made, table=table, gone=[]))
        held = {key: one.columns["position"] for key, one in layer.beside.requests.items()}
        results.append((cache, held, layer.tally.evicted))
    (written, kept, evicted), (moved, also, as_many) = results
    assert torch.equal(written.view(torch.int32), moved.view(torch.int32))
    assert kept.keys() == also.keys() and all(torch.equal(kept[k], also[k]) for k in kept)
    assert evicted == as_many > 0


def test_each_platform_gets_its_backends() -> None:
    for paths in compat.BACKENDS.values():
        for name, path in paths.items():
            module, _, cls = path.rpartition(".")
            found = getattr(__import__(module, fromlist=[cls]), cls)
            assert found.get_name() == name
            assert issubclass(found, backend.SieveBackend)
            assert issubclass(found.get_impl_cls(), backend.SieveImpl)
            assert issubclass(found.get_builder_cls(), backend.SieveBuilder)


def test_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(kind: str) -> None:
        for name in ("cpu", "cuda"):
            monkeypatch.setattr(type(current_platform), f"is_{name}", lambda _, n=name: n == kind)

    assert compat.platform() == "cpu"
    assert GPUModelRunner is not None, "imported while this is still a CPU"
    pretend("cuda")
    assert compat.platform() == "cuda"
    assert any(path.startswith(GPUModelRunner.__module__) for path in compat._hooks())
    compat.check_hooks()  # both runners have what is patched
    pretend("xpu")
    with pytest.raises(EngineError, match="of CPUs and of CUDA"):
        compat.platform()


def test_model_runner_v2_introduces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    introduced: list[Any] = []
    monkeypatch.setattr(compat, "introduce", introduced.append)
    monkeypatch.setattr(compat, "_runners", lambda: (GPUModelRunner.__module__,))
    monkeypatch.setattr(GPUModelRunner, "initialize_kv_cache", lambda self, config: config)
    monkeypatch.setattr(GPUModelRunner, "_kvsieve_original", None, raising=False)
    monkeypatch.delattr(GPUModelRunner, "_kvsieve_original")
    compat.patch_runner()
    compat.patch_runner()
    runner = GPUModelRunner.__new__(GPUModelRunner)
    assert runner.initialize_kv_cache(3) == 3
    assert introduced == [runner], "once"
    del GPUModelRunner._kvsieve_original


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from kvsieve.engines.vllm import kernels

move = kernels._move
pointers = {"cache": "*bf16", "rows": "*bf16", "offsets": "*i64", "blocks": "*i64", "slots": "*i64"}
for take in (True, False):
    fixed = {"TAKE": take, "CHOSEN": take, "ROWS": 16, "COLS": 256, "number_stride": 1}
    kinds = {x: pointers.get(x, "i64" if "stride" in x else "i32") for x in move.arg_names}
    kinds |= dict.fromkeys(fixed, "constexpr")
    places = {(move.arg_names.index(name),): value for name, value in fixed.items()}
    source = triton.compiler.ASTSource(fn=move, signature=kinds, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(made.asm["cubin"]) > 1000 and "st.global" in made.asm["ptx"]
"""


def test_the_kernel_compiles_for_a_gpu(tmp_path: Any) -> None:
    """To machine code, which an interpreter says nothing about; nothing is run."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
