"""The reference language model against an independent NumPy forward pass, and against itself when
the same text comes in other pieces."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoints import SMALL_SPARSE_CONFIG, write_tiny_checkpoint
from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.reference.checkpoint import load_model
from fd_minicpm41.reference.model import ForCausalLM, KVCache, weight_shapes

# fp32 rounds each operation to 2^-24 of its result. Two orders of the same sums through two layers
# with reductions over up to 512 terms differ by some 20 roundings of the largest value on the way;
# 64 of them leave room and are still 1,000 times less than what a wrong key or position does.
ROUNDING = 64 * 2.0**-24

LENGTH = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ForCausalLM:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_checkpoint(folder, dtype="float32", sparse_config=SMALL_SPARSE_CONFIG)
    return load_model(folder)


@pytest.fixture(scope="module")
def token_ids(model: ForCausalLM) -> list[int]:
    rng = np.random.default_rng(7)
    return rng.integers(0, model.config.vocab_size, LENGTH).tolist()


@pytest.fixture(scope="module")
def one_shot(model: ForCausalLM, token_ids: list[int]) -> dict[str, np.ndarray]:
    return {
        kind: model(token_ids, model.new_cache(LENGTH, kind)).numpy()
        for kind in ("dense", "infllmv2")
    }


def in_pieces(
    model: ForCausalLM, token_ids: list[int], sizes: list[int], kind: str
) -> tuple[np.ndarray, KVCache]:
    """Logits of all rows when the text comes in pieces of ``sizes``, the last size repeated."""
    cache, logits, start = model.new_cache(len(token_ids), kind), [], 0
    for piece in range(len(token_ids)):
        size = sizes[min(piece, len(sizes) - 1)]
        logits.append(model(token_ids[start : start + size], cache).numpy())
        start += size
        if start >= len(token_ids):
            break
    return np.concatenate(logits), cache


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= ROUNDING * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["dense", "infllmv2"])
@pytest.mark.parametrize(
    "sizes", [[1], [63], [64], [65], [7, 130, 1, 1, 33], [191, 1, 1, 200], [192, 50], [299, 1]]
)
def test_pieces_give_the_same_logits(
    model: ForCausalLM,
    token_ids: list[int],
    one_shot: dict[str, np.ndarray],
    kind: str,
    sizes: list[int],
) -> None:
    logits, cache = in_pieces(model, token_ids, sizes, kind)
    assert_same(logits, one_shot[kind])
    assert cache.length == LENGTH


def test_sparse_differs_from_dense_only_beyond_the_budget(one_shot: dict[str, np.ndarray]) -> None:
    """The budget is 4 blocks: up to 256 tokens every block is attended."""
    difference = np.abs(one_shot["dense"] - one_shot["infllmv2"]).max(axis=1)
    scale = np.abs(one_shot["dense"]).max()
    assert (difference[:256] <= ROUNDING * scale).all()
    assert (difference[256:] > 100 * ROUNDING * scale).all()


def test_incremental_compressed_keys_equal_those_of_one_pass(
    model: ForCausalLM, token_ids: list[int]
) -> None:
    whole = model.new_cache(LENGTH, "infllmv2")
    model(token_ids, whole)
    _, pieces = in_pieces(model, token_ids, [40, 1, 1, 90, 3, 29], "infllmv2")
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        for name, count in (("k1", (LENGTH - 32) // 16 + 1), ("k2", (LENGTH - 128) // 64 + 1)):
            assert getattr(one, name).shape[0] == count
            assert_same(getattr(other, name).numpy(), getattr(one, name).numpy())


def test_blocks_are_counted_per_layer_head_and_row(
    model: ForCausalLM, token_ids: list[int]
) -> None:
    """Rows from position 191 on are sparse (dense_len 192) and attend to min(4, present)."""
    _, cache = in_pieces(model, token_ids, [100], "infllmv2")
    present = [p // 64 + 1 for p in range(191, LENGTH)]
    times = model.config.num_layers * model.config.num_kv_heads
    assert cache.blocks_present == times * sum(present)
    assert cache.blocks_attended == times * sum(min(4, blocks) for blocks in present)
    dense = model.new_cache(LENGTH)
    model(token_ids, dense)
    assert (dense.blocks_attended, dense.blocks_present) == (0, 0)


@pytest.mark.parametrize("kind", ["dense", "infllmv2"])
def test_a_rewound_cache_goes_on_with_other_text(
    model: ForCausalLM, token_ids: list[int], one_shot: dict[str, np.ndarray], kind: str
) -> None:
    cache = model.new_cache(LENGTH, kind)
    model(token_ids[:170] + token_ids[:100], cache)
    cache.rewind(170)
    assert_same(model(token_ids[170:], cache).numpy(), one_shot[kind][170:])


def test_prefill_returns_the_last_row_whatever_the_chunk(
    model: ForCausalLM, token_ids: list[int], one_shot: dict[str, np.ndarray]
) -> None:
    for chunk in (64, 100, 512):
        told: list[int] = []
        cache = model.new_cache(LENGTH, "infllmv2")
        logits = model.prefill(token_ids, cache, chunk=chunk, on_progress=told.append)
        assert_same(logits.numpy(), one_shot["infllmv2"][-1])
        assert sum(told) == LENGTH and max(told) <= chunk


def numpy_forward(
    config: dict, weights: dict[str, np.ndarray], ids: list[int], tied: bool
) -> np.ndarray:
    """MiniCPM written a second time, in fp64, from the formulas alone."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
    dim, n = hidden // heads, len(ids)
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    factors = np.asarray(config["rope_scaling"]["short_factor"])
    frequency = 1 / (factors * config["rope_theta"] ** (np.arange(0, dim, 2) / dim))
    angle = np.arange(n)[:, None] * frequency

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight

    def rope(x: np.ndarray) -> np.ndarray:
        turned = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * np.exp(1j * angle)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    x = w["model.embed_tokens.weight"][ids] * config["scale_emb"]
    for i in range(layers):
        at = {k.split(f"layers.{i}.")[1]: v for k, v in w.items() if f".layers.{i}." in k}
        h = norm(x, at["input_layernorm.weight"])
        q = rope((h @ at["self_attn.q_proj.weight"].T).reshape(n, heads, dim))
        k = rope((h @ at["self_attn.k_proj.weight"].T).reshape(n, kv_heads, dim))
        v = (h @ at["self_attn.v_proj.weight"].T).reshape(n, kv_heads, dim)
        out = np.zeros_like(q)
        for head in range(heads):
            group = head // (heads // kv_heads)
            s = q[:, head] @ k[:, group].T / np.sqrt(dim)
            s = np.where(np.tri(n, dtype=bool), s, -np.inf)
            p = np.exp(s - s.max(-1, keepdims=True))
            out[:, head] = p / p.sum(-1, keepdims=True) @ v[:, group]
        scale = config["scale_depth"] / np.sqrt(layers)
        x = x + out.reshape(n, -1) @ at["self_attn.o_proj.weight"].T * scale
        h = norm(x, at["post_attention_layernorm.weight"])
        gate = h @ at["mlp.gate_proj.weight"].T
        gate = gate / (1 + np.exp(-gate)) * (h @ at["mlp.up_proj.weight"].T)
        x = x + gate @ at["mlp.down_proj.weight"].T * scale
    x = norm(x, w["model.norm.weight"]) / (hidden / config["dim_model_base"])
    return x @ w["model.embed_tokens.weight" if tied else "lm_head.weight"].T


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [(32, 2), (4, 4), (6, 2)])
def test_logits_equal_an_independent_forward_pass(
    tmp_path: Path, tied: bool, heads: tuple[int, int]
) -> None:
    folder = write_tiny_checkpoint(
        tmp_path / "tiny",
        hidden_size=8 * heads[0],
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        num_layers=3,
        tied=tied,
        dtype="float32",
        seed=3,
    )
    config = json.loads((folder / "config.json").read_text())
    model = load_model(folder)
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], 40).tolist()
    wanted = numpy_forward(config, load_file(folder / "model.safetensors"), ids, tied)
    got = model(ids, model.new_cache(64)).numpy()
    # RoPE angles are rounded to fp32 as in training: 40 positions shift a logit by 40 roundings.
    assert np.abs(got - wanted).max() <= 4 * ROUNDING * np.abs(wanted).max()


def test_muP_scalings_stand_where_they_are_used(model: ForCausalLM) -> None:
    assert model.model.scale_emb == 12
    assert model.model.layers[0].residual_scale == pytest.approx(1.4 / 2**0.5)
    assert model.logits_scale == 1 / 16


def test_weight_names_of_the_released_shape() -> None:
    config = MiniCPMConfig(
        vocab_size=73448,
        hidden_size=4096,
        intermediate_size=16384,
        num_layers=32,
        num_q_heads=32,
        num_kv_heads=2,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=65536,
        max_context=65536,
        scale_emb=12,
        scale_depth=1.4,
        dim_model_base=256,
    )
    shapes = weight_shapes(config, tied=False)
    assert len(shapes) == 32 * 9 + 3
    assert shapes["model.layers.31.self_attn.k_proj.weight"] == (256, 4096)
    # 7.583e9 in the layers' projections, twice 0.301e9 in embedding and head, and 65 norms.
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 8_185_253_888
    assert "lm_head.weight" not in weight_shapes(config, tied=True)


def test_what_the_model_refuses(tmp_path: Path, model: ForCausalLM) -> None:
    with pytest.raises(UsageError, match="no tokens"):
        model([], model.new_cache(8))
    with pytest.raises(UsageError, match="no tokens"):
        model.prefill([], model.new_cache(8))
    with pytest.raises(UsageError, match="9 tokens exceed the cache's 8"):
        model([1] * 9, model.new_cache(8))
    with pytest.raises(UsageError, match="65537 tokens exceeds the rope table's 65536"):
        model.new_cache(65537)
    without = ForCausalLM.__new__(ForCausalLM)
    folder = write_tiny_checkpoint(tmp_path / "plain")
    without.config = MiniCPMConfig.from_pretrained(folder)
    with pytest.raises(UsageError, match="no sparse_config"):
        without.new_cache(8, "infllmv2")
