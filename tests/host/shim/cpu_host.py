"""Lets unmodified FastDeploy serve text models on CPU Paddle.

``install()`` runs before FastDeploy is imported and edits nothing of it on disk:

1. ``fastdeploy.model_executor.ops.gpu`` becomes a module of reference ops (:mod:`host_ops`,
   :mod:`low_precision_ops`);
2. the platform answers "CUDA", because every dense layer refuses anything else;
3. a few gaps of CPU Paddle are filled (pinned memory, CUDA events, fused activation, top-p);
4. the worker's device set-up, its dtype and its Triton samplers are replaced;
5. requests are marked as decoding on the ZeroMQ path too, so that preemption works.

CPU Paddle has no bf16 kernels for most layers, so the worker computes in float32.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import host_ops
import low_precision_ops
import record_ops

OPS_MODULE = "fastdeploy.model_executor.ops.gpu"
# The shim's GPU: an Ampere of 16 GiB, old enough that no Hopper-only path is taken. A test that
# asks for another also gets a Paddle that seems to have CUDA, where low-bit formats ask for it.
SM_VARIABLE = "FD_MINICPM41_TEST_SM"
COMPUTE_CAPABILITY = divmod(int(os.environ.get(SM_VARIABLE, "80")), 10)
TOTAL_MEMORY = 16 << 30
WORKER_PROGRAM = "FastDeploy LLM Inference"


class _PatchFinder(importlib.abc.MetaPathFinder):
    """Runs a function on a module right after the module's own code ran."""

    def __init__(self) -> None:
        self.patches: dict[str, Callable[[Any], None]] = {}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.patches:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is None or spec.loader is None:
                continue
            patch, execute = self.patches.pop(name), spec.loader.exec_module

            def exec_module(module: Any, execute: Any = execute, patch: Any = patch) -> None:
                execute(module)
                patch(module)

            spec.loader.exec_module = exec_module
            return spec
        return None


_FINDER = _PatchFinder()


def _after_import(name: str) -> Callable[[Any], Any]:
    def register(patch: Callable[[Any], None]) -> Callable[[Any], None]:
        _FINDER.patches[name] = patch
        return patch

    return register


class _OpsModule(types.ModuleType):
    """FastDeploy imports hundreds of ops by name; those without a reference fail when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"the CPU shim has no op {name} ({len(args)} arguments)")

        missing.__name__ = name
        setattr(self, name, missing)
        return missing


def _ops_module(name: str) -> _OpsModule:
    module = _OpsModule(name)
    module.__file__ = host_ops.__file__
    module.__path__ = []
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module
    return module


@_after_import("fd_minicpm41.ops")
def _record_op_calls(ops: Any) -> None:
    folder = os.environ.get("FD_MINICPM41_TEST_TRACE")
    if folder:
        record_ops.install(ops, folder)


@_after_import("fd_minicpm41.metadata")
def _cut_steps_into_short_windows(metadata: Any) -> None:
    rows = os.environ.get("FD_MINICPM41_TEST_WINDOW_ROWS")
    if rows:
        metadata.WINDOW_ROWS = int(rows)


@_after_import("fd_minicpm41.quantization.config")
def _claim_cuda(config: Any) -> None:
    if SM_VARIABLE in os.environ:
        config.has_cuda = lambda: True


class _Event:
    def record(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


@_after_import("paddle")
def _fill_paddle_gaps(paddle: Any) -> None:
    import paddle.incubate.nn.functional as fused

    properties = types.SimpleNamespace(
        name="cpu shim",
        major=COMPUTE_CAPABILITY[0],
        minor=COMPUTE_CAPABILITY[1],
        total_memory=TOTAL_MEMORY,
        multi_processor_count=1,
    )
    paddle.Tensor.pin_memory = lambda self, *args, **kwargs: self.clone()
    paddle.Tensor.cuda = lambda self, *args, **kwargs: self
    cuda = paddle.device.cuda
    cuda.create_event = cuda.Event = lambda *args, **kwargs: _Event()
    cuda.get_device_properties = lambda *args, **kwargs: properties
    paddle.device.get_device_properties = cuda.get_device_properties
    cuda.get_device_capability = lambda *args, **kwargs: COMPUTE_CAPABILITY
    paddle.device.empty_cache = paddle.device.synchronize = lambda *args, **kwargs: None
    fused.fused_bias_act = host_ops.fused_bias_act

    # Gloo, the process group of the CPU, has no calculation stream: wait instead.
    def all_reduce(self: Any, tensor: Any, op: Any, *args: Any) -> None:
        self.all_reduce(tensor, op, True).wait()

    paddle.base.core.ProcessGroup.all_reduce_on_calc_stream = all_reduce
    paddle.tensor.top_p_sampling = host_ops.top_p_sampling


@_after_import("paddle.distributed.fleet.layers.mpu.mp_ops")
def _gather_without_cuda(module: Any) -> None:
    import paddle

    def gather(tensor: Any, group: Any = None) -> Any:
        parts: list[Any] = []
        paddle.distributed.all_gather(parts, tensor, group=group)
        return paddle.concat(parts, -1)

    module._c_identity = lambda tensor, group=None, *args, **kwargs: tensor
    module._c_concat = gather


@_after_import("fastdeploy.platforms.base")
def _answer_cuda(module: Any) -> None:
    module.Platform.is_cuda = module.Platform.is_cuda_alike = lambda self: True
    module.Platform.is_cpu = lambda self: False


@_after_import("fastdeploy.platforms")
def _choose_cuda_platform(module: Any) -> None:
    module._current_platform = module.CUDAPlatform()


@_after_import("fastdeploy.model_executor.layers.sample.ops.top_k_top_p_triton")
def _replace_triton_noise(module: Any) -> None:
    module.seeded_gumbel_noise = host_ops.seeded_gumbel_noise


@_after_import("fastdeploy.model_executor.layers.sample.logprobs")
def _replace_triton_count(module: Any) -> None:
    module.batched_count_greater_than = lambda x, y: (x >= y).sum(-1)


@_after_import("fastdeploy.model_executor.layers.normalization")
def _use_unfused_norm(module: Any) -> None:
    module._TRITON_AVAILABLE = False


@_after_import("fastdeploy.worker.gpu_worker")
def _start_worker_on_cpu(module: Any) -> None:
    def init_device(self: Any) -> None:
        import paddle

        self.max_chips_per_node = 8
        self.device_ids = self.parallel_config.device_ids.split(",")
        self.device = "cpu"
        paddle.device.set_device("cpu")
        paddle.set_default_dtype(self.model_config.dtype)
        module.set_random_seed(self.fd_config.model_config.seed)
        self.model_runner = module.ModelRunner(
            fd_config=self.fd_config,
            device=self.device,
            device_id=0,
            rank=self.rank,
            local_rank=self.local_rank,
        )

    module.GpuWorker.init_device = init_device


@_after_import("paddle.distributed.launch.context.device")
def _launch_without_devices(module: Any) -> None:
    module.Device.get_selected_devices = lambda self, devices="": []


@_after_import("fastdeploy.output.token_processor")
def _mark_decodes(module: Any) -> None:
    # FastDeploy's preemption looks for requests marked as decoding. The message queue of its GPU
    # builds marks them when their first token arrives; the ZeroMQ path, which needs no op, forgets.
    original = module.TokenProcessor._process_per_token

    def process_per_token(self: Any, task: Any, *args: Any, **kwargs: Any) -> Any:
        status = type(task.status)
        if getattr(status, "RUNNING_PREFILL", None) == task.status:
            task.status = status.RUNNING_DECODE
        return original(self, task, *args, **kwargs)

    module.TokenProcessor._process_per_token = process_per_token


def _compute_in_float32() -> None:
    # The worker is run as __main__ and the engine never passes --dtype: only its parser can be met.
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        namespace = original(self, *args, **kwargs)
        if self.prog == WORKER_PROGRAM:
            namespace.dtype = "float32"
        return namespace

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign,assignment]


def install() -> None:
    """Installs the shim in this process; a second call does nothing."""
    if _FINDER in sys.meta_path:
        return
    sys.meta_path.insert(0, _FINDER)
    _compute_in_float32()
    module = _ops_module(OPS_MODULE)
    module.tolerant_import_error = lambda: None  # type: ignore[attr-defined]
    for name, function in (host_ops.OPS | low_precision_ops.OPS).items():
        setattr(module, name, function)
    module.deep_gemm = _ops_module(OPS_MODULE + ".deep_gemm")  # type: ignore[attr-defined]
    for name, function in low_precision_ops.DEEP_GEMM.items():
        setattr(module.deep_gemm, name, function)
