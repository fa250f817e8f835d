"""``benchmarks/small_model_fidelity.py`` on a CPU: engines, shared pages, formats, rows."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from checkpoints import SMALL_SPARSE_CONFIG, write_tiny_checkpoint

torch = pytest.importorskip("torch", reason="PyTorch is not here, which the benchmark runs on")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
fidelity: Any = importlib.import_module("small_model_fidelity")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fidelity") / "tiny"
    return write_tiny_checkpoint(folder, head_dim=128, sparse_config=SMALL_SPARSE_CONFIG, seed=5)


@pytest.fixture(scope="module")
def examiner(checkpoint: Path) -> Any:
    return fidelity.Examiner(
        argparse.Namespace(
            model=checkpoint,
            formats=None,
            device="cpu",
            lengths=[300],
            questions=3,
            prompts=2,
            windows=1,
            window_length=400,
        )
    )


def cell(engine: str, attention: str, weights: str = "bf16") -> dict[str, Any]:
    return {"engine": engine, "attention": attention, "weights": weights}


ENGINES = [(e, a) for e in ("ops", "reference") for a in ("dense", "sparse")]


def random_ids(count: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(3, 250, count)]


@pytest.mark.parametrize(("engine", "attention"), ENGINES)
@pytest.mark.parametrize("length", [256, 391])
def test_requests_that_share_pages_say_what_each_says_alone(
    examiner: Any, engine: str, attention: str, length: int
) -> None:
    """Forked after whole pages, and after a page that is filled in part."""
    shared, rests = random_ids(length, 1), [random_ids(n, n) for n in (5, 70, 1, 5)]
    with torch.inference_mode():
        together = examiner.attention(cell(engine, attention), 40)
        parent = fidelity.Request(together.pages.take(-(-length // 64)), 0, shared)
        together.model.forward(fidelity.Step([parent], examiner.device), together)
        parent.history = length
        forks = [together.pages.fork(parent, rest, 8) for rest in rests]
        replies = examiner.write(forks, together, 8)
        for rest, reply in zip(rests, replies, strict=True):
            alone = examiner.attention(cell(engine, attention), 40)
            request = fidelity.Request(alone.pages.take(9), 0, shared + rest)
            assert examiner.write([request], alone, 8) == [reply]


def test_the_engines_agree_and_count_alike(examiner: Any) -> None:
    """A loss is a mean over 399 rows: bfloat16 moves it by far less than 1 %."""
    losses = {}
    for engine, attention in ENGINES:
        row = examiner.examine({"task": "perplexity", **cell(engine, attention)})
        assert row["tokens"] == 399
        losses[engine, attention] = np.log(row["perplexity"])
    for attention in ("dense", "sparse"):
        assert losses["ops", attention] == pytest.approx(losses["reference", attention], rel=3e-3)
    rows = [
        examiner.examine({"task": "retrieval", "length": 300, **cell(engine, "sparse")})
        for engine in ("ops", "reference")
    ]
    # Replies may differ and so may their lengths, which moves the share a little.
    assert rows[0]["blocks_read"] == pytest.approx(rows[1]["blocks_read"], abs=0.02)
    assert rows[0]["questions"] == 3 and sum(n for _, n in rows[0]["depths"]) == 3


def test_formats_are_the_packages_own() -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    groups = x.numpy().reshape(4, 2, 128)
    scales = np.abs(groups).max(-1, keepdims=True) / 448
    wanted = (groups / scales).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales
    np.testing.assert_array_equal(fidelity.fp8_groups(x).numpy(), wanted.reshape(4, 256))
    codes = fidelity.int8_rows(x) / (x.abs().amax(-1, keepdim=True) / 127)
    np.testing.assert_allclose(codes, codes.round(), atol=1e-4)
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
    rounded = fidelity.fp8_blocks(weight)
    for rows in (slice(0, 128), slice(128, 256)):
        part = weight[rows]
        scale = part.abs().max() / 448
        wanted = (part / scale).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(rounded[rows].numpy(), wanted * scale.numpy())


def test_a_run_that_was_cut_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    words = ["x", "--model", str(checkpoint), "--device", "cpu", "--weights", "bf16", "fp8"]
    words += ["--lengths", "300", "--questions", "2", "--prompts", "1", "--windows", "1"]
    words += ["--window-length", "300", "--out", str(out)]
    monkeypatch.setattr(fidelity, "REPLY_TOKENS", 8)
    monkeypatch.setattr(sys, "argv", [*words, "--seconds", "0"])
    fidelity.main()
    assert not out.exists()
    monkeypatch.setattr(sys, "argv", words)
    fidelity.main()
    first = json.loads(out.read_text())
    # bf16: 2 x (1 + 1 + 6), fp8: 1 + 1 + 6 sparse, 1 + 1 dense, the reference: 2 x (1 + 1).
    assert len(first["rows"]) == 16 + 10 + 4
    assert (
        len(
            {
                json.dumps(
                    {k: r.get(k) for k in ("task", "engine", "attention", "weights", "kind")}
                )
                for r in first["rows"]
            }
        )
        == 30
    )
    fidelity.main()
    assert json.loads(out.read_text())["rows"] == first["rows"]
