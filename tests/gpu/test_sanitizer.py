"""compute-sanitizer on small cases: no bad access, no race in shared memory, no bad barrier."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]

STEPS = """
from dataclasses import replace
import torch
import capi
from cases import TRUE_GEOMETRY, make_step
from gpu_ops import SMALL, Launches, compress, on_gpu, stream
for dtype in ("bfloat16", "float16"):
    geometry = replace(TRUE_GEOMETRY, dtype=dtype)
    for requests in REQUESTS:
        step = on_gpu(make_step(requests, geometry))
        compress(step, [0] * len(requests))
        for overlap in (0, 1):
            launches = Launches(step, SMALL, overlap)
            for params in (launches.compress, launches.select, launches.attend):
                capi.run_cuda(params, stream())
                if ONE_AT_A_TIME:
                    torch.cuda.synchronize()
            launches.result()
        # Requests without pages: nothing is read or written through page -1.
        step.block_tables[:] = -1
        compress(step)
        compress(step, [0] * len(requests))
"""
# One row in a cluster, and a few rows with an idle slot.
DECODE = STEPS.replace("REQUESTS", "([(1029, 1)], [(599, 1)] * 8 + [(0, 0), (383, 9)])")
# Prompts and chunks with a history, decode and idle rows among them.
PREFILL = STEPS.replace("REQUESTS", "([(383, 9), (0, 0), (1030, 1), (0, 70), (447, 40)],)")
# More tiles than a GPU has multiprocessors, so that some are parted.
PARTED = STEPS.replace("REQUESTS", "([(447, 40), (0, 900)],)")

PRODUCTS = """
import torch
from gpu_low_bit import LowBitLinear
from low_bit_cases import FORMATS, make_weight
for fmt in (FORMATS[0], FORMATS[2], FORMATS[5], FORMATS[8]):
    for shape in ((40, 256), (73, 1152), (64, 4096)):
        linear = LowBitLinear.of(make_weight(fmt, *shape))
        for tokens in (1, 9, 20):
            for dtype in (torch.bfloat16, torch.float16):
                linear(torch.randn(tokens, shape[1], dtype=dtype, device="cuda"))
        linear.rows("bfloat16")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [DECODE, PREFILL, PARTED, PRODUCTS],
    ids=["decode", "prefill", "parted", "products"],
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_small_cases_are_clean(tool: str, program: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    # Racecheck looks into one launch: others that wait beside it would only take its time.
    program = program.replace("ONE_AT_A_TIME", str(tool == "racecheck"))
    # Without PyTorch's cache every tensor has bounds of its own.
    paths = [str(TESTS), str(TESTS / "gpu"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
