"""The whole model: time to first token and decode steps, sparse beside dense.

32 layers at the true shapes of the 8B model with random weights. Attention is this project's
kernels or PyTorch's best dense ones; products, norms and the rest are PyTorch's, or this project's
where the weights are low-bit. No sampling, no server.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

import measure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu"), str(ROOT / "src")]
from gpu_ops import Sizes  # noqa: E402

import capi  # noqa: E402
from workload import (  # noqa: E402
    BLOCK_SIZE,
    GEOMETRY,
    HEAD_DIM,
    KV_HEADS,
    Q_HEADS,
    WINDOW_ROWS,
    Rows,
    correlated_queries,
    union_sizes,
)

LAYERS, HIDDEN, FFN, VOCABULARY = 32, 4096, 16384, 73448
QKV = (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM
EMBEDDING_SCALE, LOGIT_SCALE = 12.0, 256 / HIDDEN
RESIDUAL_SCALE = 1.4 / LAYERS**0.5
EPSILON = 1e-6
# Rows of a prompt that the products take together.
PRODUCT_ROWS = 16384
SIZES = Sizes()

PROMPTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
# The caches of a step stay under 36 GB.
DECODE = (
    *((1, n) for n in (2048, 8192, 32768, 65536, 131072)),
    *((4, n) for n in (8192, 32768, 131072)),
    *((16, n) for n in (8192, 32768, 65536)),
    *((64, n) for n in (8192, 16384)),
)
WEIGHTS_LENGTHS = (2048, 32768)

# bits, group, zero; the head of a low-bit model has 8 bits and one scale a row.
FORMATS = {"wint8": (8, 128, 256), "wint4": (4, 128, 16), "wint2": (2, 64, 3)}
MOST_DECODE_ROWS = 64
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


@torch.compile(dynamic=True)
def add_and_norm(x: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Adds the scaled branch to the residual ``x`` in place; one launch, as in a server."""
    x.add_(branch, alpha=RESIDUAL_SCALE)
    return rms_norm(x, (HIDDEN,), weight, EPSILON)


@torch.compile(dynamic=True)
def gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


class Linear:
    """``x W^T`` in bfloat16."""

    def __init__(self, rows: int, columns: int) -> None:
        self.weight = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
        self.weight.normal_(0, columns**-0.5)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


class LowBitProduct:
    """The same with random codes: the kernel for few rows, for many a panel in bfloat16."""

    # Shared by all layers, as in a server.
    panel: torch.Tensor | None = None

    def __init__(self, rows: int, columns: int, bits: int, group: int, zero: int) -> None:
        # Here, so that a bfloat16 run needs no installed package.
        from gpu_low_bit import LowBitLinear

        from fd_minicpm41.quantization.formats import LowBitFormat

        self.linear = LowBitLinear.random(LowBitFormat(bits, group, zero), rows, columns)
        self.workspace = self.linear.workspace()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.linear.shape
        if len(x) <= MOST_DECODE_ROWS:
            return self.linear(x, x.new_empty(len(x), rows), self.workspace)
        if LowBitProduct.panel is None or LowBitProduct.panel.numel() < rows * columns:
            LowBitProduct.panel = x.new_empty(rows * columns)
        panel = LowBitProduct.panel[: rows * columns].view(rows, columns)
        return torch.nn.functional.linear(x, self.linear.rows("bfloat16", out=panel))


class Model:
    """The weights, and everything of a step but attention."""

    def __init__(self, weights: str) -> None:
        def linear(rows: int, columns: int, is_head: bool = False) -> Linear | LowBitProduct:
            if weights == "bf16":
                return Linear(rows, columns)
            bits, group, zero = (8, columns, 256) if is_head else FORMATS[weights]
            return LowBitProduct(rows, columns, bits, group, zero)

        self.embedding = Linear(VOCABULARY, HIDDEN).weight
        self.layers = [
            (
                linear(QKV, HIDDEN),
                linear(HIDDEN, HIDDEN),
                linear(2 * FFN, HIDDEN),
                linear(HIDDEN, FFN),
            )
            for _ in range(LAYERS)
        ]
        self.head = linear(VOCABULARY, HIDDEN, is_head=True)
        self.norm = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
        angles = torch.outer(
            torch.arange(131072, device="cuda"),
            10000.0 ** -(torch.arange(64, device="cuda") / 64),
        )
        self.cos, self.sin = (f(angles).repeat(1, 2).contiguous() for f in (torch.cos, torch.sin))

    def forward(
        self, tokens: torch.Tensor, attention: Callable[[int, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Logits of every row of a decode step, of the last row of a longer one.

        Args:
            attention: layer and qkv ``[rows, QKV]``, not rotated, to ``[rows, HIDDEN]``.
        """
        x = self.embedding[tokens] * EMBEDDING_SCALE
        pieces = [slice(n, n + PRODUCT_ROWS) for n in range(0, len(x), PRODUCT_ROWS)]
        normed = [rms_norm(x[piece], (HIDDEN,), self.norm, EPSILON) for piece in pieces]
        is_long = len(pieces) > 1
        qkv = torch.empty(len(x), QKV, dtype=x.dtype, device="cuda") if is_long else None
        for layer, (qkv_proj, o_proj, gate_up_proj, down_proj) in enumerate(self.layers):
            if qkv is None:
                rotated = qkv_proj(normed[0])
            else:
                rotated = qkv
                for piece, rows in zip(pieces, normed, strict=True):
                    qkv[piece] = qkv_proj(rows)
            out = attention(layer, rotated)
            for n, piece in enumerate(pieces):
                rows = add_and_norm(x[piece], o_proj(out[piece]), self.norm)
                rows = down_proj(gated(gate_up_proj(rows)))
                normed[n] = add_and_norm(x[piece], rows, self.norm)
        last = normed[0] if len(x) <= MOST_DECODE_ROWS else normed[-1][-1:]
        return self.head(last * LOGIT_SCALE)


@dataclass
class Caches:
    """Keys and values of ``tokens`` tokens in every layer, and their windows."""

    tokens: int

    def __post_init__(self) -> None:
        pages = self.tokens // BLOCK_SIZE

        def random() -> torch.Tensor:
            shape = (pages, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
            return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

        self.k, self.v = ([random() for _ in range(LAYERS)] for _ in range(2))
        self.k1 = [torch.zeros_like(k[:, :, :4]) for k in self.k]
        self.k2 = [torch.zeros_like(k[:, :, :1]) for k in self.k]

    def rows(self, layer: int, **step: Any) -> Rows:
        return Rows(
            geometry=GEOMETRY,
            k_cache=self.k[layer],
            v_cache=self.v[layer],
            k1_cache=self.k1[layer],
            k2_cache=self.k2[layer],
            **step,
        )


def ints(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device="cuda")


class SparseAttention:
    """Our ops over a step of ``batch`` requests that bring ``query_len`` tokens each."""

    def __init__(self, model: Model, caches: Caches, batch: int, history: int, query_len: int):
        self.model = model
        num_rows = batch * query_len
        window = min(num_rows, WINDOW_ROWS)
        tables = torch.randperm(len(caches.k[0]), device="cuda").to(torch.int32).view(batch, -1)
        step = {
            "query_lens": ints([query_len] * batch),
            "history_lens": ints([history] * batch),
            "block_tables": tables.contiguous(),
            "q": None,
            "max_query_len": query_len,
        }
        owners = torch.arange(batch, device="cuda").to(torch.int32).repeat_interleave(query_len)
        starts = ints(range(0, num_rows + 1, query_len))
        self.out = torch.empty(num_rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self.topk_idx = torch.empty(
            KV_HEADS * window * SIZES.budget, dtype=torch.int32, device="cuda"
        )
        self.workspace = torch.empty(0, dtype=torch.uint8, device="cuda")
        self.launches: list[list[Any]] = []
        self._kept: list[Any] = [step, caches, tables]
        for layer in range(LAYERS):
            rows = caches.rows(layer, batch_id_per_token=owners, cu_seqlens_q=starts, **step)
            rope = capi.rope_and_write_kv_params(rows, None, None, None, model.cos, model.sin)
            rope.q_stride = rope.k_stride = rope.v_stride = QKV
            params: list[Any] = [rope, capi.compress_keys_params(rows)]
            self._kept.append(rows)
            for first in range(0, num_rows, window):
                count = min(window, num_rows - first)
                part = caches.rows(
                    layer,
                    batch_id_per_token=owners[first : first + count],
                    cu_seqlens_q=starts - first,
                    **step,
                )
                lists = self.topk_idx[: KV_HEADS * count * SIZES.budget].view(KV_HEADS, count, -1)
                into = self.out[first : first + count]
                select = capi.select_blocks_params(part, SIZES, lists, overlap=int(first == 0))
                attend = capi.sparse_attention_params(part, lists, into, SIZES.dense_len, overlap=1)
                for one in (select, attend):
                    one.q_stride = QKV
                    one.workspace_bytes = capi.workspace_cuda(one)
                    if one.workspace_bytes > len(self.workspace):
                        self.workspace = torch.empty(
                            one.workspace_bytes, dtype=torch.uint8, device="cuda"
                        )
                params += [select, attend]
                self._kept.append(part)
            self.launches.append(params)
        for params in self.launches:
            for one in params[2:]:
                one.workspace = self.workspace.data_ptr()

    def unions(self) -> dict[str, float]:
        """Of the last window of the last layer that ran; see ``workload.union_sizes``."""
        count = self.launches[-1][-1].batch.num_tokens
        lists = self.topk_idx[: KV_HEADS * count * SIZES.budget].view(KV_HEADS, count, -1)
        return {str(n): size for n, size in union_sizes(lists).items()}

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        rope, compress, *windows = self.launches[layer]
        point_into(rope, qkv)
        capi.run_cuda(rope, stream())
        capi.run_cuda(compress, stream())
        for number, params in enumerate(windows):
            params.q = qkv.data_ptr() + number // 2 * WINDOW_ROWS * QKV * 2
            capi.run_cuda(params, stream())
        return self.out


def point_into(rope: Any, qkv: torch.Tensor) -> None:
    rope.q = qkv.data_ptr()
    rope.k = rope.q + Q_HEADS * HEAD_DIM * 2
    rope.v = rope.k + KV_HEADS * HEAD_DIM * 2


class DenseAttention:
    """PyTorch's kernels over contiguous keys and values, as they like them best.

    New keys and values are rotated and written as in the sparse step. A prompt's are then brought
    into one piece; a decode step reads the same memory as if it had been contiguous all along.
    """

    def __init__(
        self, model: Model, caches: Caches, batch: int, history: int, query_len: int, backend: str
    ) -> None:
        self.backend, self.batch, self.query_len = BACKENDS[backend], batch, query_len
        self.caches = caches
        length = history + query_len
        self.shape = (batch, KV_HEADS, length, HEAD_DIM)
        pages = length // BLOCK_SIZE
        # A prompt's pages lie in order, so that its keys are contiguous after one copy.
        tables = torch.arange(batch * pages, device="cuda").to(torch.int32).view(batch, pages)
        owners = torch.arange(batch, device="cuda").to(torch.int32).repeat_interleave(query_len)
        step = {
            "batch_id_per_token": owners,
            "cu_seqlens_q": ints(range(0, batch * query_len + 1, query_len)),
            "query_lens": ints([query_len] * batch),
            "history_lens": ints([history] * batch),
            "block_tables": tables,
            "q": None,
            "max_query_len": query_len,
        }
        self.ropes = []
        self._kept: list[Any] = [step]
        for layer in range(LAYERS):
            rows = caches.rows(layer, **step)
            rope = capi.rope_and_write_kv_params(rows, None, None, None, model.cos, model.sin)
            rope.q_stride = rope.k_stride = rope.v_stride = QKV
            self.ropes.append(rope)
            self._kept.append(rows)

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        point_into(self.ropes[layer], qkv)
        capi.run_cuda(self.ropes[layer], stream())
        caches = (self.caches.k[layer], self.caches.v[layer])
        if self.query_len == 1:
            keys, values = (cache.view(self.shape) for cache in caches)
        else:
            keys, values = (cache.transpose(0, 1).reshape(self.shape) for cache in caches)
        q = qkv[:, : Q_HEADS * HEAD_DIM].view(self.batch, self.query_len, Q_HEADS, HEAD_DIM)
        with sdpa_kernel(self.backend):
            out = scaled_dot_product_attention(
                q.transpose(1, 2), keys, values, is_causal=self.query_len > 1, enable_gqa=True
            )
        return out.transpose(1, 2).reshape(-1, HIDDEN)


def first_token_ms(model: Model, attention: Any, length: int, repeats: int) -> float:
    """Median milliseconds from token ids on the device to logits, launched eagerly."""
    tokens = torch.randint(0, VOCABULARY, (length,), device="cuda")
    # PyTorch chooses a dense kernel's plan at the first call of a shape.
    attention(0, torch.zeros(length, QKV, dtype=torch.bfloat16, device="cuda"))
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        logits = model.forward(tokens, attention)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    assert bool(torch.isfinite(logits).all())
    return statistics.median(times)


def decode_ms(model: Model, attention: Any, batch: int) -> float:
    """Median milliseconds of a decode step under CUDA graph."""
    tokens = torch.randint(0, VOCABULARY, (batch,), device="cuda")
    logits = torch.zeros(batch, VOCABULARY, dtype=torch.bfloat16, device="cuda")

    def run(_: int) -> None:
        logits.copy_(model.forward(tokens, attention))

    milliseconds = measure.graph_time(run, copies=1, rounds=1) / 1e3
    assert bool(torch.isfinite(logits).all()) and bool(logits.any())
    return milliseconds


def check_prompt(model: Model) -> float:
    """Below the switch every row is dense, so both sides must give the same logits, up to the
    rounding of 32 bfloat16 layers: the relative error of ours against PyTorch's."""
    length = 4096
    caches = Caches(length)
    tokens = torch.randint(0, VOCABULARY, (length,), device="cuda")
    results = [
        model.forward(tokens, attention).float()
        for attention in (
            SparseAttention(model, caches, 1, 0, length),
            DenseAttention(model, caches, 1, 0, length, "flash"),
            DenseAttention(model, caches, 1, 0, length, "cudnn"),
        )
    ]
    ours, flash, cudnn = results
    error = ((ours - flash).norm() / flash.norm()).item()
    # Two dense kernels of the same framework differ by their rounding; ours may by twice that.
    allowed = 2 * ((cudnn - flash).norm() / flash.norm()).item() + 2.0**-8
    assert error <= allowed, f"logits differ by {error:.4f}, allowed {allowed:.4f}"
    return error


def best_backend(caches: Caches, batch: int, length: int) -> str:
    """The faster of PyTorch's dense kernels for this decode step."""
    q = torch.randn(batch, Q_HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    shape = (batch, KV_HEADS, length, HEAD_DIM)
    times = {}
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):

            def run(i: int) -> None:
                keys, values = caches.k[i].view(shape), caches.v[i].view(shape)
                scaled_dot_product_attention(q, keys, values, enable_gqa=True)

            times[name] = measure.graph_time(run, copies=8, rounds=1)
    return min(times, key=lambda name: times[name])


class WithQueries:
    """Attention with its queries replaced, at the price of one copy a layer.

    Random weights make queries that have nothing in common with their neighbours'. These are
    turned back by their positions, so that they are ``queries`` once they have been rotated.
    """

    def __init__(self, attention: SparseAttention, model: Model, queries: torch.Tensor) -> None:
        self.attention = attention
        self.queries = torch.empty_like(queries)
        half = HEAD_DIM // 2
        for start in range(0, len(queries), WINDOW_ROWS):
            rows = slice(start, min(start + WINDOW_ROWS, len(queries)))
            first, second = queries[rows].float().split(half, dim=-1)
            cos, sin = (table[rows, None, :half] for table in (model.cos, model.sin))
            self.queries[rows, :, :half] = first * cos + second * sin
            self.queries[rows, :, half:] = second * cos - first * sin
        self.queries = self.queries.view(len(queries), -1)

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        qkv[:, : Q_HEADS * HEAD_DIM].copy_(self.queries)
        return self.attention(layer, qkv)


def prompt_rows(model: Model, longest: int) -> list[dict[str, Any]]:
    rows = []
    for length in (n for n in PROMPTS if n <= longest):
        repeats = 5 if length <= 8192 else 1
        caches = Caches(length)
        row: dict[str, Any] = {"kind": "prompt", "batch": 1, "length": length, "repeats": repeats}
        attention = SparseAttention(model, caches, 1, 0, length)
        if length >= 2 * SIZES.dense_len:
            row["independent_ms"] = first_token_ms(model, attention, length, repeats)
            row["independent_unions"] = attention.unions()
            like_a_model = WithQueries(attention, model, correlated_queries(length))
            row["sparse_ms"] = first_token_ms(model, like_a_model, length, repeats)
            row["unions"] = attention.unions()
            del like_a_model
        else:
            # Every row, or nearly, is dense: the queries do not matter.
            row["sparse_ms"] = first_token_ms(model, attention, length, repeats)
        row["dense_ms"] = first_token_ms(
            model, DenseAttention(model, caches, 1, 0, length, "cudnn"), length, repeats
        )
        row["gain"] = row["dense_ms"] / row["sparse_ms"]
        rows.append(row)
        print(
            f"prompt {length // 1024:4}K  sparse {row['sparse_ms']:9.1f} ms  dense "
            f"{row['dense_ms']:9.1f} ms  {row['gain']:5.2f}x  "
            + " ".join(
                f"{name} {measure.rounded(row[name])}"
                for name in ("independent_ms", "unions", "independent_unions")
                if name in row
            ),
            flush=True,
        )
        del caches, attention
        torch.cuda.empty_cache()
    return rows


def decode_rows(model: Model, longest: int) -> list[dict[str, Any]]:
    rows = []
    for batch, length in (case for case in DECODE if case[1] <= longest):
        caches = Caches(batch * length)
        row: dict[str, Any] = {"kind": "decode", "batch": batch, "length": length}
        row["sparse_ms"] = decode_ms(
            model, SparseAttention(model, caches, batch, length - 1, 1), batch
        )
        row["dense_backend"] = best_backend(caches, batch, length)
        dense = DenseAttention(model, caches, batch, length - 1, 1, row["dense_backend"])
        row["dense_ms"] = decode_ms(model, dense, batch)
        for side in ("sparse", "dense"):
            row[f"{side}_tokens_per_second"] = batch / row[f"{side}_ms"] * 1e3
        row["gain"] = row["dense_ms"] / row["sparse_ms"]
        rows.append(row)
        print(
            f"decode {batch:3} x {length // 1024:3}K  sparse {row['sparse_ms']:7.2f} ms "
            f"{row['sparse_tokens_per_second']:8.0f}/s  dense {row['dense_ms']:7.2f} ms "
            f"{row['dense_tokens_per_second']:8.0f}/s  {row['gain']:5.2f}x",
            flush=True,
        )
        del caches, dense
        torch.cuda.empty_cache()
    return rows


def weights_rows(models: list[str], made: dict[str, Model]) -> list[dict[str, Any]]:
    """One request, one token: each weight format with sparse attention."""
    rows = []
    for weights in models:
        model = made.pop(weights, None) or Model(weights)
        for length in WEIGHTS_LENGTHS:
            caches = Caches(length)
            attention = SparseAttention(model, caches, 1, length - 1, 1)
            row: dict[str, Any] = {"kind": "weights", "weights": weights, "length": length}
            row["sparse_ms"] = decode_ms(model, attention, 1)
            base = next((r for r in rows if r["weights"] == "bf16" and r["length"] == length), row)
            row["gain_over_bf16"] = base["sparse_ms"] / row["sparse_ms"]
            rows.append(row)
            print(
                f"weights {weights:6} 1 x {length // 1024:3}K  {row['sparse_ms']:7.2f} ms "
                f"{1e3 / row['sparse_ms']:7.0f}/s  {row['gain_over_bf16']:5.2f}x of bf16",
                flush=True,
            )
        del model
        LowBitProduct.panel = None
        torch.cuda.empty_cache()
    return rows


def main(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    models = ["bf16", *FORMATS] if args.weights == "all" else [args.weights]
    model = Model(models[0])
    error = check_prompt(model)
    print(f"{models[0]} weights; logits of a dense 4K prompt within {error:.4f} of PyTorch's")
    rows = []
    if "prompts" in args.parts:
        rows += prompt_rows(model, args.longest)
    if "decode" in args.parts:
        rows += decode_rows(model, args.longest)
    if "weights" in args.parts:
        rows += weights_rows(models, {models[0]: model})
    if args.out:
        result = {
            "what": "whole model of random weights, 32 layers, hidden 4096, ffn 16384, vocabulary "
            "73448, bfloat16 activations; milliseconds. A prompt is one step, launched eagerly; "
            "a decode step is a CUDA graph",
            "environment": measure.environment(args.command),
            "weights": models[0],
            "logits_error_at_4k": error,
            "rows": [{k: measure.rounded(v) for k, v in row.items()} for row in rows],
        }
        measure.write_json(args.out, result)
    return 0
