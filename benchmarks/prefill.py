"""Prefill, one layer, one prompt: the whole sparse step beside the dense kernels of the same run.

A step is what the server does: complete the compressed keys, then select and attend in windows of
``WINDOW_ROWS`` rows, so that the lists of one window are all the scratch there is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import measure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu"), str(ROOT / "src")]
from gpu_ops import NOT_WRITTEN, Sizes, assert_row, download  # noqa: E402

import capi  # noqa: E402
from workload import (  # noqa: E402
    HEAD_DIM,
    KV_HEADS,
    MEASURED_UNIONS,
    Q_HEADS,
    WINDOW_ROWS,
    Pages,
    Prompt,
    union_sizes,
)

LENGTHS = (8192, 16384, 32768, 65536, 131072)
# Correlated prompts: the most milliseconds, or so many times the better dense kernel. At 8K, where
# all rows but one are dense, nothing is promised.
TARGETS_MS = {32768: 9.5, 65536: 20.0, 131072: 45.0}
TARGET_OF_DENSE = {16384: 1.15}
# Independent prompts, against cuDNN.
WORST_OF_DENSE = {32768: 1.3, 65536: 1.0, 131072: 1.0}
# All positions of the small model, and the longest prompts that it was trained on.
SMALL_MODEL_LENGTHS = (32768, 16384)
CHUNKED_LENGTH = 65536
CHUNKS = (2048, 4096, 8192)
CHUNKED_MARGIN = 1.15
UNION_MARGIN = 0.10
EXTRA_MIB = 64
REBUILD_LENGTH, REBUILD_LAYERS, REBUILD_MS = 131072, 32, 3.0
SIZES = Sizes()


class PrefillStep:
    """The launches of one step over tokens ``start .. end - 1`` of a prompt, ready to be run."""

    def __init__(self, prompt: Pages, out: torch.Tensor, start: int, end: int) -> None:
        query_len = end - start
        window = min(WINDOW_ROWS, query_len)
        self.topk_idx = torch.full(
            (KV_HEADS * window * SIZES.budget,), NOT_WRITTEN, dtype=torch.int32, device="cuda"
        )
        whole = prompt.rows(start, query_len, 0, query_len)
        # As the server does: pages of a prefix may have come without compressed keys.
        self.compress_from = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.compress = capi.compress_keys_params(whole, self.compress_from)
        self.windows = []
        self.workspace = torch.empty(0, dtype=torch.uint8, device="cuda")
        self._kept: list[Any] = [prompt, out, whole]
        for first in range(0, query_len, window):
            rows = prompt.rows(start, query_len, first, min(window, query_len - first))
            topk_idx = self.lists(rows.num_tokens)
            into = out[start + first : start + first + rows.num_tokens]
            # Only the first one has compress_keys right before it.
            select = capi.select_blocks_params(rows, SIZES, topk_idx, overlap=int(first == 0))
            attend = capi.sparse_attention_params(rows, topk_idx, into, SIZES.dense_len, overlap=1)
            self.windows.append((select, attend))
            self._kept.append(rows)
        for params in (one for window in self.windows for one in window):
            params.workspace_bytes = capi.workspace_cuda(params)
            if params.workspace_bytes > len(self.workspace):
                self.workspace = torch.full(
                    (params.workspace_bytes,), 0xA5, dtype=torch.uint8, device="cuda"
                )
        for params in (one for window in self.windows for one in window):
            params.workspace = self.workspace.data_ptr()

    def lists(self, num_rows: int) -> torch.Tensor:
        """The lists of a window of so many rows, in the buffer that all windows share."""
        shape = (KV_HEADS, num_rows, SIZES.budget)
        return self.topk_idx[: KV_HEADS * num_rows * SIZES.budget].view(shape)

    @property
    def extra_bytes(self) -> int:
        """Memory beyond the inputs, the compressed keys and the outputs."""
        return self.topk_idx.numel() * 4 + len(self.workspace)

    def run(self, mark: Callable[[str], None] = lambda op: None) -> None:
        """Launches everything; ``mark`` is called after each op."""
        stream = torch.cuda.current_stream().cuda_stream
        capi.run_cuda(self.compress, stream)
        mark("compress")
        for select, attend in self.windows:
            capi.run_cuda(select, stream)
            mark("select")
            capi.run_cuda(attend, stream)
            mark("attend")

    def run_and_collect(self) -> torch.Tensor:
        """Runs, and gives the lists of all rows: ``[KV_HEADS, rows, budget]``."""
        collected: list[torch.Tensor] = []

        def keep(op: str) -> None:
            if op == "select":
                rows = self.windows[len(collected)][0].batch.num_tokens
                collected.append(self.lists(rows).clone())

        self.topk_idx.fill_(NOT_WRITTEN)
        self.run(keep)
        torch.cuda.synchronize()
        return torch.cat(collected, 1)

    def parts_ms(self, repeats: int) -> dict[str, float]:
        """Median time of each op, over all windows. An event between two ops keeps them apart, so
        together they take longer than the step."""
        totals: dict[str, list[float]] = {"compress": [], "select": [], "attend": []}
        for _ in range(repeats):
            events: list[tuple[str, torch.cuda.Event]] = []

            def mark(op: str, events: list = events) -> None:
                events.append((op, torch.cuda.Event(enable_timing=True)))
                events[-1][1].record()

            mark("start")
            self.run(mark)
            torch.cuda.synchronize()
            times = dict.fromkeys(totals, 0.0)
            for (_, before), (op, after) in zip(events, events[1:], strict=False):
                times[op] += before.elapsed_time(after)
            for op, spent in times.items():
                totals[op].append(spent)
        return {f"{op}_ms": statistics.median(spent) for op, spent in totals.items()}


def median_ms(run: Callable[[], None], repeats: int) -> float:
    """Median milliseconds of a call; what it reads and writes is larger than L2 from 8K rows on."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def check(prompt: Pages, topk_idx: torch.Tensor, out: torch.Tensor) -> None:
    """Holds sampled rows to the oracle, and every row to having been written."""
    assert bool((topk_idx[:, SIZES.dense_len :] >= 0).all()), "a list is not full"
    assert bool(torch.isfinite(out).all()), "not every output was written"
    length = prompt.length
    keys, values, k1, k2 = (
        download(prompt.in_order(cache).contiguous())
        for cache in (prompt.k_cache, prompt.v_cache, prompt.k1_cache, prompt.k2_cache)
    )
    switch = SIZES.dense_len
    edges = [0, 63, 64, 6143, 6144, switch - 2, switch - 1, length // 2, length - 1]
    others = np.random.default_rng(length).integers(min(switch, length // 2), length, 12)
    for position in sorted({p for p in (*edges, *others.tolist()) if p < length}):
        q, into = download(prompt.q[position]), download(out[position])
        for head in range(KV_HEADS):
            heads = slice(16 * head, 16 * head + 16)
            assert_row(
                q[heads],
                keys[head],
                values[head],
                # Flat slot u holds fine window u - 1, slot b of K2 coarse window b - 1.
                (k1[head, 1:], k2[head, 1:]),
                position,
                SIZES,
                download(topk_idx[head, position]),
                into[heads],
            )


def flops_of_prompt(length: int) -> float:
    """Multiplications and additions that no order of work avoids: the windows that must be scored,
    the listed tokens."""
    p = np.arange(length, dtype=np.int64)
    own = p // 64
    is_scored = (own >= SIZES.budget) & (p + 1 >= SIZES.dense_len)
    windows = (p + 1) // 16 - 1 - 4 * SIZES.local_blocks + (p + 1) // 64 - 1
    listed = np.where(is_scored, (SIZES.budget - 1) * 64 + p % 64 + 1, p + 1)
    return float(2 * HEAD_DIM * Q_HEADS * (np.sum(windows * is_scored) + 2 * listed.sum()))


def dense_ms(prompt: Pages, repeats: int) -> dict[str, float]:
    """cuDNN and FlashAttention-2 of PyTorch over the same queries, keys and values."""
    q = prompt.q.transpose(0, 1)[None]
    keys, values = (
        prompt.in_order(cache)[None, :, : prompt.length].contiguous()
        for cache in (prompt.k_cache, prompt.v_cache)
    )
    row = {}
    for name, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
    ):
        with sdpa_kernel(backend):

            def run() -> None:
                torch.nn.functional.scaled_dot_product_attention(
                    q, keys, values, is_causal=True, enable_gqa=True
                )

            row[f"{name}_ms"] = median_ms(run, repeats)
    row["dense_ms"] = min(row.values())
    return row


def one_shot(prompt: Pages, kind: str, repeats: int) -> tuple[dict[str, Any], Any]:
    """A row of the table, and what a chunked run of the same prompt is compared with."""
    length = prompt.length
    out = torch.full_like(prompt.q, float("nan"))
    step = PrefillStep(prompt, out, 0, length)
    torch.cuda.synchronize()
    free_before = torch.cuda.mem_get_info()[0]
    row: dict[str, Any] = {"kind": kind, "length": length}
    row["ours_ms"] = median_ms(step.run, repeats)
    hidden = free_before - torch.cuda.mem_get_info()[0]
    row |= step.parts_ms(repeats)
    timed = out.clone()
    out.fill_(float("nan"))
    topk_idx = step.run_and_collect()
    assert torch.equal(timed, out), "two runs differ"
    check(prompt, topk_idx, out)
    row["extra_mib"] = (step.extra_bytes + hidden) / 2**20
    # Rows past the middle choose from twice the dense length on.
    sizes = union_sizes(topk_idx) if length >= 2 * SIZES.dense_len else {}
    row["unions"] = {str(n): size for n, size in sizes.items()}
    return row, (prompt, topk_idx, out)


def chunked(prompt: Pages, topk_idx: torch.Tensor, out: torch.Tensor, size: int, repeats: int):
    """All chunks of a prompt one after the other, and whether lists and outputs are the same."""
    parts = torch.full_like(out, float("nan"))
    steps = [
        PrefillStep(prompt, parts, start, min(start + size, prompt.length))
        for start in range(0, prompt.length, size)
    ]

    def run() -> None:
        for step in steps:
            step.run()

    row: dict[str, Any] = {"kind": "chunked", "length": prompt.length, "chunk": size}
    row["ours_ms"] = median_ms(run, repeats)
    parts_ms = [step.parts_ms(3) for step in steps]
    row |= {name: sum(part[name] for part in parts_ms) for name in parts_ms[0]}
    # Rows that are dense, or have no more blocks than the budget, choose nothing.
    lists = torch.cat([step.run_and_collect() for step in steps], 1)
    first = max(SIZES.dense_len - 1, 0)
    row["same_selection"] = torch.equal(lists[:, first:], topk_idx[:, first:])
    row["same_output"] = torch.equal(parts, out)
    return row


def rebuild() -> dict[str, Any]:
    """All windows of a prefix, for every layer of the model."""
    layers = [Pages(REBUILD_LENGTH)]
    tables = layers[0].block_tables
    layers += [Pages(REBUILD_LENGTH, tables) for _ in range(REBUILD_LAYERS - 1)]
    start = torch.zeros(1, dtype=torch.int32, device="cuda")
    steps = [layer.rows(REBUILD_LENGTH - 1, 1, 0, 1) for layer in layers]
    launches = [capi.compress_keys_params(step, start) for step in steps]

    def run(i: int) -> None:
        capi.run_cuda(launches[i], torch.cuda.current_stream().cuda_stream)

    milliseconds = measure.graph_time(run, REBUILD_LAYERS) * REBUILD_LAYERS / 1e3
    last = layers[-1]
    keys = last.in_order(last.k_cache).float()
    for cache, size in ((last.k1_cache, 32), (last.k2_cache, 128)):
        got = last.in_order(cache)[:, 1:].float()
        wanted = keys.unfold(1, size, size // 2).mean(-1).to(torch.bfloat16).float()
        # One unit in the last place: the additions are in another order.
        assert bool(((got - wanted).abs() <= wanted.abs() * 2.0**-7 + 1e-6).all())
    moved = sum(c.numel() * 2 for c in (last.k_cache, last.k1_cache, last.k2_cache))
    return {
        "kind": "rebuild",
        "length": REBUILD_LENGTH,
        "layers": REBUILD_LAYERS,
        "ours_ms": milliseconds,
        "bytes_per_second": moved * REBUILD_LAYERS / milliseconds * 1e3,
        "target_ms": REBUILD_MS,
        "held": milliseconds <= REBUILD_MS,
        "correct": True,
    }


def hold_to_target(row: dict[str, Any]) -> None:
    length = row["length"]
    target = None
    if row["kind"] == "correlated":
        if length in TARGET_OF_DENSE:
            target = TARGET_OF_DENSE[length] * row["dense_ms"]
        target = TARGETS_MS.get(length, target)
        row["unions_held"] = all(
            abs(size / MEASURED_UNIONS[int(n)] - 1) <= UNION_MARGIN
            for n, size in row["unions"].items()
        )
    elif row["kind"] == "independent" and length in WORST_OF_DENSE:
        target = WORST_OF_DENSE[length] * row["cudnn_ms"]
    row["target_ms"] = target
    is_fast = target is None or row["ours_ms"] <= target
    row["held"] = is_fast and row["extra_mib"] <= EXTRA_MIB


def parts_of(row: dict[str, Any]) -> str:
    return " ".join(f"{op} {row[f'{op}_ms']:.2f}" for op in ("compress", "select", "attend"))


def print_row(row: dict[str, Any]) -> None:
    unions = " ".join(f"{size:.0f}" for size in row["unions"].values())
    target = "-" if row["target_ms"] is None else f"{row['target_ms']:.2f}"
    print(
        f"{row['kind']:12}{row['length'] // 1024:4}K{row['ours_ms']:9.2f}{row['cudnn_ms']:9.2f}"
        f"{row['flash_ms']:9.2f}{row['floor_ms']:8.2f}{target:>8}"
        f"{row['dense_ms'] / row['ours_ms']:8.2f}  {'yes' if row['held'] else 'NO':4}"
        f" {parts_of(row)}; {row['extra_mib']:.1f} MiB; unions {unions}",
        flush=True,
    )


def own_unions(prompt: Pages, sizes: Sizes) -> dict[str, float]:
    """``union_sizes`` of the lists that a model's own ``sparse_config`` gives."""
    shape = (KV_HEADS, prompt.length, sizes.budget)
    topk_idx = torch.full(shape, NOT_WRITTEN, dtype=torch.int32, device="cuda")
    rows = prompt.rows(0, prompt.length, 0, prompt.length)
    # The compressed keys are there: the timed step wrote them.
    select = capi.select_blocks_params(rows, sizes, topk_idx)
    select.workspace_bytes = capi.workspace_cuda(select)
    workspace = torch.empty(select.workspace_bytes, dtype=torch.uint8, device="cuda")
    select.workspace = workspace.data_ptr()
    capi.run_cuda(select, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return {str(n): size for n, size in union_sizes(topk_idx).items()}


def small_model_prompts(folder: Path, repeats: int, rate: float) -> Iterator[dict[str, Any]]:
    """Rows of every layer of the small model over prose, with the published sizes; their lists
    with the model's own sizes are counted as well."""
    from fd_minicpm41.config import MiniCPMConfig
    from small_model_prompt import LayerPrompt, activations

    sparse = MiniCPMConfig.from_pretrained(folder).sparse
    assert sparse is not None
    own = Sizes(sparse.init_blocks, sparse.local_blocks, sparse.budget, sparse.dense_len)
    for length in SMALL_MODEL_LENGTHS:
        dense: dict[str, float] = {}
        for number, layer in enumerate(activations(folder, length, "cuda")):
            prompt = LayerPrompt(layer)
            row, _ = one_shot(prompt, "small model", repeats)
            dense = dense or dense_ms(prompt, repeats)
            row |= dense | {"floor_ms": flops_of_prompt(length) / rate * 1e3, "correct": True}
            row |= {"layer": number, "own_budget": own.budget}
            row["own_unions"] = own_unions(prompt, own)
            hold_to_target(row)
            print_row(row)
            own_words = " ".join(f"{size:.0f}" for size in row["own_unions"].values())
            print(f"  layer {number}; unions of its own {own.budget} blocks: {own_words}")
            yield row


def drawn_prompts(longest: int, repeats: int, rate: float) -> Iterator[dict[str, Any]]:
    """Rows of a rebuilt prefix, and of correlated and independent queries at every length, one of
    them in chunks too."""
    row = rebuild()
    print(
        f"rebuild {REBUILD_LENGTH // 1024}K x {REBUILD_LAYERS} layers: {row['ours_ms']:.2f} ms, "
        f"{row['bytes_per_second'] / 1e12:.2f} TB/s, target {REBUILD_MS}"
    )
    yield row
    torch.cuda.empty_cache()
    for length in (n for n in LENGTHS if n <= longest):
        dense: dict[str, float] = {}
        for is_correlated in (True, False):
            kind = "correlated" if is_correlated else "independent"
            row, made = one_shot(Prompt(length, is_correlated), kind, repeats)
            dense = dense or dense_ms(made[0], repeats)
            row |= dense | {"floor_ms": flops_of_prompt(length) / rate * 1e3, "correct": True}
            hold_to_target(row)
            print_row(row)
            yield row
            if is_correlated and length == CHUNKED_LENGTH:
                for size in CHUNKS:
                    part = chunked(*made, size, repeats)
                    part["one_shot_ms"] = row["ours_ms"]
                    ratio = part["ours_ms"] / row["ours_ms"]
                    part["held"] = ratio <= CHUNKED_MARGIN and part["same_selection"]
                    words = ("DIFFERS", "identical")
                    print(
                        f"  in chunks of {size}: {part['ours_ms']:.2f} ms, "
                        f"{ratio:.2f} of one shot ({parts_of(part)}), selection "
                        f"{words[part['same_selection']]}, output {words[part['same_output']]}",
                        flush=True,
                    )
                    yield part
            del made
            torch.cuda.empty_cache()


def main(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    rate = measure.product_rate()
    # Code is loaded at the first launch, and would count as extra memory.
    small = Prompt(256, is_correlated=False)
    PrefillStep(small, torch.empty_like(small.q), 0, small.length).run()
    if args.small_model is None:
        found = drawn_prompts(args.longest, args.repeats, rate)
    else:
        found = small_model_prompts(args.small_model, args.repeats, rate)
    print(
        f"{'prompt':12}{'':5}{'ours':>9}{'cuDNN':>9}{'FA2':>9}{'floor':>8}{'target':>8}"
        f"{'gain':>8}  held  milliseconds"
    )
    result = {
        "what": "prefill, one layer, one prompt, bfloat16, 32 query heads, 2 kv heads, "
        "head_dim 128, budget 96 blocks; milliseconds",
        "environment": measure.environment(args.command),
        "product_flops_per_second": rate,
        "repeats": args.repeats,
        "window_rows": WINDOW_ROWS,
        "measured_unions": {str(n): size for n, size in MEASURED_UNIONS.items()},
        "rows": [],
    }
    rows = result["rows"]
    for row in found:
        rows.append(measure.rounded(row))
        if args.out:  # what is known is kept if the run is cut short
            measure.write_json(args.out, result)
    missed = sum(not row["held"] for row in rows)
    print(f"{missed} of {len(rows)} rows miss their target")
    return 0
