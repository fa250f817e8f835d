from __future__ import annotations

import dataclasses
import json

import pytest

from checkpoints import tiny_config
from fd_minicpm41.config import MiniCPMConfig, SparseConfig, published_rope_table, read_json
from fd_minicpm41.errors import UsageError

PUBLISHED_SPARSE_CONFIG = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
    "dense_len": 8192,
}


def test_reads_the_released_fields():
    values = tiny_config(num_layers=4)
    config = MiniCPMConfig.from_dict(values)
    assert (config.num_q_heads, config.num_kv_heads, config.group_size) == (32, 2, 16)
    assert config.head_dim == values["hidden_size"] // 32  # derived: the released file has none
    assert config.residual_scale == pytest.approx(1.4 / 2)
    assert config.logits_scale == values["dim_model_base"] / values["hidden_size"]
    assert config.eos_token_ids == tuple(values["eos_token_id"]) and config.bos_token_id == 1
    assert config.sparse is None
    assert config.with_sparse().sparse == SparseConfig(**PUBLISHED_SPARSE_CONFIG)


def test_the_published_sparse_config_selects_96_blocks():
    config = SparseConfig.from_dict(PUBLISHED_SPARSE_CONFIG)
    assert [f.name for f in dataclasses.fields(config)] == list(PUBLISHED_SPARSE_CONFIG)
    assert (config.local_blocks, config.budget) == (32, 96)
    assert (config.coarse_kernel_size, config.coarse_kernel_stride) == (128, 64)


def test_a_sparse_config_of_the_checkpoint_is_kept():
    values = tiny_config(sparse_config={"topk": 16, "window_size": 512})
    config = MiniCPMConfig.from_dict(values)
    assert config.sparse is not None and config.with_sparse().sparse.budget == 24
    assert config.with_sparse(SparseConfig()).sparse.budget == 96


@pytest.mark.parametrize("eos, wanted", [(None, ()), (2, (2,)), ([2, 9], (2, 9))])
def test_eos_is_none_one_or_many(eos, wanted):
    assert MiniCPMConfig.from_dict(tiny_config(eos_token_id=eos)).eos_token_ids == wanted


def test_the_128k_table_is_one_name():
    config = MiniCPMConfig.from_dict(tiny_config(hidden_size=4096))
    longer = config.with_rope_table("128K")
    assert longer.max_context == 131072 and config.max_context == 65536
    assert longer.rope_scaling.long_factor[-1] == pytest.approx(126.01712561287873)
    assert longer.rope_scaling is published_rope_table("128k") or longer.rope_scaling == (
        published_rope_table("128k")
    )
    assert config.with_rope_table(None) is config


@pytest.mark.parametrize(
    "change, named",
    [
        ({"block_size": 32}, "block_size is 32, wanted 64"),
        ({"kernel_stride": 24}, "kernel_stride is 24, wanted a divisor"),
        ({"kernel_size": 40}, "kernel_size is 40, wanted a multiple"),
        ({"kernel_size": "32"}, "kernel_size is '32', wanted a whole number"),
        ({"topk": True}, "topk is True"),
        ({"topk": 0}, "topk is 0"),
        ({"topk": 2, "init_blocks": 2}, "topk is 2, wanted more than init_blocks (2)"),
        ({"window_size": 100}, "window_size is 100, wanted a multiple"),
        ({"dense_len": -2}, "dense_len is -2"),
        ({"use_nope": True}, "use_nope is True"),
        ({"top_k": 64}, "['top_k'], wanted only the keys kernel_size"),
    ],
)
def test_a_bad_sparse_config_is_one_error_that_names_the_field(change, named):
    values = tiny_config(sparse_config=PUBLISHED_SPARSE_CONFIG | change)
    with pytest.raises(UsageError) as error:
        MiniCPMConfig.from_dict(values)
    message = str(error.value)
    assert named in message and "sparse_config" in message
    assert "\n" not in message and "config.json" in message or "not supported" in message


@pytest.mark.parametrize(
    "change, named",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is ['LlamaForCausalLM']"),
        ({"model_type": "minicpm3"}, "model_type is 'minicpm3'"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', wanted a whole number"),
        ({"hidden_size": 250}, "hidden_size is 250, wanted a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 32, wanted a multiple"),
        ({"head_dim": 7}, "head_dim is 7, wanted an even number"),
        ({"scale_emb": None}, "scale_emb is None, wanted a positive number"),
        ({"scale_depth": float("nan")}, "scale_depth is nan"),
        ({"dim_model_base": -1}, "dim_model_base is -1"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"sparse_config": [1]}, "sparse_config is [1], wanted an object"),
        ({"rope_scaling": "longrope"}, "rope_scaling is 'longrope', wanted an object"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn'"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "rope_scaling.short_factor is 'a list of 1', wanted a list of 4",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.0, 1.0, 0.0]}},
            "rope_scaling.short_factor is 0.0, wanted a positive number",
        ),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [1.0] * 4,
                }
            },
            "rope_scaling.original_max_position_embeddings is None",
        ),
    ],
)
def test_a_bad_model_config_is_one_error_that_names_the_field(change, named):
    with pytest.raises(UsageError) as error:
        MiniCPMConfig.from_dict(tiny_config() | change)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_rope_table_that_does_not_exist_or_does_not_fit():
    config = MiniCPMConfig.from_dict(tiny_config())
    with pytest.raises(UsageError, match="rope table is '1m', wanted one of 128k"):
        config.with_rope_table("1m")
    with pytest.raises(UsageError, match="head_dim is 8, wanted 128"):
        config.with_rope_table("128k")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="does not exist: give the folder"):
        read_json(tmp_path / "absent", "config.json")
    with pytest.raises(UsageError, match="complete Hugging Face checkpoint"):
        read_json(tmp_path, "config.json")
    (tmp_path / "config.json").write_text('{"a":')
    with pytest.raises(UsageError, match="cannot be read"):
        read_json(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="holds list, wanted an object"):
        read_json(tmp_path, "config.json")
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    assert MiniCPMConfig.from_pretrained(tmp_path).num_layers == 2
