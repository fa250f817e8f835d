"""The GPU tests run where there is a GPU, PyTorch and a kernel library with CUDA; else they say why
not."""

from __future__ import annotations

import functools

import pytest

import capi


@functools.cache
def missing() -> str | None:
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU"
    if capi.build_info()["cuda"] == "none":
        return "the kernel library was built without CUDA"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)
