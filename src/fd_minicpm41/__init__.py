"""MiniCPM4.1-8B with InfLLM-V2 block-sparse attention for unmodified FastDeploy.

Importing the package imports nothing heavy: no Paddle, no FastDeploy, no shared library.
"""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("fd-minicpm41")


def register() -> None:
    """FastDeploy's entry point: registers the model and applies the hooks, once a process."""
    from fd_minicpm41 import fastdeploy_hooks

    fastdeploy_hooks.register()
