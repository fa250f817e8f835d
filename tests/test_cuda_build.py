"""The CUDA kernels compile for every architecture, and none of them spills registers.

A kernel that spills, or that keeps an array on a stack, is several times slower and still right:
only the compiler's own report shows it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PASSES = ("80", "86", "89", "90a")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library built by the project's own CMake, and what the compilers printed."""
    folder = tmp_path_factory.mktemp("cuda")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake, "cmake comes with the package's extra [dev]"
    options = ["-DFDM_CUDA=ON", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v", "-DCMAKE_BUILD_TYPE=Release"]
    output = ""
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(folder), *options],
        [cmake, "--build", str(folder), "--parallel", "2"],
    ):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        output += done.stdout
        assert done.returncode == 0, done.stdout[-4000:]
    return folder / "libfd_minicpm41_kernels.so", output


def test_no_kernel_spills_or_uses_a_stack(build: tuple[Path, str]) -> None:
    reports = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        build[1],
        re.DOTALL,
    )
    seen = {architecture for _, architecture, *_ in reports}
    assert seen >= set(PASSES), f"compiled for {sorted(seen)} only"
    ops = ("rope_and_write_kv", "compress_keys", "select_blocks", "sparse_decode", "sparse_prefill")
    ops += ("low_bit_linear", "expand_low_bit_weight")
    for op in ops:
        assert any(op in name for name, *_ in reports), f"no report on {op}"
    bad = [report for report in reports if any(int(number) for number in report[2:])]
    assert not bad, f"stack frame, spill stores, spill loads: {bad}"


def test_no_product_of_a_warpgroup_waits_for_the_one_before(build: tuple[Path, str]) -> None:
    # ptxas does this to wgmma where it cannot follow the registers, and only says so.
    assert "wgmma.mma_async instructions are serialized" not in build[1]


def test_the_library_names_its_architectures_and_a_missing_gpu(build: tuple[Path, str]) -> None:
    # In a process of its own: this one may have loaded another build.
    program = """
import capi, cases
print(capi.build_info()["cuda"])
step = cases.make_step([(0, 70)], cases.Geometry(32, 2, 128, "bfloat16"))
try:
    capi.run_cuda(capi.compress_keys_params(step), 0)
except capi.KernelError as error:
    print(error)
"""
    environment = os.environ | {
        "FD_MINICPM41_KERNELS": str(build[0]),
        "PYTHONPATH": str(ROOT / "tests"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    architectures, error = done.stdout.strip().split("\n")
    assert architectures == "80-real,86-real,89-real,90a-real,90-virtual"
    assert error.startswith("compress_keys: no usable GPU: ")
