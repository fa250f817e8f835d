"""``doctor``: what of this machine works, and what to do about what does not."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fd_minicpm41 import __version__
from fd_minicpm41.cli.runtime import prepare_paddle

PLUGIN = "fd_minicpm41"
AUTOLOAD_FILE = "fd_minicpm41_autoload.pth"
FASTDEPLOY_NAMES = ("fastdeploy-gpu", "fastdeploy-cpu", "fastdeploy")
WITHOUT_CUDA = "cuda=none"
PADDLE_SUPPORTED = ((3, 2), (3, 4))


@dataclass(frozen=True)
class Finding:
    """What was found of one thing; ``status`` is "ok", "missing" or "wrong"."""

    name: str
    status: str
    detail: str
    mend: str = ""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "doctor",
        help="say what works on this machine",
        description="Looks at Python, Paddle, FastDeploy, the GPU, the kernels and the discovery "
        "by FastDeploy, and says what to do about what does not work. Exit code 1 if not even the "
        "reference model can run.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints every finding and what can be done with it all."""
    looks = (_python, _paddle, _gpu, _fastdeploy, _kernels, _binding, _discovery)
    findings = [look() for look in looks]
    is_ok = {finding.name: finding.status == "ok" for finding in findings}
    details = {finding.name: finding.detail for finding in findings}
    has_ops = is_ok["kernels"] and is_ok["binding"]
    works = {
        "generate and chat with the reference model": is_ok["paddle"],
        "fastdeploy serve finds this plugin": is_ok["fastdeploy"] and is_ok["discovery"],
        "sparse attention ops on the CPU": has_ops,
        "sparse attention ops on the GPU": has_ops
        and is_ok["gpu"]
        and not details["kernels"].endswith(WITHOUT_CUDA),
    }
    if args.json:
        report = {
            "version": __version__,
            "findings": [asdict(finding) for finding in findings],
            "works": works,
        }
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(f"fd-minicpm41 {__version__}")
        for finding in findings:
            print(f"  {finding.name:<11}{finding.status:<9}{finding.detail}")
            if finding.mend:
                print(f"  {'':<20}-> {finding.mend}")
        print("works here:")
        for what, does in works.items():
            print(f"  {'yes' if does else 'no':<5}{what}")
    return 0 if is_ok["paddle"] else 1


def _python() -> Finding:
    detail = f"{platform.python_version()} at {sys.executable}"
    if (3, 10) <= sys.version_info[:2] < (3, 14):
        return Finding("python", "ok", detail)
    return Finding("python", "wrong", detail, "use Python 3.10 to 3.13")


def _installed(*names: str) -> tuple[str, str] | None:
    for name in names:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def _paddle() -> Finding:
    found = _installed("paddlepaddle-gpu", "paddlepaddle")
    if found is None or find_spec("paddle") is None:
        mend = "pip install 'fd-minicpm41[cpu]', or paddlepaddle-gpu as README.md says"
        return Finding("paddle", "missing", "not installed", mend)
    detail = " ".join(found)
    release = tuple(int(part) for part in found[1].split(".")[:2])
    if not PADDLE_SUPPORTED[0] <= release < PADDLE_SUPPORTED[1]:
        return Finding("paddle", "wrong", detail, "install Paddle 3.2 or 3.3")
    return Finding("paddle", "ok", detail)


def _gpu() -> Finding:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        mend = "none needed for the reference model; serving fast needs an NVIDIA GPU and driver"
        return Finding("gpu", "missing", "no NVIDIA GPU that nvidia-smi can see", mend)
    detail = "; ".join(listed.stdout.strip().splitlines())
    if _installed("paddlepaddle-gpu") is None:
        mend = "this Paddle is for the CPU: install paddlepaddle-gpu as README.md says"
        return Finding("gpu", "wrong", detail, mend)
    return Finding("gpu", "ok", detail)


def _fastdeploy() -> Finding:
    found = _installed(*FASTDEPLOY_NAMES)
    if found is None:
        mend = "needed to serve only: install fastdeploy-gpu as README.md says"
        return Finding("fastdeploy", "missing", "not installed", mend)
    from fd_minicpm41.fastdeploy_hooks import NEWEST_HOST, OLDEST_HOST, host_version

    detail, release = " ".join(found), host_version(found[1])
    if release is not None and release < OLDEST_HOST:
        mend = f"install FastDeploy {'.'.join(map(str, NEWEST_HOST))}"
        return Finding("fastdeploy", "wrong", detail, mend)
    if release is not None and release > NEWEST_HOST:
        detail += ", newer than tested"
    return Finding("fastdeploy", "ok", detail)


def _kernels() -> Finding:
    folder = Path(str(distribution("fd-minicpm41").locate_file("fd_minicpm41/lib")))
    libraries = sorted(folder.glob("libfd_minicpm41_kernels.*"))
    if not libraries:
        mend = "install the wheel again: pip install --force-reinstall fd-minicpm41"
        return Finding("kernels", "missing", f"no library in {folder}", mend)
    try:
        library = ctypes.CDLL(str(libraries[0]))
        library.minicpm41_build_info.restype = ctypes.c_char_p
        detail = library.minicpm41_build_info().decode()
    except (OSError, AttributeError) as error:
        mend = "install the wheel again: pip install --force-reinstall fd-minicpm41"
        return Finding("kernels", "wrong", f"{libraries[0]} does not load: {error}", mend)
    mend = ""
    if detail.endswith(WITHOUT_CUDA):
        mend = "none needed on a CPU; for a GPU, install a wheel built with CUDA"
    return Finding("kernels", "ok", detail, mend)


def _binding() -> Finding:
    """Loads it, which compiles it once: nothing less shows that it works."""
    if find_spec("paddle") is None:
        return Finding("binding", "missing", "needs Paddle", "install Paddle first")
    prepare_paddle()
    from fd_minicpm41 import binding

    try:
        binding.load()
    except RuntimeError as error:
        mend = "do what the message says, then run doctor again"
        return Finding("binding", "wrong", " ".join(str(error).split()), mend)
    return Finding("binding", "ok", "the ops are registered with Paddle")


def _discovery() -> Finding:
    """FastDeploy loads the plugins that FD_PLUGINS names, and none while it is unset."""
    has_file = any((Path(folder) / AUTOLOAD_FILE).is_file() for folder in sys.path if folder)
    is_on = os.environ.get("FD_MINICPM41_AUTOLOAD", "1") != "0"
    named = os.environ.get("FD_PLUGINS")
    if named is None:
        if not is_on:
            detail = "FD_PLUGINS is not set: FD_MINICPM41_AUTOLOAD=0 switches the start-up file off"
            mend = f"unset FD_MINICPM41_AUTOLOAD, or export FD_PLUGINS={PLUGIN}"
        else:
            detail = f"FD_PLUGINS is not set: the start-up file {AUTOLOAD_FILE} " + (
                "did not run" if has_file else "is not installed"
            )
            mend = f"export FD_PLUGINS={PLUGIN}"
        return Finding("discovery", "wrong", detail, mend)
    # FastDeploy cuts at commas and strips nothing.
    names = named.split(",")
    if PLUGIN not in names:
        wanted = ",".join([name.strip() for name in names if name.strip() not in ("", PLUGIN)])
        mend = f"export FD_PLUGINS={wanted}{',' if wanted else ''}{PLUGIN}"
        return Finding("discovery", "wrong", f"FD_PLUGINS={named!r} leaves {PLUGIN} out", mend)
    if named == PLUGIN and has_file and is_on:
        return Finding("discovery", "ok", f"FD_PLUGINS={named}, as the start-up file sets it")
    return Finding("discovery", "ok", f"FD_PLUGINS={named}, set by you")
