"""Decode, one layer: the whole sparse step beside the better dense kernel of the same run."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import measure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]
from gpu_ops import Launches, Sizes, assert_row, download  # noqa: E402

import capi  # noqa: E402
from cases import TRUE_GEOMETRY, Geometry  # noqa: E402

# batch, length: the most microseconds that the step may take.
TARGETS = {
    (1, 8192): 11.0,
    (1, 32768): 12.0,
    (1, 65536): 13.0,
    (1, 131072): 16.0,
    (4, 65536): 22.0,
    (16, 32768): 57.0,
    (16, 65536): 66.0,
    (16, 131072): 85.0,
    (64, 32768): 210.0,
}
DENSE_LENGTHS = (1024, 2048, 4096, 8191)
DENSE_BATCHES = (1, 4, 16, 64)
# A dense row may take this much longer than the better dense kernel.
DENSE_MARGIN = 1.10
SIZES = Sizes()
GEOMETRY = Geometry(TRUE_GEOMETRY.num_q_heads, TRUE_GEOMETRY.num_kv_heads, 128, "bfloat16")
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 2, 128

SHARED = ("batch_id_per_token", "cu_seqlens_q", "query_lens", "history_lens", "block_tables", "q")


@dataclass
class PagedStep:
    """One new token for each of ``batch`` requests of ``length`` tokens, over scrambled pages.

    ``layer_of`` shares the queries, the lengths and the tables of another step: only the caches are
    its own, as those of a model's next layer.
    """

    batch: int
    length: int
    max_blocks: int
    layer_of: PagedStep | None = None

    def __post_init__(self) -> None:
        blocks = -(-self.length // 64)
        pages = self.batch * blocks
        self.geometry = GEOMETRY
        self.num_tokens = self.batch
        self.max_query_len = 1

        def ints(values: Any) -> torch.Tensor:
            return torch.as_tensor(values, dtype=torch.int32, device="cuda")

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

        if self.layer_of is not None:
            for name in SHARED:
                setattr(self, name, getattr(self.layer_of, name))
        else:
            self.batch_id_per_token = ints(np.arange(self.batch))
            self.cu_seqlens_q = ints(np.arange(self.batch + 1))
            self.query_lens = ints(np.ones(self.batch))
            self.history_lens = ints(np.full(self.batch, self.length - 1))
            self.block_tables = torch.full(
                (self.batch, self.max_blocks), -1, dtype=torch.int32, device="cuda"
            )
            self.block_tables[:, :blocks] = ints(torch.randperm(pages)).reshape(self.batch, blocks)
            self.q = random(self.batch, Q_HEADS, HEAD_DIM)
        self.k_cache = random(pages, KV_HEADS, 64, HEAD_DIM)
        self.v_cache = random(pages, KV_HEADS, 64, HEAD_DIM)
        self.k1_cache = torch.full_like(self.k_cache[:, :, :4], float("nan"))
        self.k2_cache = torch.full_like(self.k_cache[:, :, :1], float("nan"))
        start = torch.zeros(self.batch, dtype=torch.int32, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        capi.run_cuda(capi.compress_keys_params(self, start), stream)
        torch.cuda.synchronize()

    def cached(self, cache: torch.Tensor, request: int) -> np.ndarray:
        """``[slots of all pages in order, KV_HEADS, HEAD_DIM]``."""
        blocks = -(-self.length // 64)
        pages = self.block_tables[request, :blocks].long()
        tokens = cache[pages].permute(0, 2, 1, 3).reshape(-1, KV_HEADS, HEAD_DIM)
        return download(tokens.contiguous())


def bytes_of_step(length: int) -> int:
    """K1, K2 and the attended K and V of one request, each read once."""
    row = KV_HEADS * HEAD_DIM * 2
    if length < SIZES.dense_len:
        return 2 * row * length
    return row * (length // 16 + length // 64) + 2 * row * min(length, 64 * SIZES.budget)


def check(step: PagedStep, launches: Launches, requests: list[int]) -> None:
    """Holds the timed run's own output to the oracle."""
    topk_idx, out, lse = launches.result()
    position = step.length - 1
    assert np.isfinite(out.astype(np.float32)).all(), "not every output was written"
    for request in requests:
        keys, values = step.cached(step.k_cache, request), step.cached(step.v_cache, request)
        # Flat slot u holds fine window u - 1, slot b of K2 coarse window b - 1.
        k1 = step.cached(step.k1_cache, request)[1:]
        k2 = step.cached(step.k2_cache, request)[1:]
        q = download(step.q)[request]
        for head in range(KV_HEADS):
            heads = slice(16 * head, 16 * head + 16)
            assert_row(
                q[heads],
                keys[:, head],
                values[:, head],
                (k1[:, head], k2[:, head]),
                position,
                SIZES,
                topk_idx[head, request],
                out[request, heads],
                lse[request, heads],
            )


def time_ours(batch: int, length: int, max_blocks: int, parts: bool) -> dict[str, float]:
    bytes_read = batch * bytes_of_step(length)
    held = batch * length * 1024
    copies = measure.copies_for(bytes_read, held, measure.COLD_BYTES_WITH_POLICIES)
    steps = [PagedStep(batch, length, max_blocks)]
    steps += [PagedStep(batch, length, max_blocks, steps[0]) for _ in range(copies - 1)]
    launches = [Launches(step, SIZES, overlap=1) for step in steps]
    for one in launches:
        one.poison()
    row = {"ours_us": measure.graph_time(lambda i: launches[i].run(), copies)}
    check(steps[-1], launches[-1], sorted({0, batch // 2, batch - 1})[:2])
    if parts:
        # Each op by itself, without overlap: together they take longer than the step.
        for name in ("compress", "select", "attend"):

            def run(i: int, name: str = name) -> None:
                params = getattr(launches[i], name)
                if name != "compress":
                    params.overlap = 0
                capi.run_cuda(params, torch.cuda.current_stream().cuda_stream)

            row[f"{name}_us"] = measure.graph_time(run, copies)
    return row


def time_dense(batch: int, length: int) -> dict[str, float]:
    """The two dense kernels of PyTorch that read a cache at close to full bandwidth."""
    held = batch * length * 1024
    copies = measure.copies_for(held, held, measure.COLD_BYTES_WITH_POLICIES)
    keys, values = (
        [
            torch.randn(batch, KV_HEADS, length, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
            for _ in range(copies)
        ]
        for _ in range(2)
    )
    q = torch.randn(batch, Q_HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    row = {}
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        with sdpa_kernel(backend):

            def run(i: int) -> None:
                torch.nn.functional.scaled_dot_product_attention(
                    q, keys[i], values[i], enable_gqa=True
                )

            row[f"{name}_us"] = measure.graph_time(run, copies)
    row["dense_us"] = min(row.values())
    return row


def main(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    rate = measure.copy_rate()
    result = {
        "what": "decode, one layer, one new token a request, bfloat16, 32 query heads, 2 kv heads, "
        "head_dim 128, budget 96 blocks; microseconds",
        "environment": measure.environment(args.command),
        "copy_bytes_per_second": rate,
        "rows": [],
    }
    cases = [("sparse", *case) for case in TARGETS]
    if not args.sparse_only:
        cases += [("dense", batch, n) for batch in DENSE_BATCHES for n in DENSE_LENGTHS]
    print(
        f"{'kind':7}{'batch x length':>15}{'ours':>8}{'dense':>8}{'floor':>8}{'target':>8}"
        f"{'dense/ours':>12}  held"
    )
    failed = 0
    for kind, batch, length in cases:
        floor = batch * bytes_of_step(length) / rate * 1e6
        row = {"kind": kind, "batch": batch, "length": length, "floor_us": floor}
        row |= time_ours(batch, length, args.max_blocks or -(-length // 64), args.parts)
        torch.cuda.empty_cache()
        row |= time_dense(batch, length)
        torch.cuda.empty_cache()
        target = TARGETS[batch, length] if kind == "sparse" else DENSE_MARGIN * row["dense_us"]
        held = row["ours_us"] <= target and (kind == "dense" or row["ours_us"] < row["dense_us"])
        failed += not held
        row |= {"target_us": target, "held": held, "correct": True}
        result["rows"].append(
            {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
        )
        extra = "".join(
            f" {k[:-3]} {row[k]:.1f}" for k in row if k in ("compress_us", "select_us", "attend_us")
        )
        print(
            f"{kind:7}{f'{batch} x {length}':>15}{row['ours_us']:8.1f}{row['dense_us']:8.1f}"
            f"{floor:8.1f}{target:8.1f}{row['dense_us'] / row['ours_us']:12.2f}  "
            f"{'yes' if held else 'NO'}{extra}",
            flush=True,
        )
    if args.out:
        measure.write_json(args.out, result)
    print(f"{failed} of {len(cases)} rows miss their target")
    return 0
