"""Perplexity, KL and agreement against numbers computed apart; the 8-bit roundings of inputs."""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import paddle
import pytest

from checkpoints import write_tiny_checkpoint
from fd_minicpm41.quantization.evaluation import (
    Side,
    evaluate,
    log_softmax,
    round_fp8_blocks,
    round_fp8_groups,
    round_fp8_rows,
    round_int8,
)
from fd_minicpm41.quantization.plan import Recipe
from fd_minicpm41.quantization.quantise import quantise
from fd_minicpm41.reference.checkpoint import Checkpoint, load_model

WINDOWS = [[1, *range(5, 60)], [1, *range(200, 255)], [1, 7, 7, 9]]


def logs_of(folder: Path, window: list[int]) -> np.ndarray:
    """The whole model at once, in the order of the textbook and fp64."""
    model = load_model(folder)
    logits = model(window, model.new_cache(len(window))).numpy().astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("eval") / "tiny", seed=11)


@pytest.fixture(scope="module")
def wint4(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    out = tmp_path_factory.mktemp("eval") / "wint4"
    quantise(source, out, Recipe("wint4", "rtn", 64))
    return out


def test_figures_are_those_of_the_whole_models(
    source: Path, wint4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fd_minicpm41.quantization.evaluation.LOGIT_ROWS", 17)
    sides = [Side.of(Checkpoint(folder)) for folder in (wint4, source)]
    config = load_model(source).config
    told: list[tuple[int, int]] = []
    got = evaluate(config, WINDOWS, *sides, on_progress=lambda *at: told.append(at))
    assert told == [(1, 2), (2, 2)]
    losses, kl, agreed, count = [0.0, 0.0], 0.0, 0, 0
    for window in WINDOWS:
        logs = [logs_of(folder, window)[:-1] for folder in (wint4, source)]
        for i in range(2):
            losses[i] -= sum(logs[i][t, token] for t, token in enumerate(window[1:]))
        kl += (np.exp(logs[1]) * (logs[1] - logs[0])).sum()
        agreed += (logs[0].argmax(-1) == logs[1].argmax(-1)).sum()
        count += len(window) - 1
    assert got.num_tokens == count
    assert got.perplexity == pytest.approx(math.exp(losses[0] / count), rel=1e-4)
    assert got.source_perplexity == pytest.approx(math.exp(losses[1] / count), rel=1e-4)
    assert got.kl == pytest.approx(kl / count, rel=1e-3) and got.kl > 0
    assert got.top1 == agreed / count
    assert len(got.layer_errors) == 2 and 0 < got.layer_errors[0] < 1


def test_a_model_agrees_with_itself(source: Path) -> None:
    config, side = load_model(source).config, Side.of(Checkpoint(source))
    got = evaluate(config, WINDOWS, side, side)
    assert got.perplexity == got.source_perplexity
    assert (got.kl, got.top1, got.layer_errors) == (0.0, 1.0, [0.0, 0.0])
    alone = evaluate(config, WINDOWS, side)
    assert alone.perplexity == got.perplexity
    assert math.isnan(alone.kl) and alone.layer_errors == []


@pytest.mark.parametrize("method", ["w4a8", "w4afp8"])
def test_prompts_are_read_as_the_method_multiplies_them(
    tmp_path: Path, source: Path, method: str
) -> None:
    """8-bit inputs move the outcome a little; the weights alone explain the most of it."""
    quantise(source, tmp_path / "out", Recipe(method, "rtn", 64))
    checkpoint, config = Checkpoint(tmp_path / "out"), load_model(source).config
    rounded = Side.of(checkpoint)
    assert rounded.rounding is {"w4a8": round_int8, "w4afp8": round_fp8_rows}[method]
    exact = Side(checkpoint.load, checkpoint.is_tied)
    difference = evaluate(config, WINDOWS, rounded, exact)
    whole = evaluate(config, WINDOWS, rounded, Side.of(Checkpoint(source)))
    assert 0 < difference.kl < whole.kl
    assert Side.of(Checkpoint(source)).rounding is None


def test_log_softmax() -> None:
    x = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32) * 30
    wanted = x.astype(np.float64) - x.max(-1, keepdims=True)
    wanted -= np.log(np.exp(wanted).sum(-1, keepdims=True))
    got = log_softmax(paddle.to_tensor(x)).numpy()
    np.testing.assert_allclose(got, wanted, atol=2e-4, rtol=1e-6)


def e4m3(x: np.ndarray, largest: float) -> np.ndarray:
    scale = np.float32(largest) / np.float32(448)
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


@pytest.mark.parametrize("shape", [(128, 256), (130, 576), (64, 100)])
def test_fp8_blocks_and_their_edges(shape: tuple[int, int]) -> None:
    """What is left at an edge is a block of its own: 576 = 4 x 128 + 64."""
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    weight[:, -1] *= 100  # a shared scale would lose what stands before
    got = round_fp8_blocks(paddle.to_tensor(weight)).numpy()
    for n in range(0, shape[0], 128):
        for k in range(0, shape[1], 128):
            block = weight[n : n + 128, k : k + 128]
            wanted = e4m3(block, np.abs(block).max())
            np.testing.assert_array_equal(got[n : n + 128, k : k + 128], wanted)
    assert (round_fp8_blocks(paddle.zeros([4, 4])) == 0).all()


def test_roundings_of_inputs() -> None:
    x = np.random.default_rng(2).standard_normal((3, 192)).astype(np.float32)
    x[2] = 0
    rows = round_fp8_rows(paddle.to_tensor(x)).numpy()
    groups = round_fp8_groups(paddle.to_tensor(x)).numpy()
    whole = round_int8(paddle.to_tensor(x)).numpy()
    for i in range(2):
        np.testing.assert_array_equal(rows[i], e4m3(x[i], np.abs(x[i]).max()))
        np.testing.assert_array_equal(groups[i, :128], e4m3(x[i, :128], np.abs(x[i, :128]).max()))
        np.testing.assert_array_equal(groups[i, 128:], e4m3(x[i, 128:], np.abs(x[i, 128:]).max()))
        step = np.abs(x[i]).max() / 127
        assert np.abs(whole[i] - x[i]).max() <= step / 2 * (1 + 1e-5)
        assert len(np.unique(np.round(whole[i] / step))) > 50
    for got in (rows, groups, whole):
        np.testing.assert_array_equal(got[2], 0)
