"""Examines the small model on a GPU: hundreds of questions for each attention and weight format.

Run from the repository root: ``python benchmarks/small_model_fidelity.py``. The prompts, the judges
and the rows are those of ``fd-minicpm41 eval --suite small``. Two engines hold the same weights:

* ``ops``: a model in bfloat16 whose attention is this project's kernels over a paged cache, all
  four of them, dense and sparse; the questions about a document share its pages;
* ``reference``: everything in float32, attention by the plain PyTorch of ``train_small/model.py``.

Low-bit weights are dequantised from the folders of ``--formats``, which ``python
benchmarks/small_model_formats.py`` makes; a format that rounds activations does so here too. A cell
is written to ``--out`` when it is done, and what is there is not measured again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import capi  # noqa: E402
import measure  # noqa: E402
from fd_minicpm41.config import BLOCK_SIZE, MiniCPMConfig, SparseConfig  # noqa: E402
from fd_minicpm41.quantization.formats import FP8_BLOCK, FP8_MAX, dequantize  # noqa: E402
from fd_minicpm41.quantization.sidecar import hash_file, read_sidecar, weight_files  # noqa: E402
from fd_minicpm41.reference.tokenizer import Tokenizer  # noqa: E402
from fd_minicpm41.rope import rope_table  # noqa: E402
from fd_minicpm41.small_model.examination import (  # noqa: E402
    ANSWER_TOKENS,
    FORMAT_KINDS,
    LENGTHS,
    PROMPT_KINDS,
    REPLY_TOKENS,
    SEED,
    make_documents,
    make_short_prompts,
    make_windows,
)
from fd_minicpm41.small_model.prose import examination_paragraphs  # noqa: E402
from fd_minicpm41.small_model.scores import (  # noqa: E402
    WEIGHTS,
    Row,
    format_score,
    retrieval_score,
)
from train_small.model import (  # noqa: E402
    choose_blocks,
    compress_keys,
    score_blocks,
)

# Longer than every document, so that no row is sparse.
NEVER_SPARSE = 1 << 30
# Scores of the reference that are held at once, in bytes.
SCORE_BYTES = 6 << 30
# Rows that pass through the ops together, as in a server.
STEP_ROWS = 32768
ATTENTIONS = ("sparse", "dense")
LONG = 8192
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

Rounding = Callable[[torch.Tensor], torch.Tensor]


# ---- weights ----


def read_weights(folder: Path, formats: Path | None, weights: str) -> dict[str, torch.Tensor]:
    """fp32 tensors by name, as the format holds them."""
    source = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    if weights == "bf16":
        return source
    if weights == "fp8":
        return {
            name: fp8_blocks(t) if name.endswith("_proj.weight") else t
            for name, t in source.items()
        }
    found = sorted(formats.glob(f"{weights}-*")) if formats is not None else []
    if len(found) != 1:
        raise SystemExit(f"--formats {formats} has {len(found)} folders {weights}-*, wanted 1")
    sidecar = read_sidecar(found[0])
    assert sidecar is not None
    if sidecar.source["model.safetensors"] != hash_file(folder / "model.safetensors"):
        raise SystemExit(f"{found[0]} was not made from {folder}: make the formats anew")
    stored = {n: t for file in weight_files(found[0]) for n, t in load_file(file).items()}
    for module, fmt in sidecar.modules.items():
        codes, scales = stored[f"{module}.qweight"], stored[f"{module}.scales"].float()
        restored = dequantize(codes.numpy(), scales.numpy(), fmt)
        source[f"{module}.weight"] = torch.from_numpy(restored)
    return source


def e4m3(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    scales = largest.clamp_min(1e-30) / FP8_MAX
    return (x / scales).to(torch.float8_e4m3fn).float() * scales


def fp8_blocks(weight: torch.Tensor) -> torch.Tensor:
    rows, columns = (size // FP8_BLOCK for size in weight.shape)
    tiles = weight.view(rows, FP8_BLOCK, columns, FP8_BLOCK)
    return e4m3(tiles, tiles.abs().amax((1, 3), keepdim=True)).view_as(weight)


def fp8_groups(x: torch.Tensor) -> torch.Tensor:
    groups = x.unflatten(-1, (-1, FP8_BLOCK))
    return e4m3(groups, groups.abs().amax(-1, keepdim=True)).flatten(-2)


def fp8_rows(x: torch.Tensor) -> torch.Tensor:
    return e4m3(x, x.abs().amax(-1, keepdim=True))


def int8_rows(x: torch.Tensor) -> torch.Tensor:
    scales = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (x / scales).round() * scales


ROUNDINGS: dict[str, Rounding] = {"w4a8": int8_rows, "w4afp8": fp8_rows, "fp8": fp8_groups}


# ---- steps over pages ----


@dataclass
class Request:
    """One conversation: its tokens in the cache, its pages, and what it brings next."""

    pages: list[int]
    history: int
    new: Sequence[int]


class Step:
    """The new tokens of some requests in one piece, as the ops take them."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        lens = [len(r.new) for r in requests]
        self.requests = requests
        self.max_query_len = max(lens)

        def ints(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        starts = [0]
        for count in lens:
            starts.append(starts[-1] + count)
        width = max(len(r.pages) for r in requests)
        self.ids = torch.tensor([i for r in requests for i in r.new], device=device)
        self.query_lens, self.history_lens = ints(lens), ints([r.history for r in requests])
        self.cu_seqlens_q = ints(starts)
        numbers = torch.arange(len(requests), device=device, dtype=torch.int32)
        self.owners = numbers.repeat_interleave(self.query_lens.long())
        self.positions = (
            torch.arange(starts[-1], device=device)
            - self.cu_seqlens_q[:-1].long()[self.owners.long()]
            + self.history_lens.long()[self.owners.long()]
        )
        self.tables = ints([r.pages + [-1] * (width - len(r.pages)) for r in requests])
        self.last_rows = self.cu_seqlens_q[1:].long() - 1

    def batch(self, num_pages: int, rows: slice) -> tuple[capi.Batch, list[torch.Tensor]]:
        """The struct of some of its rows, and what must outlive it."""
        kept = [self.owners[rows].contiguous(), self.cu_seqlens_q - rows.start]
        batch = capi.Batch(
            batch_id_per_token=kept[0].data_ptr(),
            cu_seqlens_q=kept[1].data_ptr(),
            query_lens=self.query_lens.data_ptr(),
            history_lens=self.history_lens.data_ptr(),
            block_tables=self.tables.data_ptr(),
            num_tokens=len(kept[0]),
            batch_size=len(self.requests),
            max_blocks=self.tables.shape[1],
            num_pages=num_pages,
            max_query_len=self.max_query_len,
        )
        return batch, kept


class Pages:
    """K, V and the compressed keys of every layer, by page."""

    def __init__(
        self, config: MiniCPMConfig, count: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        def rows(number: int) -> list[torch.Tensor]:
            shape = (count, config.num_kv_heads, number, config.head_dim)
            return [
                torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
            ]

        self.k, self.v, self.k1, self.k2 = rows(BLOCK_SIZE), rows(BLOCK_SIZE), rows(4), rows(1)
        self._next = 0
        self._count = count

    def take(self, count: int) -> list[int]:
        """Pages that nobody has."""
        assert self._next + count <= self._count
        self._next += count
        return list(range(self._next - count, self._next))

    def fork(self, parent: Request, new: Sequence[int], more: int) -> Request:
        """A request that goes on after ``parent``: its whole pages are shared, the last one, if it
        is filled in part, is copied.

        Args:
            more: tokens there must be room for after ``new``.
        """
        whole = parent.history // BLOCK_SIZE
        own = self.take(-(-(parent.history % BLOCK_SIZE + len(new) + more) // BLOCK_SIZE))
        if parent.history % BLOCK_SIZE:
            for caches in (self.k, self.v, self.k1, self.k2):
                for cache in caches:
                    cache[own[0]] = cache[parent.pages[whole]]
        return Request(parent.pages[:whole] + own, parent.history, new)


# ---- the model ----


class Model:
    """Everything but attention; ``attention`` is one of the two engines."""

    def __init__(
        self,
        config: MiniCPMConfig,
        weights: dict[str, torch.Tensor],
        rounding: Rounding | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.rounding, self.dtype, self.device = config, rounding, dtype, device

        def get(*names: str) -> torch.Tensor:
            return torch.cat([weights[f"{n}.weight"] for n in names]).to(device, dtype)

        self.embedding = get("model.embed_tokens")
        self.norm = get("model.norm")
        self.head = get("lm_head") if "lm_head.weight" in weights else self.embedding
        self.layers = []
        for i in range(config.num_layers):
            a, m, layer = (f"model.layers.{i}.{part}" for part in ("self_attn.", "mlp.", ""))
            self.layers.append(
                (
                    get(layer + "input_layernorm"),
                    get(a + "q_proj", a + "k_proj", a + "v_proj"),
                    get(a + "o_proj"),
                    get(layer + "post_attention_layernorm"),
                    get(m + "gate_proj", m + "up_proj"),
                    get(m + "down_proj"),
                )
            )
        table = rope_table(config, config.max_position_embeddings)
        self.cos, self.sin = (torch.from_numpy(t).to(device) for t in table)

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.rounding is not None:
            x = self.rounding(x.float()).to(self.dtype)
        return F.linear(x, weight)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.config.rms_norm_eps)

    def forward(self, step: Step, attention: Attention) -> torch.Tensor:
        """Hidden states of the step's rows, scaled for the head."""
        x = self.embedding[step.ids] * self.config.scale_emb
        scale = self.config.residual_scale
        for index, (norm, qkv, o, post_norm, gate_up, down) in enumerate(self.layers):
            rows = self.linear(self.rms_norm(x, norm), qkv)
            x = x + self.linear(attention(index, rows, step), o) * scale
            gate, up = self.linear(self.rms_norm(x, post_norm), gate_up).chunk(2, -1)
            x = x + self.linear(F.silu(gate) * up, down) * scale
        return self.rms_norm(x, self.norm) * self.config.logits_scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.head).float()


class Attention:
    """Attends to pages; counts the blocks that sparse rows read and could have read."""

    def __init__(self, model: Model, pages: Pages, sparse: SparseConfig | None) -> None:
        self.model, self.pages, self.sparse = model, pages, sparse
        self.counts = False
        self.attended = self.present = 0

    def __call__(self, layer: int, qkv: torch.Tensor, step: Step) -> torch.Tensor:
        raise NotImplementedError

    def count(self, attended: torch.Tensor, positions: torch.Tensor) -> None:
        """attended: blocks ``[rows, ...]`` of rows at ``positions``, or lists, -1 padded."""
        assert self.sparse is not None
        if not self.counts:
            return
        is_sparse = positions + 1 >= self.sparse.dense_len
        self.attended += int(attended[is_sparse].sum())
        kv_heads = self.model.config.num_kv_heads
        self.present += kv_heads * int((positions[is_sparse] // BLOCK_SIZE + 1).sum())

    def blocks_read(self) -> float | None:
        share = self.attended / self.present if self.present else None
        self.attended = self.present = 0
        return share


class OpsAttention(Attention):
    """The project's ops through their C interface: CUDA on a GPU, C++ elsewhere."""

    def __call__(self, layer: int, qkv: torch.Tensor, step: Step) -> torch.Tensor:
        config, pages = self.model.config, self.pages
        heads = capi.Heads(
            config.num_q_heads,
            config.num_kv_heads,
            config.head_dim,
            capi.DTYPES[DTYPES[qkv.dtype]],
        )
        rule = self.sparse or SparseConfig()
        dense_len = NEVER_SPARSE if self.sparse is None else rule.dense_len
        size, width = qkv.element_size(), qkv.shape[1]
        num_pages = len(pages.k[0])
        k, v, k1, k2 = (c[layer].data_ptr() for c in (pages.k, pages.v, pages.k1, pages.k2))
        batch, kept = step.batch(num_pages, slice(0, len(qkv)))
        q = qkv.data_ptr()
        k_new = q + config.num_q_heads * config.head_dim * size
        self.run(
            capi.RopeAndWriteKvParams(
                batch=batch,
                heads=heads,
                q=q,
                k=k_new,
                v=k_new + config.num_kv_heads * config.head_dim * size,
                cos=self.model.cos.data_ptr(),
                sin=self.model.sin.data_ptr(),
                k_cache=k,
                v_cache=v,
                q_stride=width,
                k_stride=width,
                v_stride=width,
                max_position=len(self.model.cos),
            )
        )
        if self.sparse is not None:
            self.run(
                capi.CompressKeysParams(
                    batch=batch, heads=heads, k_cache=k, k1_cache=k1, k2_cache=k2
                )
            )
        out = qkv.new_empty(len(qkv), config.num_q_heads * config.head_dim)
        for first in range(0, len(qkv), STEP_ROWS):
            rows = slice(first, min(first + STEP_ROWS, len(qkv)))
            batch, kept = step.batch(num_pages, rows)
            count = rows.stop - rows.start
            topk_idx = torch.full(
                (config.num_kv_heads, count, rule.budget), -1, dtype=torch.int32, device=qkv.device
            )
            shared = {
                "batch": batch,
                "heads": heads,
                "q": qkv[rows].data_ptr(),
                "topk_idx": topk_idx.data_ptr(),
                "q_stride": width,
                "softmax_scale": config.head_dim**-0.5,
                "budget": rule.budget,
                "dense_len": dense_len,
            }
            if self.sparse is not None:
                self.run(
                    capi.SelectBlocksParams(
                        k1_cache=k1,
                        k2_cache=k2,
                        init_blocks=rule.init_blocks,
                        local_blocks=rule.local_blocks + 1,
                        **shared,
                    )
                )
                self.count((topk_idx >= 0).sum((0, 2)), step.positions[rows])
            self.run(
                capi.SparseAttentionParams(
                    k_cache=k,
                    v_cache=v,
                    out=out[rows].data_ptr(),
                    out_stride=out.shape[1],
                    **shared,
                )
            )
            # Memory is handed out again in the order of the stream, so that nothing need wait.
            del kept
        return out

    def run(self, params: Any) -> None:
        if self.model.device.type == "cpu":
            capi.run_cpu(params)
            return
        workspace = None
        if isinstance(params, capi.SelectBlocksParams | capi.SparseAttentionParams):
            params.workspace_bytes = capi.workspace_cuda(params)
            if params.workspace_bytes:
                workspace = torch.empty(
                    params.workspace_bytes, dtype=torch.uint8, device=self.model.device
                )
                params.workspace = workspace.data_ptr()
        capi.run_cuda(params, torch.cuda.current_stream().cuda_stream)


class ReferenceAttention(Attention):
    """``docs/sparse_attention.md`` in plain PyTorch and float32, over the same pages."""

    def __call__(self, layer: int, qkv: torch.Tensor, step: Step) -> torch.Tensor:
        config, dim = self.model.config, self.model.config.head_dim
        sizes = [config.num_q_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = qkv.unflatten(-1, (-1, dim)).split(sizes, 1)
        q, k = (self.rotate(x, step.positions) for x in (q, k))
        pages = step.tables[step.owners.long(), step.positions // BLOCK_SIZE].long()
        slots = step.positions % BLOCK_SIZE
        self.pages.k[layer][pages, :, slots] = k
        self.pages.v[layer][pages, :, slots] = v
        out = torch.empty_like(q)
        for numbers, length in self.groups(step):
            starts = step.cu_seqlens_q[numbers].long()
            rows = (starts[:, None] + torch.arange(length, device=q.device)).flatten()
            positions = step.positions[rows].view(-1, length)
            blocks = int(positions.max()) // BLOCK_SIZE + 1
            tables = step.tables[numbers][:, :blocks].long()
            # Of a shorter request there is more than it has; its positions hide that.
            keys, values = (
                cache[layer][tables].transpose(1, 2).flatten(2, 3)
                for cache in (self.pages.k, self.pages.v)
            )
            part = q[rows].view(len(numbers), length, *q.shape[1:])
            out[rows] = self.attend(part, keys, values, positions).flatten(0, 1)
        return out.flatten(1)

    def groups(self, step: Step) -> Iterator[tuple[list[int], int]]:
        """Requests with as many new tokens each, no more than memory holds, alike in length."""
        alike: dict[int, list[int]] = {}
        for number in sorted(range(len(step.requests)), key=lambda n: step.requests[n].history):
            alike.setdefault(len(step.requests[number].new), []).append(number)
        for length, numbers in alike.items():
            longest = max(step.requests[n].history for n in numbers) + length
            c = self.model.config
            # Keys and values, gathered and copied, and the scores.
            numbers_a_key = 4 * c.num_kv_heads * c.head_dim + c.num_q_heads * length
            most = max(1, SCORE_BYTES // (4 * longest * numbers_a_key))
            for first in range(0, len(numbers), most):
                yield numbers[first : first + most], length

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.model.cos[positions][:, None], self.model.sin[positions][:, None]
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """q: ``[batch, length, heads, dim]`` at ``positions [batch, length]``; k, v: ``[batch,
        kv_heads, whole blocks, dim]`` up to the last position at least."""
        batch, length = q.shape[:2]
        step = max(1, min(length, SCORE_BYTES // (4 * batch * q.shape[2] * k.shape[2])))
        windows = None
        if self.sparse is not None:
            windows = compress_keys(k.transpose(1, 2), self.sparse)
        parts = []
        for first in range(0, length, step):
            rows, at = q[:, first : first + step], positions[:, first : first + step]
            blocks = int(at.max()) // BLOCK_SIZE + 1
            end = blocks * BLOCK_SIZE
            visible = (torch.arange(end, device=q.device) <= at[..., None])[:, None]
            if windows is not None and self.sparse is not None:
                c = self.sparse
                k1 = windows[0][:, : max(0, (end - c.kernel_size) // c.kernel_stride + 1)]
                coarse = (end - c.coarse_kernel_size) // c.coarse_kernel_stride + 1
                scores = score_blocks(rows, k1, windows[1][:, : max(0, coarse)], c, at, blocks)
                chosen = choose_blocks(scores, at, c)
                self.count(chosen.sum((1, 3)).flatten(), at.flatten())
                visible = visible & chosen.repeat_interleave(BLOCK_SIZE, -1)
            parts.append(self.softmax_rows(rows, k[:, :, :end], v[:, :, :end], visible))
        return torch.cat(parts, 1)

    def softmax_rows(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """visible: ``[batch, kv_heads or 1, rows, keys]``."""
        batch, rows, _, dim = q.shape
        kv_heads = k.shape[1]
        # The heads of a group and the rows together, so that no key is copied for each head.
        grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4) * dim**-0.5
        logits = grouped.flatten(2, 3) @ k.mT
        logits.view(batch, kv_heads, -1, rows, k.shape[2]).masked_fill_(
            ~visible.unsqueeze(2), float("-inf")
        )
        out = (logits.softmax(-1) @ v).unflatten(2, (-1, rows))
        return out.permute(0, 3, 1, 2, 4).reshape(q.shape)


ENGINES: dict[str, tuple[type[Attention], torch.dtype]] = {
    "ops": (OpsAttention, torch.bfloat16),
    "reference": (ReferenceAttention, torch.float32),
}


# ---- the examination ----


class Examiner:
    """Prompts, made once, and the cells measured with them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.config = MiniCPMConfig.from_pretrained(args.model)
        self.tokenizer = Tokenizer(args.model)
        self.device = torch.device(args.device)
        prose = examination_paragraphs()
        self.documents = {
            n: make_documents(self.tokenizer, prose, n, args.questions) for n in args.lengths
        }
        self.prompts = {
            kind: make_short_prompts(self.tokenizer, kind, args.prompts) for kind in PROMPT_KINDS
        }
        self.windows = make_windows(self.tokenizer, prose, args.window_length, args.windows)
        self._models: dict[tuple[str, str], Model] = {}

    def model(self, engine: str, weights: str) -> Model:
        if (engine, weights) not in self._models:
            self._models.clear()
            tensors = read_weights(self.args.model, self.args.formats, weights)
            self._models[engine, weights] = Model(
                self.config, tensors, ROUNDINGS.get(weights), ENGINES[engine][1], self.device
            )
        return self._models[engine, weights]

    def attention(self, cell: Row, num_pages: int) -> Attention:
        model = self.model(cell["engine"], cell["weights"])
        kind, dtype = ENGINES[cell["engine"]]
        sparse = self.config.sparse if cell["attention"] == "sparse" else None
        return kind(model, Pages(self.config, num_pages, dtype, self.device), sparse)

    def examine(self, cell: Row) -> Row:
        """The row of a cell."""
        began = time.perf_counter()
        measures = {"retrieval": self.retrieve, "perplexity": self.read, "format": self.reply}
        with torch.inference_mode():
            result = measures[cell["task"]](cell)
        return cell | result | {"seconds": round(time.perf_counter() - began, 2)}

    def retrieve(self, cell: Row) -> Row:
        documents = self.documents[cell["length"]]
        pages_each = [-(-len(d.shared) // BLOCK_SIZE) for d in documents]
        # A fork has room for its part of a page, a question and an answer.
        per_fork = 2 + -(-(ANSWER_TOKENS + max(len(r) for d in documents for r in d.rests)) // 64)
        forks = sum(len(d.rests) for d in documents)
        attention = self.attention(cell, sum(pages_each) + forks * per_fork)
        parents = [
            Request(attention.pages.take(count), 0, d.shared)
            for d, count in zip(documents, pages_each, strict=True)
        ]
        for some in batches(parents, STEP_ROWS):
            attention.model.forward(Step(some, self.device), attention)
        requests = []
        for document, parent in zip(documents, parents, strict=True):
            parent.history = len(document.shared)
            requests += [
                attention.pages.fork(parent, rest, ANSWER_TOKENS) for rest in document.rests
            ]
        attention.counts = True
        replies = self.write(requests, attention, ANSWER_TOKENS)
        questions = [q for d in documents for q in d.questions]
        row = retrieval_score(questions, replies)
        share = attention.blocks_read()
        return row | ({} if share is None else {"blocks_read": round(share, 4)})

    def read(self, cell: Row) -> Row:
        pages = -(-len(self.windows[0]) // BLOCK_SIZE)
        attention = self.attention(cell, pages)
        model = attention.model
        total, tokens = 0.0, 0
        for window in self.windows:
            step = Step([Request(list(range(pages)), 0, window)], self.device)
            hidden = model.forward(step, attention)
            targets = torch.tensor(window[1:], device=self.device)
            loss = F.cross_entropy(model.logits(hidden[:-1]), targets, reduction="sum")
            total += float(loss)
            tokens += len(window) - 1
        return {"tokens": tokens, "perplexity": round(math.exp(total / tokens), 5)}

    def reply(self, cell: Row) -> Row:
        prompts = self.prompts[cell["kind"]]
        pages = [-(-(len(p.ids) + REPLY_TOKENS) // BLOCK_SIZE) for p in prompts]
        attention = self.attention(cell, sum(pages))
        requests = [
            Request(attention.pages.take(n), 0, p.ids) for p, n in zip(prompts, pages, strict=True)
        ]
        replies = self.write(requests, attention, REPLY_TOKENS)
        return format_score([p.prompt for p in prompts], replies)

    def write(self, requests: list[Request], attention: Attention, most: int) -> list[str]:
        """Greedy replies to requests, all at once; a reply ends before a stop token."""
        model = attention.model
        replies: list[list[int]] = [[] for _ in requests]
        waiting = list(range(len(requests)))
        for _ in range(most):
            tokens: list[int] = []
            for some in batches([requests[n] for n in waiting], STEP_ROWS):
                step = Step(some, self.device)
                hidden = model.forward(step, attention)
                tokens += model.logits(hidden[step.last_rows]).argmax(-1).tolist()
            for number, token in zip(waiting, tokens, strict=True):
                request = requests[number]
                request.history += len(request.new)
                request.new = [token]
                if token not in self.tokenizer.stop_ids:
                    replies[number].append(token)
            waiting = [n for n in waiting if requests[n].new[0] not in self.tokenizer.stop_ids]
            if not waiting:
                break
        return [self.tokenizer.decode(reply) for reply in replies]


def batches(requests: Sequence[Request], most: int) -> Iterator[list[Request]]:
    """The requests in order, in steps of at most ``most`` new tokens, or of one request."""
    some: list[Request] = []
    for request in requests:
        if some and sum(len(r.new) for r in some) + len(request.new) > most:
            yield some
            some = []
        some.append(request)
    yield some


def cells(args: argparse.Namespace) -> Iterator[Row]:
    """The cells that were asked for, the most telling first."""
    for cell in every_cell(args):
        if cell["engine"] in args.engine and cell["attention"] in args.attention:
            yield cell


def every_cell(args: argparse.Namespace) -> Iterator[Row]:
    def retrieval(
        engine: str, attention: str, weights: str, lengths: Sequence[int]
    ) -> Iterator[Row]:
        head = {"task": "retrieval", "engine": engine, "attention": attention, "weights": weights}
        for length in lengths:
            yield head | {"length": length, "questions": args.questions, "seed": SEED}

    def others(engine: str, attention: str, weights: str, kinds: Sequence[str]) -> Iterator[Row]:
        head = {"engine": engine, "attention": attention, "weights": weights}
        sizes = {"length": args.window_length, "windows": args.windows}
        yield {"task": "perplexity", **head, **sizes}
        for kind in kinds if args.prompts else ():
            yield {"task": "format", **head, "kind": kind, "prompts": args.prompts, "seed": SEED}

    unrounded = [weights for weights in args.weights if weights == "bf16"]
    low_bit = [weights for weights in args.weights if weights != "bf16"]
    for weights in unrounded:
        for attention in ATTENTIONS:
            yield from retrieval("ops", attention, weights, args.lengths)
            yield from others("ops", attention, weights, PROMPT_KINDS)
        for attention in ATTENTIONS:
            yield from retrieval("reference", attention, weights, args.lengths)
            yield from others("reference", attention, weights, ())
    for weights in low_bit:
        yield from retrieval("ops", "sparse", weights, args.lengths)
        yield from others("ops", "sparse", weights, FORMAT_KINDS)
    for weights in low_bit:
        yield from retrieval("ops", "dense", weights, args.lengths)
        yield from others("ops", "dense", weights, ())
    # Where the kernels are held to the reference: it takes ten times as long.
    long = [length for length in args.lengths if length >= LONG]
    for weights in low_bit:
        for attention in ATTENTIONS:
            yield from retrieval("reference", attention, weights, long)
    for weights in low_bit:
        yield from others("ops", "sparse", weights, PROMPT_KINDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="(default: the small model of the package)")
    parser.add_argument("--formats", type=Path, help="folder with the low-bit checkpoints")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--questions", type=int, default=256, help="for each length")
    parser.add_argument("--prompts", type=int, default=500, help="of each kind; 0: none")
    parser.add_argument("--windows", type=int, default=3, help="of prose")
    parser.add_argument("--window-length", type=int, default=16384)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="starts no cell after that")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/small_model_h100.json"
    )
    args = parser.parse_args()
    began = time.perf_counter()
    if args.model is None:
        from fd_minicpm41.small_model import path

        args.model = path()
    model_sha256 = hash_file(args.model / "model.safetensors")
    result: dict[str, Any] = {"model": model_sha256, "rows": []}
    with suppress(FileNotFoundError):
        held = json.loads(args.out.read_text())
        if held["model"] != model_sha256:
            raise SystemExit(f"{args.out} is of another model: remove it or give another --out")
        result["rows"] = held["rows"]
    command = "python " + shlex.join(sys.argv)
    if args.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        result["environment"] = measure.environment(command)
    else:
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        cores = len(os.sched_getaffinity(0))
        versions = {"torch": torch.__version__, "date": date}
        result["environment"] = {"processors": cores, **versions, "command": command}
    examiner = Examiner(args)
    print(f"prompts made after {time.perf_counter() - began:.1f} s", flush=True)
    left = failed = 0
    for cell in cells(args):
        if any(all(row.get(k) == v for k, v in cell.items()) for row in result["rows"]):
            continue
        if time.perf_counter() - began > args.seconds:
            left += 1
            continue
        try:
            row = examiner.examine(cell)
        except (RuntimeError, capi.KernelError):
            # The other cells are worth the GPU's time all the same.
            traceback.print_exc()
            print(f"failed: {cell}", flush=True)
            failed += 1
            continue
        result["rows"].append(row)
        measure.write_json(args.out, result)
        print({k: v for k, v in row.items() if k not in ("depths", "seed")}, flush=True)
    print(
        f"{len(result['rows'])} cells, {left} left for another run, "
        f"{time.perf_counter() - began:.1f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
