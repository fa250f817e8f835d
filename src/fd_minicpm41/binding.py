"""The Paddle binding (``csrc/paddle``): found in the wheel or a cache, else compiled, then loaded.

The kernel library does not link Paddle; this small shared object does, and so belongs to one
version of Paddle. A wheel built where Paddle is installed carries it (CMakeLists.txt runs this
file); else the first process that needs it compiles it with g++ in a few seconds, and others wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

CACHE_VARIABLE = "FD_MINICPM41_CACHE"
KERNEL_LIBRARY = "libfd_minicpm41_kernels.so"

# Paddle is built with this ABI of the C++ library on every platform it is published for.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-D_GLIBCXX_USE_CXX11_ABI=1")
LOCK_SECONDS = 600


@dataclass(frozen=True)
class PaddleInstallation:
    """The Paddle that will be imported, known without importing it."""

    root: Path
    version: str
    has_cuda: bool

    @classmethod
    def find(cls) -> PaddleInstallation | None:
        """The installation on ``sys.path``; None without one."""
        spec = importlib.util.find_spec("paddle")
        if spec is None or not spec.submodule_search_locations:
            return None
        root = Path(next(iter(spec.submodule_search_locations)))
        text = (root / "version" / "__init__.py").read_text("utf-8")
        values = dict(re.findall(r"^(\w+)\s*=\s*'([^']*)'", text, re.MULTILINE))
        return cls(root, values["full_version"], values.get("cuda_version", "False") != "False")


def source_files(sources: Path) -> list[Path]:
    """What the binding is compiled from, in ``csrc`` or its installed copy."""
    return [sources / "params.h", sources / "capi.h", *sorted((sources / "paddle").glob("*"))]


def file_name(sources: Path, paddle: PaddleInstallation) -> str:
    """Name of the binding: Paddle's version and kind, the ABI, and a hash of sources and flags."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in source_files(sources):
        digest.update(path.name.encode() + path.read_bytes())
    kind = "cuda" if paddle.has_cuda else "cpu"
    return (
        f"fd_minicpm41_binding-paddle{paddle.version}-{kind}-cxx11-{platform.machine()}-"
        f"{digest.hexdigest()[:16]}.so"
    )


def cuda_includes(paddle: PaddleInstallation) -> list[Path]:
    """Folders of the headers that Paddle's GPU headers include: a toolkit's, else those of wheels.

    Raises:
        RuntimeError: there are none.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    folders += sorted(Path("/usr/local").glob("cuda-*/include"), reverse=True)
    folders += sorted(paddle.root.parent.glob("nvidia/*/include"))
    folders += [folder / "cccl" for folder in folders]  # where CUDA 13 keeps Thrust
    found = []
    for header in ("cuda.h", "thrust/complex.h"):
        folder = next((folder for folder in folders if (folder / header).exists()), None)
        if folder is None:
            raise RuntimeError(
                f"the Paddle binding of fd-minicpm41 needs CUDA's {header} once, and found none: "
                "set CUDA_HOME to a CUDA toolkit"
            )
        found.append(folder)
    return found


def compile_command(sources: Path, paddle: PaddleInstallation, output: Path) -> list[str]:
    """The compiler's command line; ``$CXX`` names another compiler than g++."""
    include = paddle.root / "include"
    command = [*shlex.split(os.environ.get("CXX") or "g++"), *FLAGS]
    if paddle.has_cuda:
        command.append("-DPADDLE_WITH_CUDA")
        command += [f"-isystem{folder}" for folder in cuda_includes(paddle)]
    return [
        *command,
        f"-I{sources}",
        *("-isystem", str(include), "-isystem", str(include / "third_party")),
        str(sources / "paddle" / "ops.cc"),
        # Already in memory when the binding is loaded: found there by name, wherever it lies.
        *(f"-L{paddle.root / 'base'}", "-l:libpaddle.so", "-Wl,--allow-shlib-undefined"),
        *("-o", str(output)),
    ]


def compile_binding(sources: Path, paddle: PaddleInstallation, folder: Path) -> Path:
    """Compiles into ``folder``; the file appears there whole, with its checksum, or not at all.

    Raises:
        RuntimeError: no compiler, or it failed; the message holds the command.
    """
    path = folder / file_name(sources, paddle)
    handle, unfinished = tempfile.mkstemp(suffix=".so", prefix="unfinished-", dir=folder)
    os.close(handle)
    command = compile_command(sources, paddle, Path(unfinished))
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(
                f"the Paddle binding of fd-minicpm41 did not compile against Paddle "
                f"{paddle.version}: {shlex.join(command)}\n{done.stderr[-4000:]}"
            )
        checksum = hashlib.sha256(Path(unfinished).read_bytes()).hexdigest()
        _checksum_of(path).write_text(checksum, "utf-8")
        os.replace(unfinished, path)
    except FileNotFoundError as error:
        raise RuntimeError(
            f"the Paddle binding of fd-minicpm41 needs a C++ compiler once, and {command[0]!r} was "
            "not found: install g++ (apt-get install g++), or set CXX"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
    return path


def _checksum_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    try:
        wanted = _checksum_of(path).read_text("utf-8")
        return hashlib.sha256(path.read_bytes()).hexdigest() == wanted
    except OSError:
        return False


def cache_folder() -> Path:
    """A folder this user can write to: ``$FD_MINICPM41_CACHE``, else the XDG cache, else a
    temporary one, with a warning."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        folder = Path(chosen)
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = Path(base) / "fd_minicpm41"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        reason = error
    # A library is loaded from there: only from a folder that nobody else can write to.
    fallback = Path(tempfile.gettempdir()) / f"fd_minicpm41-{os.getuid()}"
    with contextlib.suppress(OSError):
        fallback.mkdir(mode=0o700, exist_ok=True)
    status = fallback.lstat() if fallback.exists() else None
    if status is None or status.st_uid != os.getuid() or status.st_mode & 0o022:
        fallback = Path(tempfile.mkdtemp(prefix="fd_minicpm41-"))
    warnings.warn(
        f"fd_minicpm41: cannot write to {folder} ({reason}); the Paddle binding is kept in "
        f"{fallback}. Set {CACHE_VARIABLE} to a folder that lasts.",
        stacklevel=2,
    )
    return fallback


def _installed(name: str) -> Path:
    path = Path(str(distribution("fd-minicpm41").locate_file(f"fd_minicpm41/{name}")))
    if not path.exists():
        raise RuntimeError(
            f"{path} is missing: the package is not installed whole; pip install fd-minicpm41 again"
        )
    return path


def _open(path: Path) -> bool:
    """Whether the dynamic linker takes the file, every symbol of it included."""
    try:
        ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError:
        return False
    return True


def find_or_compile(sources: Path, paddle: PaddleInstallation) -> Path:
    """The binding's path, opened once; an entry that is stale, cut short or fails is made anew.

    Raises:
        RuntimeError: it cannot be compiled, or what was compiled does not load.
    """
    from filelock import FileLock

    name = file_name(sources, paddle)
    packaged = _installed("lib") / name
    if packaged.exists() and _open(packaged):
        return packaged
    folder = cache_folder()
    path = folder / name
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        if _is_whole(path) and _open(path):
            return path
        # Not over the old file: the dynamic linker may know it by its inode.
        path.unlink(missing_ok=True)
        compile_binding(sources, paddle, folder)
        if not _open(path):
            raise RuntimeError(
                f"{path} was compiled for Paddle {paddle.version} and does not load: "
                "check that the compiler and Paddle are for the same machine"
            )
        return path


_lock = threading.Lock()
_loaded = False


def load() -> None:
    """Loads the kernel library and registers the ops with Paddle, once a process.

    Raises:
        RuntimeError: with the command that mends it.
    """
    global _loaded
    with _lock:
        if _loaded:
            return
        paddle = PaddleInstallation.find()
        if paddle is None:
            raise RuntimeError(
                "the ops of fd-minicpm41 need Paddle: pip install 'paddlepaddle>=3.2,<3.4', or "
                "paddlepaddle-gpu"
            )
        from paddle.utils.cpp_extension import load_op_meta_info_and_register_op

        # Global: the binding finds the kernels among the symbols of the process, not by a path.
        ctypes.CDLL(str(_installed(f"lib/{KERNEL_LIBRARY}")), mode=ctypes.RTLD_GLOBAL)
        load_op_meta_info_and_register_op(str(find_or_compile(_installed("csrc"), paddle)))
        _loaded = True


def _compile_for_wheel(sources: Path, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("fd_minicpm41_binding-*"):
        old.unlink()
    paddle = PaddleInstallation.find()
    if paddle is None:
        return "no Paddle here, it will be compiled on first use"
    try:
        return f"compiled {compile_binding(sources, paddle, folder).name}"
    except RuntimeError as error:
        return f"warning: it will be compiled on first use, for now {error}"


if __name__ == "__main__":
    print("Paddle binding:", _compile_for_wheel(*(Path(name).resolve() for name in sys.argv[1:])))
