"""The ops inside a real Paddle-GPU process, which cannot share a process with PyTorch's CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIABLE = "FD_MINICPM41_PADDLE_GPU"


@pytest.mark.slow
def test_ops_on_paddles_own_tensors_and_stream() -> None:
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} does not name a folder with paddlepaddle-gpu for this Python")
    libraries = [f"{folder}/paddle/libs", f"{folder}/paddle/base"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]),
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
    }
    program = Path(__file__).with_name("paddle_process.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "bfloat16 holds" in done.stdout and "float16 holds" in done.stdout
