"""The GPU tests run where there is a GPU, PyTorch and a kernel library with CUDA; else they say why
not."""

from __future__ import annotations

import pytest

import capi


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _needs_gpu() -> None:
    reason = capi.missing_for_cuda()
    if reason:
        pytest.skip(reason)
