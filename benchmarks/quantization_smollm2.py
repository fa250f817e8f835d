"""Accuracy of every weight format on a real model: SmolLM2-135M, through this package.

Run from the repository root: ``make accuracy``, or ``python benchmarks/quantization_smollm2.py``.
It quantises the demo's checkpoint (``make demo-smollm2`` fetches it) by the same code as
``fd-minicpm41 quantize``, reads 3 x 1024 tokens of Pride and Prejudice with both, and writes
``benchmarks/results/quantization_smollm2.json``. GPTQ calibrates on 3 x 1024 tokens of Sense and
Sensibility. ``--rows`` measures some rows anew and keeps the others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import paddle  # noqa: E402

from fd_minicpm41.cli.demo_smollm2 import CHECKPOINT, GGUF_SHA256  # noqa: E402
from fd_minicpm41.config import MiniCPMConfig  # noqa: E402
from fd_minicpm41.quantization.evaluation import (  # noqa: E402
    Evaluation,
    Side,
    evaluate,
    round_fp8_blocks,
    round_fp8_groups,
)
from fd_minicpm41.quantization.plan import Recipe  # noqa: E402
from fd_minicpm41.quantization.quantise import quantise  # noqa: E402
from fd_minicpm41.quantization.streaming import TokenWindows, read_windows  # noqa: E402
from fd_minicpm41.reference.checkpoint import Checkpoint  # noqa: E402
from fd_minicpm41.reference.tokenizer import Tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks/results/quantization_smollm2.json"
TEXT = ROOT / "tests/data/pride_and_prejudice.txt"
CALIBRATION = ROOT / "tests/data/sense_and_sensibility.txt"
WINDOWS, LENGTH = 3, 1024

# 576, the hidden size, is no multiple of 128.
GROUP = 64
MIX = {"mlp.down_proj": 4, "self_attn.o_proj": 4}
RECIPES = {
    "wint8": Recipe("wint8", "rtn", GROUP),
    "wint8, int8 vocabulary": Recipe("wint8", "rtn", GROUP, int8_head=True, int8_embedding=True),
    "wint4 gptq": Recipe("wint4", "gptq", GROUP),
    "wint4 rtn": Recipe("wint4", "rtn", GROUP),
    "wint2 gptq": Recipe("wint2", "gptq", GROUP, hadamard=64),
    "wint2 gptq, no hadamard": Recipe("wint2", "gptq", GROUP),
    "wint2-mix gptq": Recipe("wint2", "gptq", GROUP, hadamard=64, bits=MIX),
    "wint2 rtn": Recipe("wint2", "rtn", GROUP, hadamard=64),
    "w4a8 gptq": Recipe("w4a8", "gptq", GROUP),
    "w4a8 rtn": Recipe("w4a8", "rtn", GROUP),
    "w4afp8 gptq": Recipe("w4afp8", "gptq", GROUP),
    "w4afp8 rtn": Recipe("w4afp8", "rtn", GROUP),
}


def stock_wint4(weight: paddle.Tensor) -> paddle.Tensor:
    """What a server makes of a weight by itself: symmetric, the scale from the largest value."""
    rows, columns = weight.shape
    groups = weight.reshape([rows, columns // GROUP, GROUP])
    scales = paddle.clip(groups.abs().max(axis=-1, keepdim=True), min=1e-30) / 7
    codes = paddle.clip(paddle.round(groups / scales), -8, 7)
    return (codes * scales.astype("bfloat16").astype("float32")).reshape([rows, columns])


# Rows without files of their own: the weights are rounded as they are loaded.
SIMULATED: dict[str, tuple[float, Callable[..., Any], Callable[..., Any] | None]] = {
    "fp8": (8 + 32 / 128**2, round_fp8_blocks, round_fp8_groups),
    "wint4 stock": (4 + 16 / GROUP, stock_wint4, None),
}


def measure(name: str, source: Path, calibration: TokenWindows, text: TokenWindows) -> dict:
    """One row of the table."""
    config, original = MiniCPMConfig.from_pretrained(source), Checkpoint(source)
    began = time.perf_counter()
    if name in SIMULATED:
        bits, round_weight, round_input = SIMULATED[name]

        def load(tensor: str) -> paddle.Tensor:
            weight = original.load(tensor)
            return round_weight(weight) if tensor.endswith("_proj.weight") else weight

        row = {"bits_per_weight": bits, "seconds": 0.0}
        result = evaluate(
            config, text.windows, Side(load, original.is_tied, round_input), Side.of(original)
        )
        return row | summary(result)
    recipe = RECIPES[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quantised"
        sidecar = quantise(source, out, recipe, calibration if recipe.algorithm == "gptq" else None)
        row = {
            "bits_per_weight": sidecar.bits_per_weight,
            "bytes": sidecar.size,
            "seconds": round(time.perf_counter() - began, 1),
        }
        result = evaluate(config, text.windows, Side.of(Checkpoint(out)), Side.of(original))
    return row | summary(result)


def summary(result: Evaluation) -> dict:
    """The figures of a row; a perplexity beyond 1e6 says no more than that."""
    return {
        "perplexity": float(f"{result.perplexity:.5g}"),
        "source_perplexity": float(f"{result.source_perplexity:.5g}"),
        "ratio": float(f"{result.perplexity / result.source_perplexity:.5g}"),
        "kl": float(f"{result.kl:.4g}") if math.isfinite(result.kl) else None,
        "top1": round(result.top1, 4),
    }


def main() -> None:
    """Measures the rows one after the other; each is written when it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [*RECIPES, *SIMULATED]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW")
    parser.add_argument("--dir", type=Path, default=ROOT / ".demo", help="folder of the demo")
    args = parser.parse_args()
    source = args.dir / CHECKPOINT
    tokenizer = Tokenizer(source)
    text = read_windows(tokenizer, TEXT, LENGTH, WINDOWS, "text")
    calibration = read_windows(tokenizer, CALIBRATION, LENGTH, WINDOWS, "calibration")
    values = json.loads(OUT.read_text("utf-8")) if OUT.exists() else {"rows": {}}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    values["made"] = {
        "model": "SmolLM2-135M-Instruct, Q4_1 GGUF restored to fp32",
        "model_sha256": GGUF_SHA256,
        "text": f"{TEXT.name}, {WINDOWS} windows of {LENGTH} tokens",
        "calibration": f"{CALIBRATION.name}, {WINDOWS} windows of {LENGTH} tokens",
        "group": GROUP,
        "paddle": paddle.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/quantization_smollm2.py",
    }
    for name in args.rows:
        values["rows"][name] = measure(name, source, calibration, text)
        print(name, values["rows"][name], flush=True)
        values["rows"] = {n: values["rows"][n] for n in names if n in values["rows"]}
        OUT.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
