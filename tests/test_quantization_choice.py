"""Which format a server uses: names, variables, sidecars and refusals, without FastDeploy."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import write_tiny_checkpoint
from fd_minicpm41 import fastdeploy_hooks
from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.choice import (
    CACHE_VARIABLE,
    DATA_FREE_VARIABLE,
    METHODS,
    QUANT_VARIABLE,
    choose_quantization,
    is_ternary,
    stored_names,
)
from fd_minicpm41.quantization.ternary import STORED_GROUPS, quantise_ternary
from low_bit_checkpoints import make_ternary, write_low_bit


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (QUANT_VARIABLE, DATA_FREE_VARIABLE, CACHE_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "bf16"
    return write_tiny_checkpoint(folder, hidden_size=256, intermediate_size=384)


@pytest.fixture(scope="module")
def ternary(bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ternary(bf16, tmp_path_factory.mktemp("ternary") / "c", group=128)


@pytest.fixture(scope="module")
def stored(bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_low_bit(bf16, tmp_path_factory.mktemp("stored") / "c", "w4a8")


def choose(folder: Path, asked: object = None, **kwargs: Any) -> dict[str, Any] | None:
    config = MiniCPMConfig.from_pretrained(folder)
    return choose_quantization(folder, config, asked, **({"tile": 64} | kwargs))


def test_nothing_asked_is_nothing_chosen(bf16: Path) -> None:
    assert choose(bf16) is None


@pytest.mark.parametrize("name", [m for m in METHODS if m != "wint2"])
def test_every_name_in_every_form(bf16: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"quantization": f"fdm_{name}"}
    forms = (name, name.upper(), {"quantization": name}, {"quantization": name.upper()}, chosen)
    assert all(choose(bf16, form) == chosen for form in forms)
    for value in (name, name.upper()):
        monkeypatch.setenv(QUANT_VARIABLE, value)
        assert choose(bf16) == chosen
        # What is on the command line wins.
        assert choose(bf16, "wint8") == {"quantization": "fdm_wint8"}


def test_wint2_of_a_ternary_checkpoint(ternary: Path) -> None:
    assert choose(ternary, "WINT2") == {"quantization": "fdm_wint2"}


def test_wint2_of_any_other_is_refused_with_the_command(
    bf16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="not ternary.*fd-minicpm41 quantize") as raised:
        choose(bf16, "wint2")
    assert str(bf16) in str(raised.value) and "\n" not in str(raised.value)
    monkeypatch.setenv(DATA_FREE_VARIABLE, "1")
    assert choose(bf16, "wint2") == {"quantization": "fdm_wint2"}


def test_one_weight_that_is_not_ternary_is_found(ternary: Path, tmp_path: Path) -> None:
    def spoil(name: str, weight: np.ndarray) -> np.ndarray:
        if name == "model.layers.1.mlp.down_proj.weight":
            weight[2, 5] = weight[2].max() / 2 if weight[2].max() else 1.0
        return weight

    folder = make_ternary(ternary, tmp_path / "c", group=128, change=spoil)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.down_proj.* is not ternary"):
        choose(folder, "wint2")


def test_a_stored_format_needs_no_name_and_takes_no_other(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"quantization": "fdm_w4a8", "is_quantized": True}
    for asked in (None, "w4a8", {"quantization": "W4A8"}, chosen):
        assert choose(stored, asked) == chosen
    for asked in ("wint2", {"quantization": "wint4"}, "fp8", {"quantization": "block_wise_fp8"}):
        with pytest.raises(UsageError, match="stored as w4a8: leave --quantization out"):
            choose(stored, asked)
    monkeypatch.setenv(QUANT_VARIABLE, "WINT8")
    with pytest.raises(UsageError, match=f"{QUANT_VARIABLE} is 'wint8'.*leave {QUANT_VARIABLE}"):
        choose(stored)


def test_fastdeploys_own_methods_are_passed_on(bf16: Path) -> None:
    for asked in (
        {"quantization": "block_wise_fp8"},
        {"quantization": "wfp8afp8"},
        {"quantization": "mix_quant", "kv_cache_quant_type": "block_wise_fp8"},
    ):
        assert choose(bf16, asked) == asked


@pytest.mark.parametrize(
    "asked, message",
    [
        ("int4", "is 'int4', wanted one of wint8, wint4, wint2, w4a8, w4afp8, fp8"),
        ({"quantization": "tensor_wise_fp8"}, "wanted one of"),
        ({"quant_method": "fp8"}, "wanted a name"),
        ({"quantization": 4}, "wanted a name"),
        (
            {"quantization": "mix_quant", "dense_quant_type": "wint2", "moe_quant_type": "wint2"},
            "dense_quant_type, moe_quant_type beside the name 'mix_quant'",
        ),
        ({"quantization": "wint4", "kv_cache_quant_type": "int8"}, "kv_cache_quant_type beside"),
    ],
)
def test_what_is_not_served_is_refused(bf16: Path, asked: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(bf16, asked)


def test_a_wrong_variable_is_named(bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QUANT_VARIABLE, "Q4_K_M")
    with pytest.raises(UsageError, match=f"^{QUANT_VARIABLE} is 'q4_k_m', wanted one of"):
        choose(bf16)


def test_ranks_get_whole_groups_and_tiles(bf16: Path, stored: Path, tmp_path: Path) -> None:
    # 384 in features of down_proj: 3 tiles of 128, 6 of 64.
    assert choose(bf16, "w4a8", tensor_parallel_size=2, tile=64)
    with pytest.raises(UsageError, match=r"down_proj has 384 in features over 2 ranks.*128"):
        choose(bf16, "w4a8", tensor_parallel_size=2, tile=128)
    # The groups of 128 that were stored need as much on any device.
    with pytest.raises(UsageError, match=r"smaller --tensor-parallel-size"):
        choose(stored, tensor_parallel_size=2, tile=64)
    small = write_tiny_checkpoint(
        tmp_path / "small", hidden_size=192, num_q_heads=2, num_kv_heads=1
    )
    with pytest.raises(UsageError, match=r"192 in features, wanted a multiple of 128.*bf16"):
        choose(small, "w4afp8", tile=128)


def test_fp8_needs_a_gpu_that_has_it(bf16: Path, tmp_path: Path) -> None:
    stored = write_low_bit(bf16, tmp_path / "c", "w4afp8")
    for sm_version in (80, 86):
        for folder, asked, instead in (
            (bf16, "fp8", "wint8"),
            (bf16, "w4afp8", "w4a8"),
            (stored, None, "w4a8"),
        ):
            wanted = f"this one has 8.{sm_version % 10}: choose {instead}"
            with pytest.raises(UsageError, match=wanted):
                choose(folder, asked, sm_version=sm_version)
        assert choose(bf16, "w4a8", sm_version=sm_version)
    assert choose(bf16, "fp8", sm_version=89) and choose(stored, sm_version=90)
    assert choose(bf16, "fp8", sm_version=100)
    for folder, asked in ((bf16, "w4afp8"), (stored, None)):
        with pytest.raises(UsageError, match=r"this GPU has 10\.0: choose w4a8"):
            choose(folder, asked, sm_version=100)


@pytest.mark.parametrize(
    "visible, wanted", [(None, 89), ("1,0", 86), ("GPU-c0ffee", 90), ("7", None), ("", None)]
)
def test_the_driver_is_asked_for_the_first_visible_gpu(
    visible: str | None, wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = {0: (8, 9), 1: (8, 6), "GPU-c0ffee": (9, 0)}
    driver = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=gpus.__getitem__,
        nvmlDeviceGetHandleByUUID=gpus.__getitem__,
        nvmlDeviceGetCudaComputeCapability=lambda handle: handle,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert fastdeploy_hooks._sm_version() == wanted


def test_fastdeploys_cache_of_loaded_weights(
    bf16: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "1")
    assert choose(bf16) is None and choose(bf16, "wint8") and choose(bf16, "fp8")
    for folder, asked in ((bf16, "wint4"), (bf16, "w4a8"), (stored, None)):
        with pytest.raises(UsageError, match=f"{CACHE_VARIABLE} is 1, wanted unset"):
            choose(folder, asked)


def test_names_of_stored_weights(bf16: Path, stored: Path) -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
    assert stored_names(names, str(bf16)) == set(names)
    assert stored_names(names, str(stored)) == {
        "model.layers.0.mlp.up_proj.qweight",
        "model.layers.0.mlp.up_proj.scales",
        "model.layers.0.mlp.up_proj.channel_scales",
        "model.norm.weight",
        "lm_head.weight",
    }


@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 128]), st.booleans())
def test_ternary_is_told_exactly(seed: int, group: int, empty: bool) -> None:
    """By the sampling here and by what the worker stores alike."""
    rng = np.random.default_rng(seed)
    scales = rng.integers(1, 100, [3, 2]).astype(np.float32) / 64
    levels = rng.integers(-1, 2, [3, 2, group]).astype(np.float32)
    levels[:, :, 0] = 1.0
    if empty:
        levels[1, 1] = 0.0
    weight = (levels * scales[:, :, None]).reshape([3, 2 * group])
    spoilt = weight.copy()
    spoilt[0, 1] = scales[0, 0] / 2
    for rows, wanted in ((weight, True), (spoilt, False)):
        found = [is_ternary(rows, g) for g in STORED_GROUPS]
        assert found[STORED_GROUPS.index(group)] is wanted
        assert any(found) is (quantise_ternary(paddle.to_tensor(rows.T.copy())) is not None)
    assert not is_ternary(weight, 96)
