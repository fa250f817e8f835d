"""One layer of attention on the CPU: a decode step, and a prefill sparse against dense.

Run from the repository root: ``python benchmarks/cpu_attention.py``. It writes
``benchmarks/results/cpu_attention.json`` and ``docs/images/cpu_attention.png``. Both sides of a
comparison are the same build and the same op; the dense one only has a ``dense_len`` beyond the
prompt. Outputs start as NaN, and rows of each are held against NumPy in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import capi  # noqa: E402
from cases import TRUE_GEOMETRY, Request, Step, make_step  # noqa: E402
from fd_minicpm41.config import SparseConfig  # noqa: E402

ALWAYS_DENSE = 2**31 - 1
# 1 initial block, 8 of the window and 15 chosen: 24, at which 8K tokens are worth being sparse.
PREFILL_CONFIG = SparseConfig(window_size=512, topk=16, dense_len=-1)
DECODE_CONFIG = replace(SparseConfig(), dense_len=-1)


class Layer:
    """The ops of one layer over one step."""

    def __init__(self, step: Step, config: SparseConfig) -> None:
        self.step, self.config = step, config
        shape = (step.geometry.num_kv_heads, step.num_tokens, config.budget)
        self.topk_idx = np.full(shape, -1, np.int32)
        self.out = np.full_like(step.q, np.nan)
        everything = np.zeros(len(step.requests), np.int32)
        capi.run_cpu(capi.compress_keys_params(step, everything))

    def sparse(self) -> None:
        """Complete the windows of the new tokens, select, attend."""
        capi.run_cpu(capi.compress_keys_params(self.step))
        capi.run_cpu(capi.select_blocks_params(self.step, self.config, self.topk_idx))
        self.attend(self.config.dense_len)

    def dense(self) -> None:
        self.attend(ALWAYS_DENSE)

    def attend(self, dense_len: int) -> None:
        capi.run_cpu(capi.sparse_attention_params(self.step, self.topk_idx, self.out, dense_len))

    def check(self, is_dense: bool) -> float:
        """Largest difference of a few rows of ``out`` from NumPy over the same blocks."""
        step, g = self.step, self.step.geometry
        keys, values = (a[0].astype(np.float64) for a in (step.keys, step.values))
        history_len, query_len = step.requests[0].history_len, step.requests[0].query_len
        worst = 0.0
        for token in sorted({0, query_len // 3, query_len - 1}):
            position = history_len + token
            for head in range(g.num_q_heads):
                group = head // g.group_size
                tokens = np.arange(position + 1)
                if not is_dense:
                    tokens = tokens[np.isin(tokens // 64, self.topk_idx[group, token])]
                logits = keys[tokens, group] @ step.q[token, head].astype(np.float64)
                weights = np.exp((logits - logits.max()) * g.head_dim**-0.5)
                wanted = weights @ values[tokens, group] / weights.sum()
                got = self.out[token, head].astype(np.float64)
                worst = max(worst, float(np.abs(got - wanted).max()))
        return worst


def milliseconds(runs: list[Callable[[], None]], repeats: int) -> float:
    """Median time; the calls take turns over ``runs``, whose data together exceed the cache."""
    times = []
    for number in range(repeats):
        start = time.perf_counter()
        runs[number % len(runs)]()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measure_decode(length: int, dtype: str, repeats: int) -> dict[str, object]:
    geometry = replace(TRUE_GEOMETRY, dtype=dtype)
    layers = [
        Layer(make_step([Request(length - 1, 1)], geometry, seed=s, padding_rows=0), DECODE_CONFIG)
        for s in range(2)
    ]
    result: dict[str, object] = {"length": length, "dtype": dtype}
    for name, is_dense in (("sparse", False), ("dense", True)):
        runs = [getattr(layer, name) for layer in layers]
        milliseconds(runs, len(runs))
        result[f"{name}_ms"] = milliseconds(runs, repeats)
        result[f"{name}_max_error"] = layers[0].check(is_dense)
    return result


def measure_prefill(length: int, dtype: str, repeats: int) -> dict[str, object]:
    geometry = replace(TRUE_GEOMETRY, dtype=dtype)
    layer = Layer(make_step([Request(0, length)], geometry, padding_rows=0), PREFILL_CONFIG)
    result: dict[str, object] = {
        "length": length,
        "dtype": dtype,
        "budget": PREFILL_CONFIG.budget,
    }
    for name, is_dense in (("sparse", False), ("dense", True)):
        layer.out.fill(np.nan)
        result[f"{name}_ms"] = milliseconds([getattr(layer, name)], repeats)
        result[f"{name}_max_error"] = layer.check(is_dense)
    result["speedup"] = result["dense_ms"] / result["sparse_ms"]  # type: ignore[operator]
    return result


def machine(load_before: float) -> dict[str, object]:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "cpu": names[0],
        "cores": len(os.sched_getaffinity(0)),
        # Above 0.1 or so before the start, something else ran beside it and the times are too long.
        "load_before": load_before,
        "threads": os.environ.get("FD_MINICPM41_CPU_THREADS", "one for each core"),
        "instruction_set": os.environ.get("FD_MINICPM41_CPU_ISA", "best"),
        "build": capi.build_info(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/cpu_attention.py",
    }


def draw(results: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for dtype, line in (("float32", "-"), ("bfloat16", "--")):
        rows = [row for row in results["decode"] if row["dtype"] == dtype]
        lengths = [row["length"] / 1024 for row in rows]
        for name, color in (("dense", "tab:gray"), ("sparse", "tab:blue")):
            times = [row[f"{name}_ms"] for row in rows]
            left.plot(lengths, times, line, color=color, marker="o", label=f"{name}, {dtype}")
    left.set(xlabel="context, Ki tokens", ylabel="ms", title="Decode step, one layer, 96 blocks")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    rows = [row for row in results["prefill"] if row["dtype"] == "float32"]
    places = np.arange(len(rows))
    for shift, name, color in ((-0.2, "dense", "tab:gray"), (0.2, "sparse", "tab:blue")):
        times = [row[f"{name}_ms"] / 1e3 for row in rows]
        right.bar(places + shift, times, 0.38, color=color, label=name)
    right.set_xticks(places, [f"{row['length'] // 1024}K\n{row['speedup']:.2f}x" for row in rows])
    right.set(xlabel="prompt", ylabel="s", title="Prefill, one layer, 24 blocks, float32")
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20, help="calls a decode median is of")
    parser.add_argument("--prefill-repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="32K decode and 8K prefill alone")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    decode = [32768] if options.quick else [4096, 8192, 16384, 32768, 65536]
    prefill = [8192] if options.quick else [2048, 4096, 8192, 16384]
    dtypes = ["float32"] if options.quick else ["float32", "bfloat16"]
    results: dict[str, list[dict]] = {"decode": [], "prefill": []}
    for dtype in dtypes:
        for length in decode:
            results["decode"].append(measure_decode(length, dtype, options.repeats))
            print(json.dumps(results["decode"][-1]), flush=True)
        for length in prefill:
            row = measure_prefill(length, dtype, options.prefill_repeats)
            results["prefill"].append(row)
            print(json.dumps(row), flush=True)
    if options.quick:
        return
    path = ROOT / "benchmarks" / "results" / "cpu_attention.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"machine": machine(load_before), **results}, indent=2) + "\n", "utf-8"
    )
    draw(results, ROOT / "docs" / "images" / "cpu_attention.png")


if __name__ == "__main__":
    main()
