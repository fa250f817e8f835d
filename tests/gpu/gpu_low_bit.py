"""Low-bit weights on the GPU: tensors of PyTorch, launches through the C interface."""

from __future__ import annotations

import torch
from gpu_ops import TORCH_DTYPES, stream, upload

import capi
from fd_minicpm41.quantization.formats import LowBitFormat
from low_bit_cases import Weight

ROW_DTYPES = TORCH_DTYPES | {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class LowBitLinear:
    """A weight in tiles, and the launches that read it.

    ``linear(x)`` multiplies up to 64 tokens, ``linear.rows(dtype)`` expands. With ``out`` and a
    workspace given by the caller nothing is allocated, so that the call can be captured in a graph.

    Attributes:
        shape: (out_features, in_features).
        nbytes: of codes and scales.
    """

    def __init__(
        self,
        fmt: LowBitFormat,
        shape: tuple[int, int],
        qweight: torch.Tensor,
        scales: torch.Tensor,
    ) -> None:
        self.fmt, self.shape = fmt, shape
        self.qweight, self.scales = qweight, scales
        self.weight = capi.weight_of(qweight, scales, fmt, shape)
        self.nbytes = qweight.nbytes + scales.nbytes

    @classmethod
    def of(cls, weight: Weight) -> LowBitLinear:
        """A weight of ``low_bit_cases``."""
        qweight, scales = weight.tiles()
        return cls(weight.fmt, weight.shape, upload(qweight), upload(scales))

    @classmethod
    def random(cls, fmt: LowBitFormat, out_features: int, in_features: int) -> LowBitLinear:
        """Random codes, and scales that keep the products of random activations near 1."""
        row_tiles, k_tiles = -(-out_features // 16), -(-in_features // 128)
        size = (row_tiles, k_tiles, 256 * fmt.bits)
        qweight = torch.randint(0, 256, size, dtype=torch.uint8, device="cuda")
        size = (row_tiles, in_features // fmt.group, 16)
        scales = torch.rand(size, device="cuda").add_(0.5).mul_(in_features**-0.5 / 2**fmt.bits)
        return cls(fmt, (out_features, in_features), qweight, scales.bfloat16())

    def params(self, x: torch.Tensor, out: torch.Tensor) -> capi.LowBitLinearParams:
        assert x.is_contiguous() and out.is_contiguous() and x.dtype == out.dtype
        return capi.low_bit_linear_params(x, self.weight, out, name_of(x.dtype))

    def workspace(self, max_tokens: int = 64) -> torch.Tensor:
        """Scratch for up to so many tokens, full of garbage: no launch may count on it."""
        x = torch.empty(max_tokens, self.shape[1], dtype=torch.bfloat16, device="cuda")
        size = capi.workspace_cuda(self.params(x, x))
        return torch.full((max(1, size),), 0xA5, dtype=torch.uint8, device="cuda")

    def __call__(
        self,
        x: torch.Tensor,
        out: torch.Tensor | None = None,
        workspace: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``x [M, in_features]``, float16 or bfloat16, by the weight: ``[M, out_features]``."""
        if out is None:
            out = x.new_full((x.shape[0], self.shape[0]), float("nan"))
        if workspace is None:
            workspace = self.workspace(max(1, x.shape[0]))
        params = self.params(x, out)
        params.workspace, params.workspace_bytes = workspace.data_ptr(), workspace.numel()
        capi.run_cuda(params, stream())
        return out

    def rows(
        self,
        dtype: str,
        channel_scales: torch.Tensor | None = None,
        first: int = 0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows from ``first`` on, as many as ``out`` has, else all that follow."""
        if out is None:
            size = (self.shape[0] - first, self.shape[1])
            out = torch.full(size, 77, device="cuda").to(ROW_DTYPES[dtype])
        params = capi.expand_low_bit_weight_params(self.weight, out, dtype, channel_scales, first)
        capi.run_cuda(params, stream())
        return out
