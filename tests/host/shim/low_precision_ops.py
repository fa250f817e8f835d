"""NumPy and Paddle versions of the ops behind FastDeploy's own fp8 and Machete linear layers.

They let FastDeploy's Python of those layers run on a CPU: what it rounds, holds and passes on. The
layout of a packed Machete weight is opaque there and stays as it comes here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from host_ops import _write

OPS: dict[str, Callable[..., Any]] = {}
DEEP_GEMM: dict[str, Callable[..., Any]] = {}
FP8_MAX = 448.0


def _op(function: Callable[..., Any]) -> Callable[..., Any]:
    OPS[function.__name__] = function
    return function


def _deep_gemm(function: Callable[..., Any]) -> Callable[..., Any]:
    DEEP_GEMM[function.__name__] = function
    return function


def _fp32(tensor: Any) -> np.ndarray:
    return tensor.astype("float32").numpy()


def _round_to_fp8(rows: np.ndarray, axis: int) -> tuple[Any, np.ndarray]:
    import paddle

    scales = np.maximum(np.abs(rows).max(axis, keepdims=True) / FP8_MAX, 1e-12)
    return paddle.to_tensor(rows / scales).astype("float8_e4m3fn"), scales.astype("float32")


@_op
def dynamic_per_token_scaled_fp8_quant(out, x, scale, scale_ub):
    rounded, scales = _round_to_fp8(_fp32(x), -1)
    out.copy_(rounded, True)
    _write(scale, scales)


@_op
def cutlass_scaled_mm(out, a, b, scale_a, scale_b, bias):
    product = _fp32(a).astype("float64") @ _fp32(b).astype("float64").T
    product *= _fp32(scale_a).reshape(-1, 1) * _fp32(scale_b).reshape(1, -1)
    _write(out, product.astype("float32"))


@_op
def per_token_quant_padding(x, block_size, use_ue8m0):
    import paddle

    assert not use_ue8m0
    rows, columns = x.shape
    rounded, scales = _round_to_fp8(_fp32(x).reshape(rows, columns // block_size, block_size), -1)
    return rounded.reshape([rows, columns]), paddle.to_tensor(scales[..., 0])


@_deep_gemm
def ceil_div(x, y):
    return (x + y - 1) // y


@_deep_gemm
def fp8_gemm_nt(lhs, rhs, out):
    (a, scale_a), (b, scale_b) = lhs, rhs
    a = _fp32(a) * np.repeat(_fp32(scale_a), 128, 1)
    blocks = np.repeat(np.repeat(_fp32(scale_b), 128, 0), 128, 1)
    b = _fp32(b) * blocks[: b.shape[0], : b.shape[1]]
    _write(out, a @ b.T)


@_op
def machete_prepack_B(weight, atype, quant_type, scale_type):
    return weight


@_op
def machete_mm(x, weight, scales, zeros, channel, token, quant_type, out_type, group, schedule):
    import paddle

    bits, zero = {"uint4b8": (4, 8), "uint8b128": (8, 128)}[quant_type]
    words = weight.numpy().view(np.uint32)
    codes = np.stack([words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)], -1)
    levels = codes.reshape(words.shape[0], -1).astype("float32") - zero
    product = _fp32(x) @ (levels * np.repeat(_fp32(scales).T, group, 1)).T
    return paddle.to_tensor(product).astype(x.dtype)
