"""The CUDA ops on the steps of ``cases``: tensors of PyTorch, calls through the C interface."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import oracle
import torch
from numpy.typing import NDArray

import capi
from accuracy import assert_selection, assert_within_budget, same_dtype_attention
from cases import DTYPES, TRUE_GEOMETRY, Geometry, Step, load_windows, make_step

TORCH_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NOT_WRITTEN = -7
BF16 = replace(TRUE_GEOMETRY, dtype="bfloat16")
FP16 = replace(TRUE_GEOMETRY, dtype="float16")


@dataclass(frozen=True)
class Sizes:
    """The fields of a ``SparseConfig`` that the ops read; the published ones by default."""

    init_blocks: int = 1
    local_blocks: int = 32
    budget: int = 96
    dense_len: int = 8192


PUBLISHED = Sizes()
# Budget 6: sparsity starts at 385 tokens of context, and a row chooses 3 blocks of those it may.
SMALL = Sizes(1, 1, 6, -1)


def upload(array: NDArray) -> torch.Tensor:
    if array.dtype in (DTYPES["bfloat16"], DTYPES["float16"]):
        name = array.dtype.name
        return torch.from_numpy(array.view(np.int16).copy()).cuda().view(TORCH_DTYPES[name])
    return torch.from_numpy(array.copy()).cuda()


def download(tensor: torch.Tensor) -> NDArray:
    if tensor.dtype in (torch.bfloat16, torch.float16):
        name = str(tensor.dtype).removeprefix("torch.")
        return tensor.view(torch.int16).cpu().numpy().view(DTYPES[name])
    return tensor.cpu().numpy()


_ARRAYS = (
    *("batch_id_per_token", "cu_seqlens_q", "query_lens", "history_lens", "block_tables"),
    *("q", "k_cache", "v_cache", "k1_cache", "k2_cache"),
)


def on_gpu(step: Step) -> Step:
    """The step with its op arguments on the GPU; ``keys`` and ``values`` stay in NumPy."""
    return replace(step, **{name: upload(getattr(step, name)) for name in _ARRAYS})


def from_gpu(step: Step) -> Step:
    return replace(step, **{name: download(getattr(step, name)) for name in _ARRAYS})


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def compress(step: Step, compress_from: list[int] | None = None) -> None:
    start = None
    if compress_from is not None:
        start = torch.tensor(compress_from, dtype=torch.int32, device="cuda")
    capi.run_cuda(capi.compress_keys_params(step, start), stream())
    torch.cuda.synchronize()


def ready(
    requests: list[tuple[int, int]], geometry: Geometry = BF16, **kwargs: Any
) -> tuple[Step, Step]:
    """A step here and on the GPU, its compressed keys written by the GPU."""
    host = make_step(requests, geometry, **kwargs)
    gpu = on_gpu(host)
    compress(gpu, [0] * len(host.requests))
    return host, gpu


def window(gpu: Step, first: int, count: int) -> Step:
    """Rows ``first ..`` of a step as a call of their own, cu_seqlens_q shifted."""
    return replace(
        gpu,
        batch_id_per_token=gpu.batch_id_per_token[first : first + count].clone(),
        cu_seqlens_q=gpu.cu_seqlens_q - first,
        q=gpu.q[first : first + count].clone(),
    )


def same_bits(got: NDArray, wanted: NDArray, what: str = "") -> None:
    np.testing.assert_array_equal(
        np.ascontiguousarray(got).view(np.uint8), np.ascontiguousarray(wanted).view(np.uint8), what
    )


class Launches:
    """Buffers and params of one step, allocated once, so that it can be captured in a graph."""

    def __init__(
        self, step: Step, sizes: Sizes, overlap: int = 0, max_query_len: int | None = None
    ) -> None:
        """``max_query_len`` as in csrc/params.h: of the whole step when this is a part of it."""
        g = step.geometry
        shape = (g.num_kv_heads, step.num_tokens, sizes.budget)
        self.topk_idx = torch.full(shape, NOT_WRITTEN, dtype=torch.int32, device="cuda")
        self.out = torch.full_like(step.q, float("nan"))
        self.lse = torch.full(step.q.shape[:2], float("nan"), device="cuda")
        self._step = step  # its tensors must outlive the params
        self.compress = capi.compress_keys_params(step)
        self.select = capi.select_blocks_params(step, sizes, self.topk_idx, overlap)
        self.attend = capi.sparse_attention_params(
            step, self.topk_idx, self.out, sizes.dense_len, self.lse, overlap
        )
        self._workspaces = []
        for params in (self.select, self.attend):
            params.batch.max_query_len = max_query_len or params.batch.max_query_len
            size = capi.workspace_cuda(params)
            # Garbage on purpose: no op may count on what its workspace holds.
            workspace = torch.full((max(1, size),), 0xA5, dtype=torch.uint8, device="cuda")
            params.workspace, params.workspace_bytes = workspace.data_ptr(), size
            self._workspaces.append(workspace)

    def poison(self) -> None:
        self.topk_idx.fill_(NOT_WRITTEN)
        self.out.fill_(float("nan"))
        self.lse.fill_(float("nan"))

    def run(self) -> None:
        """The whole step: finish the compressed keys, select, attend."""
        for params in (self.compress, self.select, self.attend):
            capi.run_cuda(params, stream())

    def result(self) -> tuple[NDArray[np.int32], NDArray, NDArray[np.float32]]:
        torch.cuda.synchronize()
        return download(self.topk_idx), download(self.out), download(self.lse)


def run_step(
    step: Step, sizes: Sizes, overlap: int = 0
) -> tuple[NDArray[np.int32], NDArray, NDArray[np.float32]]:
    """topk_idx, out and lse of a step on the GPU."""
    launches = Launches(step, sizes, overlap)
    launches.run()
    return launches.result()


def assert_row(
    q: NDArray,
    keys: NDArray,
    values: NDArray,
    windows: tuple[NDArray, NDArray],
    position: int,
    sizes: Sizes,
    listed: NDArray[np.int32],
    out: NDArray,
    lse: NDArray[np.float32] | None = None,
    what: str = "",
) -> None:
    """Holds one row of one kv head to the oracle: the list by the stored windows' scores, the
    output over the list.

    Args:
        q, out: ``[group_size, head_dim]``.
        keys, values: ``[kv_len, head_dim]``.
        windows: K1 and K2, ``[windows, head_dim]``.
        listed: ``[budget]``.
        lse: ``[group_size]``.
    """
    what = f"{what} position {position}"
    assert_selection(
        listed[None, None],
        oracle.block_scores(q, *windows, position)[None, None],
        oracle.forced_blocks(position, sizes.init_blocks, sizes.local_blocks + 1)[None],
        np.array([position]),
        sizes.budget,
        sizes.dense_len,
    )
    blocks = np.arange(position // 64 + 1) if position + 1 < sizes.dense_len else listed
    assert_output(q, keys, values, position, blocks, out, lse, what)


def assert_output(
    q: NDArray,
    keys: NDArray,
    values: NDArray,
    position: int,
    blocks: NDArray,
    out: NDArray,
    lse: NDArray[np.float32] | None = None,
    what: str = "",
) -> None:
    """Holds the output of one row of one kv head to the oracle over the blocks it attends to;
    arguments as in :func:`assert_row`."""
    tokens = oracle.listed_tokens(blocks, position)
    truth, true_lse = oracle.attention(q, keys[tokens], values[tokens])
    everything = np.ones((1, 1, len(tokens)), bool)
    framework = same_dtype_attention(
        q[None], keys[tokens][:, None], values[tokens][:, None], everything
    )
    assert_within_budget(out, truth, framework[0], out.dtype.name, what)
    if lse is not None:
        np.testing.assert_allclose(lse, true_lse, atol=1e-3, err_msg=what)


def assert_step(
    host: Step, gpu: Step, sizes: Sizes, result: tuple[NDArray, NDArray, NDArray], rows: int = 8
) -> None:
    """Holds a result to the oracle: lists by the stored windows' scores, outputs over the lists.

    Of each request at most ``rows`` rows, the first and the last among them.
    """
    topk_idx, out, lse = result
    stored = from_gpu(gpu)
    padding = host.is_padding()
    assert (topk_idx[:, padding] == NOT_WRITTEN).all(), "a padding row's list was written"
    assert (out[padding].astype(np.float32) == 0).all(), "a padding row's output is not 0"
    g = host.geometry
    for number, request in enumerate(host.requests):
        if request.query_len == 0:
            continue
        k1, k2 = load_windows(stored, number)
        first = int(host.cu_seqlens_q[number])
        picks = np.unique(np.linspace(0, request.query_len - 1, rows).astype(int))
        for pick in picks:
            row, position = first + pick, request.history_len + pick
            for head in range(g.num_kv_heads):
                heads = slice(head * g.group_size, (head + 1) * g.group_size)
                assert_row(
                    host.q[row, heads],
                    host.keys[number][:, head],
                    host.values[number][:, head],
                    (k1[:, head], k2[:, head]),
                    position,
                    sizes,
                    topk_idx[head, row],
                    out[row, heads],
                    lse[row, heads],
                    f"request {number}, kv head {head},",
                )
