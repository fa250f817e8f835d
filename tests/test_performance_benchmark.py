"""The performance benchmark where it cannot run: one line that says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import capi

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "minicpm41_performance.py"


@pytest.mark.parametrize("kind", ["decode", "prefill", "step", "linear"])
def test_says_what_is_missing_for_cuda(kind: str) -> None:
    reason = capi.missing_for_cuda()
    if reason is None:
        pytest.skip("nothing is missing here: the benchmark would run")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        f"error: {reason}; `make benchmark KIND={kind}` brings all but the GPU"
    )
