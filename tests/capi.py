"""The kernel library through ctypes: the structs of csrc/params.h and a caller for each op.

Knows no tensor library: pointers are plain integers, so NumPy, Paddle and PyTorch memory all fit.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
INT8, FLOAT8_E4M3 = 3, 4
DTYPES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}
ROW_DTYPES = DTYPES | {"int8": INT8, "float8_e4m3fn": FLOAT8_E4M3}

_pointer, _int32, _int64, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Batch(ctypes.Structure):
    _fields_ = [
        ("batch_id_per_token", _pointer),
        ("cu_seqlens_q", _pointer),
        ("query_lens", _pointer),
        ("history_lens", _pointer),
        ("block_tables", _pointer),
        ("num_tokens", _int32),
        ("batch_size", _int32),
        ("max_blocks", _int32),
        ("num_pages", _int32),
        ("max_query_len", _int32),
    ]


class Heads(ctypes.Structure):
    _fields_ = [
        ("num_q_heads", _int32),
        ("num_kv_heads", _int32),
        ("head_dim", _int32),
        ("dtype", _int32),
    ]


class RopeAndWriteKvParams(ctypes.Structure):
    op = "rope_and_write_kv"
    _fields_ = [
        ("batch", Batch),
        ("heads", Heads),
        ("q", _pointer),
        ("k", _pointer),
        ("v", _pointer),
        ("cos", _pointer),
        ("sin", _pointer),
        ("k_cache", _pointer),
        ("v_cache", _pointer),
        ("q_stride", _int64),
        ("k_stride", _int64),
        ("v_stride", _int64),
        ("max_position", _int32),
    ]


class CompressKeysParams(ctypes.Structure):
    op = "compress_keys"
    _fields_ = [
        ("batch", Batch),
        ("heads", Heads),
        ("compress_from", _pointer),
        ("k_cache", _pointer),
        ("k1_cache", _pointer),
        ("k2_cache", _pointer),
    ]


class SelectBlocksParams(ctypes.Structure):
    op = "select_blocks"
    _fields_ = [
        ("batch", Batch),
        ("heads", Heads),
        ("q", _pointer),
        ("k1_cache", _pointer),
        ("k2_cache", _pointer),
        ("topk_idx", _pointer),
        ("workspace", _pointer),
        ("workspace_bytes", _int64),
        ("q_stride", _int64),
        ("softmax_scale", _float),
        ("init_blocks", _int32),
        ("local_blocks", _int32),
        ("budget", _int32),
        ("dense_len", _int32),
        ("overlap", _int32),
    ]


class SparseAttentionParams(ctypes.Structure):
    op = "sparse_attention"
    _fields_ = [
        ("batch", Batch),
        ("heads", Heads),
        ("q", _pointer),
        ("k_cache", _pointer),
        ("v_cache", _pointer),
        ("topk_idx", _pointer),
        ("out", _pointer),
        ("lse", _pointer),
        ("workspace", _pointer),
        ("workspace_bytes", _int64),
        ("q_stride", _int64),
        ("out_stride", _int64),
        ("softmax_scale", _float),
        ("budget", _int32),
        ("dense_len", _int32),
        ("overlap", _int32),
    ]


class LowBitWeight(ctypes.Structure):
    _fields_ = [
        ("qweight", _pointer),
        ("scales", _pointer),
        ("out_features", _int32),
        ("in_features", _int32),
        ("bits", _int32),
        ("group", _int32),
        ("zero", _int32),
        ("hadamard", _int32),
    ]


class LowBitLinearParams(ctypes.Structure):
    op = "low_bit_linear"
    _fields_ = [
        ("weight", LowBitWeight),
        ("x", _pointer),
        ("out", _pointer),
        ("workspace", _pointer),
        ("workspace_bytes", _int64),
        ("num_tokens", _int32),
        ("dtype", _int32),
    ]


class ExpandLowBitWeightParams(ctypes.Structure):
    op = "expand_low_bit_weight"
    _fields_ = [
        ("weight", LowBitWeight),
        ("channel_scales", _pointer),
        ("out", _pointer),
        ("first_row", _int32),
        ("num_rows", _int32),
        ("dtype", _int32),
    ]


PARAMS = (
    *(RopeAndWriteKvParams, CompressKeysParams, SelectBlocksParams, SparseAttentionParams),
    *(LowBitLinearParams, ExpandLowBitWeightParams),
)
Params = (
    RopeAndWriteKvParams
    | CompressKeysParams
    | SelectBlocksParams
    | SparseAttentionParams
    | LowBitLinearParams
    | ExpandLowBitWeightParams
)


class KernelError(RuntimeError):
    """A launch was refused; the message is the library's own."""


def library_path() -> Path:
    """Where the library lies: $FD_MINICPM41_KERNELS, else the installed package's own."""
    override = os.environ.get("FD_MINICPM41_KERNELS")
    if override:
        return Path(override)
    found = distribution("fd-minicpm41").locate_file("fd_minicpm41/lib/libfd_minicpm41_kernels.so")
    return Path(str(found))


@cache
def library() -> ctypes.CDLL:
    """The loaded library, its struct sizes checked against the mirrors above."""
    lib = ctypes.CDLL(str(library_path()))
    lib.minicpm41_last_error.restype = ctypes.c_char_p
    lib.minicpm41_build_info.restype = ctypes.c_char_p
    for params in PARAMS:
        size = getattr(lib, f"minicpm41_sizeof_{params.op}")
        size.restype = _int64
        if size() != ctypes.sizeof(params):
            raise RuntimeError(
                f"{params.__name__} is {ctypes.sizeof(params)} bytes here and {size()} in "
                f"{library_path()}: build the library anew, or mend tests/capi.py"
            )
    for op in ("select_blocks", "sparse_attention", "low_bit_linear"):
        getattr(lib, f"minicpm41_{op}_workspace_cuda").restype = _int64
    return lib


def build_info() -> dict[str, str]:
    """{"version": "0.1.0", "cuda": "90a"}; cuda is "none" in a build without it."""
    text = library().minicpm41_build_info().decode()
    return dict(item.split("=", 1) for item in text.split(" "))


@cache
def missing_for_cuda() -> str | None:
    """Why the CUDA kernels cannot run here on tensors of PyTorch; None where they can."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    if build_info()["cuda"] == "none":
        return "the kernel library was built without CUDA"
    return None


def _check(failed: int) -> None:
    if failed:
        raise KernelError(library().minicpm41_last_error().decode())


def run_cpu(params: Params) -> None:
    """Runs the op of ``params`` on the CPU."""
    _check(getattr(library(), f"minicpm41_{params.op}_cpu")(ctypes.byref(params)))


def run_cuda(params: Params, stream: int) -> None:
    """Launches the op of ``params`` on a CUDA stream, given as its address."""
    launch = getattr(library(), f"minicpm41_{params.op}_cuda")
    _check(launch(ctypes.byref(params), ctypes.c_void_p(stream)))


def workspace_cuda(
    params: SelectBlocksParams | SparseAttentionParams | LowBitLinearParams,
) -> int:
    """Bytes of scratch the CUDA launch of ``params`` wants."""
    return getattr(library(), f"minicpm41_{params.op}_workspace_cuda")(ctypes.byref(params))


def address(array: object) -> int:
    """Where an array's numbers begin: NumPy's or any tensor's with ``data_ptr``; None is null."""
    if array is None:
        return 0
    return array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data


def batch_of(step: object) -> Batch:
    """The :class:`Batch` of a ``cases.Step``, whose arrays must outlive it."""
    return Batch(
        batch_id_per_token=address(step.batch_id_per_token),
        cu_seqlens_q=address(step.cu_seqlens_q),
        query_lens=address(step.query_lens),
        history_lens=address(step.history_lens),
        block_tables=address(step.block_tables),
        num_tokens=len(step.batch_id_per_token),
        batch_size=len(step.query_lens),
        max_blocks=step.block_tables.shape[1],
        num_pages=step.k_cache.shape[0],
        max_query_len=getattr(step, "max_query_len", len(step.batch_id_per_token)),
    )


def heads_of(step: object) -> Heads:
    """The :class:`Heads` of a ``cases.Step``."""
    g = step.geometry
    return Heads(g.num_q_heads, g.num_kv_heads, g.head_dim, DTYPES[g.dtype])


def compress_keys_params(step: object, compress_from: object = None) -> CompressKeysParams:
    """Over the caches of a step; ``compress_from`` None takes the history lengths."""
    return CompressKeysParams(
        batch=batch_of(step),
        heads=heads_of(step),
        compress_from=address(compress_from),
        k_cache=address(step.k_cache),
        k1_cache=address(step.k1_cache),
        k2_cache=address(step.k2_cache),
    )


def select_blocks_params(
    step: object, sparse_config: object, topk_idx: object, overlap: int = 0
) -> SelectBlocksParams:
    """Over the compressed keys of a step, with the sizes of a ``SparseConfig``."""
    g, c = step.geometry, sparse_config
    return SelectBlocksParams(
        batch=batch_of(step),
        heads=heads_of(step),
        q=address(step.q),
        k1_cache=address(step.k1_cache),
        k2_cache=address(step.k2_cache),
        topk_idx=address(topk_idx),
        q_stride=g.num_q_heads * g.head_dim,
        softmax_scale=g.head_dim**-0.5,
        init_blocks=c.init_blocks,
        local_blocks=c.local_blocks + 1,
        budget=c.budget,
        dense_len=c.dense_len,
        overlap=overlap,
    )


def sparse_attention_params(
    step: object,
    topk_idx: object,
    out: object,
    dense_len: int,
    lse: object = None,
    overlap: int = 0,
) -> SparseAttentionParams:
    """Over the caches of a step; the budget is the last dimension of ``topk_idx``."""
    g = step.geometry
    return SparseAttentionParams(
        batch=batch_of(step),
        heads=heads_of(step),
        q=address(step.q),
        k_cache=address(step.k_cache),
        v_cache=address(step.v_cache),
        topk_idx=address(topk_idx),
        out=address(out),
        lse=address(lse),
        q_stride=g.num_q_heads * g.head_dim,
        out_stride=g.num_q_heads * g.head_dim,
        softmax_scale=g.head_dim**-0.5,
        budget=topk_idx.shape[2],
        dense_len=dense_len,
        overlap=overlap,
    )


def rope_and_write_kv_params(
    step: object, q: object, k: object, v: object, cos: object, sin: object
) -> RopeAndWriteKvParams:
    """Over contiguous q, k and v; for parts of a fused tensor set addresses and strides after."""
    g = step.geometry
    return RopeAndWriteKvParams(
        batch=batch_of(step),
        heads=heads_of(step),
        q=address(q),
        k=address(k),
        v=address(v),
        cos=address(cos),
        sin=address(sin),
        k_cache=address(step.k_cache),
        v_cache=address(step.v_cache),
        q_stride=g.num_q_heads * g.head_dim,
        k_stride=g.num_kv_heads * g.head_dim,
        v_stride=g.num_kv_heads * g.head_dim,
        max_position=cos.shape[0],
    )


def weight_of(qweight: object, scales: object, fmt: object, shape: tuple[int, int]) -> LowBitWeight:
    """Over tiles that must outlive it; ``shape`` is (out_features, in_features)."""
    rest = (fmt.bits, fmt.group, fmt.zero, fmt.hadamard)
    return LowBitWeight(address(qweight), address(scales), *shape, *rest)


def low_bit_linear_params(
    x: object, weight: LowBitWeight, out: object, dtype: str
) -> LowBitLinearParams:
    """``x [num_tokens, in_features]`` by a weight, into ``out [num_tokens, out_features]``."""
    return LowBitLinearParams(
        weight=weight,
        x=address(x),
        out=address(out),
        num_tokens=x.shape[0],
        dtype=DTYPES[dtype],
    )


def expand_low_bit_weight_params(
    weight: LowBitWeight, out: object, dtype: str, channel_scales: object = None, first_row: int = 0
) -> ExpandLowBitWeightParams:
    """Rows from ``first_row`` on, as many as ``out [num_rows, in_features]`` has."""
    return ExpandLowBitWeightParams(
        weight=weight,
        channel_scales=address(channel_scales),
        out=address(out),
        first_row=first_row,
        num_rows=out.shape[0],
        dtype=ROW_DTYPES[dtype],
    )
