"""Linear layers of low-bit weights, as FastDeploy's layers create, load and apply them.

A weight is cut into the kernels' tiles once, after it is loaded; what is held then is codes and
scales alone. FastDeploy's own loaders split a weight over ranks: by rows (``N``) in qkv, gate and
up, by columns (``K``) in o and down, where each rank gets whole groups.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import paddle
from fastdeploy.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from fastdeploy.model_executor.layers.quantization.quant_base import QuantMethodBase
from fastdeploy.model_executor.layers.quantization.weight_only import GPUWeightOnlyLinearMethod
from fastdeploy.model_executor.utils import (
    TensorTracker,
    free_tensor,
    process_weight_transpose,
    set_weight_attrs,
)
from paddle.nn.quant import weight_only_linear, weight_quantize

from fd_minicpm41.errors import UsageError
from fd_minicpm41.ops import MAX_DECODE_TOKENS, expand_low_bit_weight, low_bit_linear
from fd_minicpm41.quantization.choice import DATA_FREE_VARIABLE
from fd_minicpm41.quantization.formats import FP8_MAX, GROUPS, TERNARY_ZERO, LowBitFormat
from fd_minicpm41.quantization.rtn import quantise_rtn
from fd_minicpm41.quantization.ternary import STORED_GROUPS, quantise_ternary
from fd_minicpm41.quantization.tiles import tile_scales, tile_weight

# Rows that are rounded at once, which bounds the memory of a start.
ROWS_AT_ONCE = 4096
ZERO = {2: 3, 4: 16, 8: 256}
# What activations are rounded to where more tokens come at once than the decode kernels take.
ACTIVATIONS = {"w4a8": "int8", "w4afp8": "float8_e4m3fn"}
INT8_MAX = 127.0
BITS = {"wint2": 2, "wint4": 4, "wint8": 8, "w4a8": 4, "w4afp8": 4}


def replace_parameter(layer: Any, name: str, tensor: paddle.Tensor) -> None:
    """Makes ``tensor`` the layer's parameter of that name and frees what was there."""
    replaced = layer._parameters.get(name)
    parameter = layer.create_parameter(
        shape=tensor.shape,
        dtype=tensor.dtype,
        is_bias=False,
        default_initializer=paddle.nn.initializer.Constant(0),
    )
    parameter.copy_(tensor, False)
    setattr(layer, name, parameter)
    if replaced is not None:
        free_tensor(replaced)


class LowBitLinearMethod(QuantMethodBase):
    """What our methods share: tiles are held, and :func:`fd_minicpm41.ops.low_bit_linear` applies.

    A layer then holds ``qweight`` and ``scales`` in tiles, and ``channel_scales`` of w4a8 and
    w4afp8.

    Attributes:
        fmt: the format held; known from the start, or once the weight is loaded.
    """

    def __init__(self, method: str, fmt: LowBitFormat | None) -> None:
        self.method = method
        self.fmt = fmt

    def describe(self) -> str:
        """Format and kernels in words, for the log."""
        assert self.fmt is not None
        fmt = self.fmt
        ternary = " (ternary)" if fmt.zero == TERNARY_ZERO else ""
        rotated = f", Hadamard blocks of {fmt.hadamard}" if fmt.hadamard else ""
        return (
            f"{self.method}: {fmt.bits} bits{ternary} in groups of {fmt.group}{rotated} by "
            "fd_minicpm41's kernels"
        )

    def hold(self, layer: Any, qweight: paddle.Tensor, scales: paddle.Tensor) -> None:
        """Cuts a plain weight into tiles and keeps them as the layer's parameters.

        Args:
            qweight: uint8 ``[N, K * bits / 8]``.
            scales: bf16 ``[N, K / group]``.
        """
        assert self.fmt is not None
        replace_parameter(layer, "qweight", tile_weight(qweight, self.fmt.bits))
        replace_parameter(layer, "scales", tile_scales(scales))

    def apply(self, layer: Any, x: paddle.Tensor) -> paddle.Tensor:
        """``x [M, K]`` times the weight: ``[M, N]`` of the same dtype."""
        assert self.fmt is not None
        columns, rows = layer.weight_shape
        if self.method not in ACTIVATIONS or x.shape[0] <= MAX_DECODE_TOKENS:
            return low_bit_linear(x, layer.qweight, layer.scales, self.fmt, rows)
        dtype = ACTIVATIONS[self.method]
        weight = expand_low_bit_weight(
            layer.qweight, layer.scales, self.fmt, rows, columns, dtype, layer.channel_scales
        )
        return scaled_product(x, weight, layer.channel_scales)


class StoredLinearMethod(LowBitLinearMethod):
    """A weight that the checkpoint holds as codes and scales."""

    def create_weights(self, layer: Any, **attrs: Any) -> None:
        """Plain parameters, filled by FastDeploy's loaders under the checkpoint's own names."""
        assert self.fmt is not None
        columns, rows = layer.weight_shape
        is_row_parallel = attrs.get("output_dim") is False
        is_whole_row = self.fmt.group not in GROUPS
        if is_whole_row:
            # Every rank's part of the row has the one scale.
            self.fmt = replace(self.fmt, group=columns)
        self.fmt.check_columns(columns, layer.prefix)
        parts = {
            "qweight": ([rows, columns * self.fmt.bits // 8], "uint8", True),
            "scales": ([rows, columns // self.fmt.group], "bfloat16", not is_whole_row),
        }
        if self.method in ACTIVATIONS:
            parts["channel_scales"] = ([rows], "float32", False)
        for name, (shape, dtype, has_columns) in parts.items():
            parameter = layer.create_parameter(
                shape=shape,
                dtype=dtype,
                is_bias=False,
                default_initializer=paddle.nn.initializer.Constant(0),
            )
            setattr(layer, name, parameter)
            # FastDeploy splits the last axis if output_dim is true, the first if it is false.
            split = has_columns or None if is_row_parallel else False
            set_weight_attrs(parameter, attrs | {"output_dim": split})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Cuts the weight into tiles."""
        self.hold(layer, layer.qweight, layer.scales)


class RoundingLinearMethod(LowBitLinearMethod):
    """A 16-bit weight that is rounded when it is loaded."""

    def __init__(self, method: str) -> None:
        super().__init__(method, None)

    def create_weights(self, layer: Any, **attrs: Any) -> None:
        """A 16-bit parameter ``weight [N, K]``, as FastDeploy's own online methods have it."""
        shape = layer.weight_shape[::-1]
        layer.weight = layer.create_parameter(
            shape=shape,
            dtype=layer.weight_dtype,
            is_bias=False,
            default_initializer=paddle.nn.initializer.Constant(0),
        )
        if isinstance(layer, (MergedColumnParallelLinear, QKVParallelLinear)):
            # The weight is whole when every part of its first axis has come.
            attrs = attrs | {"tensor_track": TensorTracker(shape=shape, output_dim=False)}
        if attrs.get("output_dim") is not None:
            attrs = attrs | {"output_dim": not attrs["output_dim"]}
        set_weight_attrs(layer.weight, attrs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Rounds the weight, keeps its tiles and frees the 16-bit one.

        Raises:
            UsageError: wint2 of a weight that is not ternary.
        """
        weight = layer.weight
        shards = WHOLE
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            rank = layer.fd_config.parallel_config.tensor_parallel_rank
            shards = ColumnShards(rank, layer.tp_group)
        self.fmt, codes, scales, channel_scales = round_weight(
            weight, self.method, layer.prefix, shards
        )
        self.hold(layer, codes, scales)
        if channel_scales is not None:
            replace_parameter(layer, "channel_scales", channel_scales)
        free_tensor(weight)
        del layer.weight


@dataclass(frozen=True)
class ColumnShards:
    """How a weight's columns are split over ranks.

    Attributes:
        rank: which of them this process holds.
        group: FastDeploy's group of the ranks; None if one holds all.
    """

    rank: int
    group: Any

    def gather(self, part: paddle.Tensor) -> paddle.Tensor:
        """Every rank's columns side by side; all ranks call it, in the same order."""
        if self.group is None:
            return part
        parts: list[paddle.Tensor] = []
        paddle.distributed.all_gather(parts, part, group=self.group)
        return paddle.concat(parts, axis=1)


WHOLE = ColumnShards(0, None)


def round_weight(
    weight: paddle.Tensor, method: str, name: str, shards: ColumnShards = WHOLE
) -> tuple[LowBitFormat, paddle.Tensor, paddle.Tensor, paddle.Tensor | None]:
    """A 16-bit weight ``[N, K]`` as format, packed codes, bf16 scales and channel scales.

    wint2 is exact: ternary with the weight's own scales. The others round to nearest, in groups of
    128 where they divide K, else of 64. The scale of a row that w4a8 and w4afp8 have is that of all
    ranks' columns, so that shards are those of the whole weight.

    Raises:
        UsageError: wint2 of a weight that is not ternary, unless data-free rounding was asked for.
    """
    rows, columns = weight.shape
    bits = BITS[method]
    groups = [g for g in STORED_GROUPS if columns % g == 0]
    if not groups:
        raise UsageError(
            f"{name} has {columns} in features, wanted a multiple of {min(GROUPS)} for "
            f"{method}: serve this model in bf16"
        )
    if method == "wint2":
        exact = quantise_ternary(weight.astype("float32").t())
        if exact is not None:
            codes, scales, fmt = exact
            return fmt, pack_rows(codes.t(), bits), scales.t().astype("bfloat16"), None
        if os.environ.get(DATA_FREE_VARIABLE) != "1":
            raise UsageError(
                f"{name} is not ternary, which --quantization wint2 needs of a bf16 checkpoint: "
                "quantise it first with `fd-minicpm41 quantize --method wint2`"
            )
        groups = [min(GROUPS)]
    fmt = LowBitFormat(bits, groups[0], ZERO[bits])
    packed, all_scales, channels = [], [], []
    for start in range(0, rows, ROWS_AT_ONCE):
        part = weight[start : start + ROWS_AT_ONCE].astype("float32")
        first = 0
        if method in ACTIVATIONS:
            part, first = shards.gather(part), shards.rank * columns
        codes, scales, ladder = quantise_rtn(part.t(), fmt, method)
        own = codes[first : first + columns]
        own_scales = scales[first // fmt.group : (first + columns) // fmt.group]
        packed.append(pack_rows(own.t(), bits))
        all_scales.append(own_scales.t().astype("bfloat16"))
        if ladder is not None:
            channels.append(ladder.channel)
    channel_scales = paddle.concat(channels) if channels else None
    return fmt, paddle.concat(packed), paddle.concat(all_scales), channel_scales


def pack_rows(codes: paddle.Tensor, bits: int) -> paddle.Tensor:
    """Codes ``[N, K]`` as bytes, low bits first: :func:`formats.pack` on the weight's device."""
    per_byte = 8 // bits
    rows, columns = codes.shape
    parts = codes.astype("int32").reshape([rows, columns // per_byte, per_byte])
    shifts = paddle.to_tensor([1 << (i * bits) for i in range(per_byte)], "int32")
    return (parts * shifts).sum(-1).astype("uint8")


def scaled_product(
    x: paddle.Tensor, weight: paddle.Tensor, channel_scales: paddle.Tensor
) -> paddle.Tensor:
    """``x (weight * channel_scales)^T`` with x rounded to the weight's 8-bit type, token by token.

    Args:
        x: ``[M, K]``.
        weight: int8 or e4m3 ``[N, K]``.
        channel_scales: fp32 ``[N]``.

    Returns:
        ``[M, N]`` in the dtype of ``x``.
    """
    x8, scales = round_tokens(x, weight.dtype)
    if x.place.is_cpu_place():
        # There is no 8-bit product on a CPU; every sum of such products is exact in fp64.
        out = paddle.matmul(widen(x8), widen(weight), transpose_y=True)
        return (out * widen(scales) * widen(channel_scales)).astype(x.dtype)
    from fastdeploy.model_executor.layers.quantization.ops import cutlass_scaled_mm

    return cutlass_scaled_mm(x8, weight, scales, channel_scales.unsqueeze(-1), x.dtype)


def round_tokens(x: paddle.Tensor, dtype: paddle.dtype) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Rows of ``x [M, K]`` in int8 or e4m3, and the fp32 scale ``[M, 1]`` of each."""
    x32 = x.astype("float32")
    largest = INT8_MAX if dtype == paddle.int8 else FP8_MAX
    scales = paddle.clip(x32.abs().max(axis=-1, keepdim=True) / largest, min=1e-12)
    scaled = x32 / scales
    return (paddle.round(scaled) if dtype == paddle.int8 else scaled).astype(dtype), scales


def widen(x: paddle.Tensor) -> paddle.Tensor:
    """The same in fp64."""
    return x.astype("float32").astype("float64")


class GroupwiseLinearMethod(GPUWeightOnlyLinearMethod):
    """wint4 by Paddle's own kernel, with a scale a group where FastDeploy asks for one a row."""

    def describe(self) -> str:
        """Format and kernels in words, for the log."""
        return f"wint4: 4 bits in groups of {self.group} by Paddle's kernels"

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantises on the CPU, the only side where Paddle's quantiser knows groups."""
        if self.model_format == "torch":
            process_weight_transpose(layer, "weight")
        columns, _ = layer.weight_shape
        groups = [g for g in STORED_GROUPS if columns % g == 0]
        if not groups:
            raise UsageError(
                f"{layer.prefix} has {columns} in features, wanted a multiple of {min(GROUPS)} for "
                "wint4: choose --quantization wint8"
            )
        self.group = groups[0]
        codes, scales = weight_quantize(
            layer.weight.cpu(),
            algo=self.quant_config.algo,
            arch=self.quant_config.weight_only_linear_arch,
            group_size=self.group,
        )
        replace_parameter(layer, "weight", codes)
        replace_parameter(layer, "weight_scale", scales)

    def apply(self, layer: Any, x: paddle.Tensor) -> paddle.Tensor:
        """``x [M, K]`` times the weight: ``[M, N]`` of the same dtype."""
        return weight_only_linear(
            x,
            weight=layer.weight,
            weight_scale=layer.weight_scale,
            weight_dtype="int4",
            arch=self.quant_config.weight_only_linear_arch,
            group_size=self.group,
        )
