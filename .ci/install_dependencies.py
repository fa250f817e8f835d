"""Installs what pyproject.toml lists, without building the package: NAME ... are extras."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[1:]:
    wanted += project["optional-dependencies"][extra]
pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
sys.exit(subprocess.call([*pip, *wanted]))
