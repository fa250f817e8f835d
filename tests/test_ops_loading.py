"""How the Paddle binding comes to be: nothing at import, one compilation, a cache that mends."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fd_minicpm41 import binding

USE = """
import paddle
from fd_minicpm41 import ops
int32 = lambda values: paddle.to_tensor(values, dtype="int32")
k_cache = paddle.ones([1, 1, 64, 16])
k1_cache, k2_cache = paddle.zeros([1, 1, 4, 16]), paddle.zeros([1, 1, 1, 16])
batch = int32([0]), int32([0, 1]), int32([1]), int32([31]), int32([[0]])
ops.compress_keys(k_cache, k1_cache, k2_cache, None, ops.Batch(*batch))
assert k1_cache.numpy()[0, 0, :, 0].tolist() == [0, 1, 0, 0]
"""


class Machine:
    """A package installed without a binding, a cache of its own, a compiler that keeps count."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.calls = folder / "cache", folder / "calls"
        self.calls.mkdir()
        package = folder / "site" / "fd_minicpm41"
        source = Path(binding.__file__).parent
        shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("lib", "csrc"):
            skip = shutil.ignore_patterns("fd_minicpm41_binding-*")
            shutil.copytree(binding._installed(name), package / name, ignore=skip)
        # A finder of the editable install would go before the copy.
        info = folder / "site" / "fd_minicpm41-0.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fd-minicpm41\nVersion: 0.0\n")
        compiler = folder / "g++"
        compiler.write_text(f'#!/bin/sh\nmktemp {self.calls}/XXXXXX >/dev/null\nexec g++ "$@"\n')
        compiler.chmod(0o755)
        self.site = folder / "site"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(self.site),
            "FD_MINICPM41_CACHE": str(self.cache),
            "CXX": str(compiler),
            "HOME": str(folder),
        }

    def start(self, code: str = USE, **environment: str) -> subprocess.Popen[str]:
        # The editable install's finder is dropped, so that the copy is what gets imported.
        head = (
            "import sys\n"
            "sys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in type(f).__name__]\n"
            f"sys.path.insert(0, {str(self.site)!r})\n"
        )
        return subprocess.Popen(
            [sys.executable, "-c", head + code],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str = USE, **environment: str) -> str:
        """stderr of a process that must succeed."""
        process = self.start(code, **environment)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        return errors

    def fail(self, code: str = USE, **environment: str) -> str:
        process = self.start(code, **environment)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 1, errors
        return errors

    @property
    def compilations(self) -> int:
        return len(list(self.calls.iterdir()))

    @property
    def entry(self) -> Path:
        (path,) = self.cache.glob("*.so")
        return path


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return Machine(tmp_path)


def test_importing_ops_loads_neither_paddle_nor_a_library() -> None:
    code = (
        "import sys, fd_minicpm41.ops\n"
        "assert 'paddle' not in sys.modules\n"
        "assert 'minicpm41' not in open('/proc/self/maps').read()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_eight_processes_compile_once_and_the_ninth_not_at_all(machine: Machine) -> None:
    processes = [machine.start() for _ in range(8)]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert machine.compilations == 1
    machine.run()
    assert machine.compilations == 1
    left = sorted(path.suffix for path in machine.cache.iterdir())
    assert left == [".lock", ".sha256", ".so"]


def test_a_broken_entry_is_made_anew_once(machine: Machine) -> None:
    machine.run()
    whole = machine.entry.read_bytes()
    machine.entry.write_bytes(whole[: len(whole) // 2])  # cut short: opening it would be a crash
    machine.run()
    assert machine.compilations == 2 and len(machine.entry.read_bytes()) > len(whole) // 2

    # Whole, but no library: what a build against another C library looks like to the linker.
    machine.entry.write_bytes(b"not a library")
    checksum = "import hashlib,sys;print(hashlib.sha256(b'not a library').hexdigest(),end='')"
    text = subprocess.run([sys.executable, "-c", checksum], capture_output=True, text=True).stdout
    machine.entry.with_suffix(".sha256").write_text(text)
    machine.run()
    assert machine.compilations == 3


def test_a_changed_source_or_paddle_is_another_entry(machine: Machine, tmp_path: Path) -> None:
    sources = tmp_path / "csrc"
    shutil.copytree(binding._installed("csrc"), sources)
    paddle = binding.PaddleInstallation.find()
    assert paddle is not None
    names = {binding.file_name(sources, paddle)}
    names.add(binding.file_name(sources, binding.PaddleInstallation(paddle.root, "3.2.0", False)))
    names.add(binding.file_name(sources, binding.PaddleInstallation(paddle.root, "3.2.0", True)))
    (sources / "paddle" / "ops.cc").write_text("// another\n")
    names.add(binding.file_name(sources, paddle))
    (sources / "params.h").write_text("// another\n")
    names.add(binding.file_name(sources, paddle))
    assert len(names) == 5


def test_a_folder_that_cannot_be_written_falls_back_with_a_warning(
    machine: Machine, tmp_path: Path
) -> None:
    # A file where the folder should be stops root as well, whom permissions would not.
    (tmp_path / "occupied").write_text("")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    blocked = {"FD_MINICPM41_CACHE": str(tmp_path / "occupied"), "TMPDIR": str(temporary)}
    errors = machine.run(**blocked)
    assert "cannot write to" in errors and "Set FD_MINICPM41_CACHE" in errors
    (folder,) = temporary.glob("fd_minicpm41-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    machine.run(**blocked)
    assert machine.compilations == 1

    # Somebody else's folder under that name is not trusted.
    folder.chmod(0o777)
    machine.run(**blocked)
    assert machine.compilations == 2


def test_the_cache_is_where_xdg_says(machine: Machine, tmp_path: Path) -> None:
    machine.run(FD_MINICPM41_CACHE="", XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert list((tmp_path / "xdg" / "fd_minicpm41").glob("*.so"))


def test_without_a_compiler_the_error_says_what_to_install(machine: Machine) -> None:
    errors = machine.fail(CXX="no-such-compiler")
    assert "'no-such-compiler' was not found: install g++ (apt-get install g++)" in errors
    assert not list(machine.cache.glob("*.so"))
    machine.run()


def test_a_compiler_that_fails_is_quoted(machine: Machine) -> None:
    errors = machine.fail(CXX="g++ -include no-such-file.h")
    assert "did not compile against Paddle" in errors and "g++ -include no-such-file.h" in errors
    assert "fatal error:" in errors


def test_a_half_installed_package_says_so(machine: Machine) -> None:
    (machine.site / "fd_minicpm41" / "lib" / binding.KERNEL_LIBRARY).unlink()
    assert "is missing: the package is not installed whole" in machine.fail()


def test_a_binding_in_the_wheel_is_used_as_it_is(machine: Machine) -> None:
    lib = machine.site / "fd_minicpm41" / "lib"
    script = str(machine.site / "fd_minicpm41" / "binding.py")
    command = [sys.executable, script, str(lib.parent / "csrc"), str(lib)]
    subprocess.run(command, check=True, env=machine.environment)
    assert machine.compilations == 1
    machine.run()
    assert machine.compilations == 1 and not machine.cache.exists()


def test_building_a_wheel_without_paddle_makes_no_binding(tmp_path: Path) -> None:
    command = [sys.executable, "-S", binding.__file__, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "no Paddle here, it will be compiled on first use" in done.stdout
    assert not list((tmp_path / "out").iterdir())


def test_the_gpu_half_compiles(tmp_path: Path) -> None:
    # Only compiled: this Paddle has no GPU, and linking would want symbols of one that has.
    paddle = binding.PaddleInstallation.find()
    assert paddle is not None
    with_cuda = binding.PaddleInstallation(paddle.root, paddle.version, True)
    try:
        binding.cuda_includes(with_cuda)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    sources = binding._installed("csrc")
    command = binding.compile_command(sources, with_cuda, tmp_path / "ops.o")
    assert "-DPADDLE_WITH_CUDA" in command
    command = [a for a in command if a != "-shared" and not a.startswith(("-L", "-l", "-Wl"))]
    done = subprocess.run([*command, "-c", "-Wall"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
