"""Construction and loading of the model class by FastDeploy's own loader."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints import write_tiny_checkpoint
from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.rope import rope_table
from host.host import HERE, host_environment, missing_host

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(missing_host() is not None, reason=str(missing_host())),
]


def load(folder: Path, work: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "load_model.py"), str(folder), str(work / "loaded.npz")],
        cwd=work,
        env=host_environment(work),
        capture_output=True,
        text=True,
        timeout=240,
    )


def loaded(folder: Path, work: Path) -> dict[str, np.ndarray]:
    result = load(folder, work)
    assert result.returncode == 0, result.stderr
    with np.load(work / "loaded.npz") as arrays:
        return dict(arrays)


def write(folder: Path, **overrides: Any) -> Path:
    return write_tiny_checkpoint(folder, hidden_size=1024, intermediate_size=512, **overrides)


def stored(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.glob("*.safetensors"))
    return {n: a.astype(np.float32) for f in files for n, a in load_file(f).items()}


def assert_same_linear(ours: np.ndarray, *parts: np.ndarray) -> None:
    """FastDeploy holds loaded linear layers as ``[in, out]``."""
    assert np.array_equal(ours.T, np.concatenate(parts))


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_every_weight_is_where_it_belongs(tmp_path: Path, tied: bool) -> None:
    # A vocabulary that is no multiple of 64: embeddings are padded, the head is not.
    folder = write(tmp_path / "checkpoint", tied=tied, num_shards=3)
    theirs, ours = stored(folder), loaded(folder, tmp_path)
    config = MiniCPMConfig.from_pretrained(folder)
    assert ours["class"] == "fd_minicpm41.model.MiniCPM41ForCausalLM"
    embedding = ours["model.embed_tokens.embeddings.weight"]
    assert embedding.shape[0] % 64 == 0 and config.vocab_size % 64 != 0
    assert np.array_equal(embedding[: config.vocab_size], theirs["model.embed_tokens.weight"])
    head = theirs["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert ("lm_head.weight" in theirs) is not tied
    assert_same_linear(ours["lm_head.linear.weight"], head)
    for i in range(config.num_layers):
        p = f"model.layers.{i}."
        q, k, v, o = (theirs[f"{p}self_attn.{n}_proj.weight"] for n in "qkvo")
        assert_same_linear(ours[p + "self_attn.qkv_proj.weight"], q, k, v)
        assert_same_linear(ours[p + "self_attn.o_proj.weight"], o)
        gate, up, down = (theirs[f"{p}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        assert_same_linear(ours[p + "mlp.up_gate_proj.weight"], gate, up)
        assert_same_linear(ours[p + "mlp.down_proj.weight"], down)
        for name in ("input_layernorm", "post_attention_layernorm"):
            assert np.array_equal(ours[f"{p}{name}.weight"], theirs[f"{p}{name}.weight"])
    assert np.array_equal(ours["model.norm.weight"], theirs["model.norm.weight"])

    # The head's muP scale, and no id of the vocabulary masked: the added tokens are the last ones.
    wanted = ours["hidden"] * config.logits_scale @ head.T
    logits = ours["logits"]
    assert np.isfinite(logits[:, : config.vocab_size]).all()
    # fp32 sums of 1024 products in another order: relative 1e-4 of the largest logit.
    error = np.abs(logits[:, : config.vocab_size] - wanted).max()
    assert error <= 1e-4 * np.abs(wanted).max()
    assert (logits[:, config.vocab_size :] == -np.inf).all()

    cos, sin = rope_table(config, 512)
    assert np.array_equal(ours["rotary_embs"][:, 0, :, 0], np.stack([cos, sin]))


def rewrite_weights(folder: Path, change: dict[str, np.ndarray | None]) -> None:
    from safetensors.numpy import save_file

    weights = load_file(folder / "model.safetensors")
    for name, array in change.items():
        weights.pop(name, None)
        if array is not None:
            weights[name] = array
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "lacks 1 weights"),
        ({"model.layers.0.self_attn.q_proj.bias": np.zeros(1024, "f4")}, "has no place"),
    ],
    ids=["one is missing", "one is unknown"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    folder = write(tmp_path / "checkpoint")
    rewrite_weights(folder, change)
    result = load(folder, tmp_path)
    assert result.returncode != 0
    (line,) = (x for x in result.stderr.splitlines() if "UsageError: " in x)
    assert message in line and next(iter(change)) in line


def test_weights_that_old_exports_carry_are_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite_weights(folder, {name: np.ones(16, "f4")})
    assert not any("inv_freq" in key for key in loaded(folder, tmp_path))
