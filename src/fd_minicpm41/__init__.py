"""MiniCPM4.1-8B with InfLLM-V2 block-sparse attention for unmodified FastDeploy.

Importing the package imports nothing heavy: no Paddle, no FastDeploy, no shared library.
"""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("fd-minicpm41")
