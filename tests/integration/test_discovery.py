"""Unmodified FastDeploy finds the plugin, or is told in one line why it is not served by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from checkpoints import SMALL_SPARSE_CONFIG, write_tiny_checkpoint, write_tiny_tokenizer
from host.greedy import random_prompt
from host.host import missing_host, offline_engine, run_script

pytestmark = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(missing_host() is not None, reason=str(missing_host())),
]

# Prints our log lines and what the architecture resolves to.
ASK = """
import fastdeploy
{before}
import fastdeploy.model_executor.models
from fastdeploy.model_executor.models.model_base import ModelRegistry
cls = ModelRegistry._arch_to_model_cls.get("MiniCPMForCausalLM")
print("CLASS", cls and cls.__module__ + "." + cls.__name__)
"""
OURS = "CLASS fd_minicpm41.model.MiniCPM41ForCausalLM"


def ask(folder: Path, before: str = "", **kwargs: object) -> tuple[str, list[str]]:
    """The class that serves MiniCPM, and the lines that we logged."""
    result = run_script(ASK.format(before=before), folder, **kwargs)  # type: ignore[arg-type]
    assert result.returncode == 0, result.stderr
    (answer,) = (x for x in result.stdout.splitlines() if x.startswith("CLASS"))
    logged = [x for x in result.stderr.splitlines() if " fd_minicpm41 0" in x]
    return answer, logged


def write_plugin(folder: Path, name: str, code: str) -> Path:
    """A second plugin, as FastDeploy finds it on PYTHONPATH; its ``register`` runs ``code``."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    entry = f"[fastdeploy.model_register_plugins]\n{name} = {name}:register\n"
    (info / "entry_points.txt").write_text(entry)
    body = "\n".join(f"    {line}" for line in code.splitlines())
    (folder / f"{name}.py").write_text(f"def register():\n{body}\n")
    return folder


NATIVE = """
from fastdeploy.model_executor.models.model_base import ModelRegistry
from fastdeploy.model_executor.models.qwen2 import Qwen2ForCausalLM
class MiniCPMForCausalLM(Qwen2ForCausalLM):
    @classmethod
    def name(cls):
        return "MiniCPMForCausalLM"
ModelRegistry.register_model_class(MiniCPMForCausalLM)
"""


def test_found_with_no_variable_set(tmp_path: Path) -> None:
    answer, logged = ask(tmp_path)
    assert answer == OURS
    assert len(logged) == 1 and "registered MiniCPMForCausalLM" in logged[0]


def test_autoload_can_be_switched_off(tmp_path: Path) -> None:
    answer, logged = ask(tmp_path, variables={"FD_MINICPM41_AUTOLOAD": "0"})
    assert answer == "CLASS None" and logged == []


@pytest.mark.parametrize(
    "named, ours, other",
    [
        (None, True, False),
        ("otherplugin", False, True),
        ("otherplugin,fd_minicpm41", True, True),
        ("fd_minicpm41", True, False),
    ],
)
def test_two_plugins(tmp_path: Path, named: str | None, ours: bool, other: bool) -> None:
    """The user's FD_PLUGINS is never touched; unset, it is set to our name alone."""
    path = write_plugin(tmp_path / "site", "otherplugin", 'print("OTHER PLUGIN")')
    variables = {} if named is None else {"FD_PLUGINS": named}
    before = (
        'import sys; sys.stdout.flush(); print("NAMED", __import__("os").environ["FD_PLUGINS"])'
    )
    result = run_script(ASK.format(before=before), tmp_path, extra_path=[path], variables=variables)
    assert result.returncode == 0, result.stderr
    assert f"NAMED {named or 'fd_minicpm41'}\n" in result.stdout
    assert (OURS in result.stdout) is ours
    assert ("OTHER PLUGIN" in result.stdout) is other


@pytest.mark.parametrize("force", [False, True])
def test_a_host_with_its_own_minicpm(tmp_path: Path, force: bool) -> None:
    path = write_plugin(tmp_path / "site", "anative", NATIVE)
    variables = {"FD_PLUGINS": "anative,fd_minicpm41"}
    if force:
        variables["FD_MINICPM41_FORCE"] = "1"
    answer, logged = ask(tmp_path, extra_path=[path], variables=variables)
    assert len(logged) == 1
    if force:
        assert answer == OURS and "registered" in logged[0]
    else:
        assert answer == "CLASS anative.MiniCPMForCausalLM"
        assert "has its own MiniCPMForCausalLM; set FD_MINICPM41_FORCE=1" in logged[0]


CONFIGURE = """
import json, sys
import fastdeploy
{before}
from fastdeploy.engine.args_utils import EngineArgs
for options in json.loads({options!r}):
    try:
        config = EngineArgs(
            max_num_seqs=4, max_num_batched_tokens=512, num_gpu_blocks_override=2200, **options
        ).create_engine_config()
        print("REPLY", json.dumps("served as " + config.model_config.architectures[0]))
    except Exception as error:
        print("REPLY", json.dumps(f"{{type(error).__name__}}: {{error}}"))
"""


def configure(folder: Path, options: list[dict[str, object]], before: str = "") -> list[str]:
    """What happens when FastDeploy makes its configuration, as every process of a server does."""
    code = CONFIGURE.format(before=before, options=json.dumps(options))
    result = run_script(code, folder)
    assert result.returncode == 0, result.stderr
    lines = [x for x in result.stdout.splitlines() if x.startswith("REPLY ")]
    return [json.loads(x.removeprefix("REPLY ")) for x in lines]


def test_an_unsupported_host_serves_its_other_models(tmp_path: Path) -> None:
    ours = write_tiny_checkpoint(tmp_path / "minicpm", hidden_size=1024, intermediate_size=512)
    qwen = write_qwen3(tmp_path / "qwen3")
    before = 'fastdeploy.__version__ = "2.4.1"'
    options = [{"model": str(p), "max_model_len": 512} for p in (ours, qwen)]
    refused, served = configure(tmp_path, options, before)  # type: ignore[arg-type]
    assert refused.startswith("UsageError: FastDeploy is 2.4.1, wanted 2.5 or later: upgrade")
    assert served == "served as Qwen3ForCausalLM"
    answer, logged = ask(tmp_path, before)
    assert answer == "CLASS None"
    assert len(logged) == 1 and "not registered: FastDeploy is 2.4.1" in logged[0]


def test_a_newer_host_is_said_to_be_untested(tmp_path: Path) -> None:
    answer, logged = ask(tmp_path, 'fastdeploy.__version__ = "3.0.0"')
    assert answer == OURS
    assert len(logged) == 1 and "FastDeploy 3.0.0, which is newer than tested" in logged[0]


def test_a_failing_registration_is_loud(tmp_path: Path) -> None:
    """Without us FastDeploy would serve MiniCPM by a generic class with a wrong rope table."""
    code = "import sys; sys.modules['fd_minicpm41.model'] = None\n"
    code += "import fastdeploy.model_executor.models"
    result = run_script(code, tmp_path)
    assert result.returncode != 0
    assert "fd_minicpm41.model" in result.stderr.splitlines()[-1]


def test_bad_input_stops_the_configuration_with_one_line(tmp_path: Path) -> None:
    def write(name: str, **fields: object) -> str:
        folder = write_tiny_checkpoint(
            tmp_path / name, hidden_size=1024, intermediate_size=512, **fields
        )  # type: ignore[arg-type]
        return str(folder)

    good = write("good")
    sparse = write("sparse", sparse_config=SMALL_SPARSE_CONFIG)
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    cases: list[tuple[dict[str, object], str]] = [
        ({"model": good}, "served as MiniCPMForCausalLM"),
        (
            {"model": write("bare", tokenizer_files=False)},
            "neither tokenizer.json nor tokenizer.model",
        ),
        (
            {"model": write("gptq", quantization_config=gptq)},
            "quantization_config in config.json is of 'gptq', wanted none",
        ),
        (
            {"model": write("llama", model_type="llama")},
            "model_type is 'llama', wanted \"minicpm\"",
        ),
        ({"model": good, "max_model_len": 1000}, "start with --max-model-len 960"),
        (
            {"model": good, "max_model_len": 65600},
            "--max-model-len is 65600, beyond the rope table's 65536",
        ),
        ({"model": sparse, "block_size": 32}, "start with --block-size 64"),
        ({"model": sparse}, "served as MiniCPMForCausalLM"),
    ]
    replies = configure(tmp_path, [{"max_model_len": 512} | options for options, _ in cases])
    for (_, wanted), reply in zip(cases, replies, strict=True):
        assert wanted in reply
        assert reply.startswith(("UsageError: ", "served as")) and "\n" not in reply


def test_the_start_up_file_costs_nothing(tmp_path: Path) -> None:
    """One line, no import, under a millisecond; a value the user set stays."""
    (line,) = [
        text
        for path in Path(sysconfig.get_path("purelib")).glob("fd_minicpm41*.pth")
        for text in path.read_text("utf-8").splitlines()
    ]
    code = "import sys, os; print(os.environ['FD_PLUGINS'], 'fd_minicpm41' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k != "FD_PLUGINS"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert run.stdout.decode().split() == ["fd_minicpm41", "False"]
    compiled, rounds = compile(line, "start-up", "exec"), 1000
    begin = time.perf_counter()
    for _ in range(rounds):
        exec(compiled, {})
    assert (time.perf_counter() - begin) / rounds < 1e-3
    kept = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"FD_PLUGINS": "mine"}, capture_output=True
    )
    assert kept.stdout.decode().split() == ["mine", "False"]


def write_qwen3(folder: Path) -> Path:
    """A tiny random Qwen3, which FastDeploy serves by itself."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    write_tiny_tokenizer(folder)
    hidden, inter, heads, kv_heads, head_dim, vocab = 128, 256, 4, 2, 32, 320
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    rng = np.random.default_rng(0)

    def linear(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.1).astype(ml_dtypes.bfloat16)

    def norm(size: int) -> np.ndarray:
        return np.ones(size, ml_dtypes.bfloat16)

    weights = {
        "model.embed_tokens.weight": linear(vocab, hidden),
        "model.norm.weight": norm(hidden),
        "lm_head.weight": linear(vocab, hidden),
    }
    for i in range(2):
        layer = f"model.layers.{i}."
        weights |= {
            layer + "input_layernorm.weight": norm(hidden),
            layer + "post_attention_layernorm.weight": norm(hidden),
            layer + "self_attn.q_norm.weight": norm(head_dim),
            layer + "self_attn.k_norm.weight": norm(head_dim),
            layer + "self_attn.q_proj.weight": linear(heads * head_dim, hidden),
            layer + "self_attn.k_proj.weight": linear(kv_heads * head_dim, hidden),
            layer + "self_attn.v_proj.weight": linear(kv_heads * head_dim, hidden),
            layer + "self_attn.o_proj.weight": linear(hidden, heads * head_dim),
            layer + "mlp.gate_proj.weight": linear(inter, hidden),
            layer + "mlp.up_proj.weight": linear(inter, hidden),
            layer + "mlp.down_proj.weight": linear(hidden, inter),
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.skipif(
    "FD_MINICPM41_TEST_BASE_PYTHON" not in os.environ,
    reason="no environment without the wheel to compare with: make test-host names one",
)
def test_another_model_gives_the_same_tokens_with_and_without_us(tmp_path: Path) -> None:
    folder = write_qwen3(tmp_path / "qwen3")
    prompts = [random_prompt(n) for n in (5, 64, 200)]
    replies = []
    for name, python in (
        ("with", sys.executable),
        ("without", os.environ["FD_MINICPM41_TEST_BASE_PYTHON"]),
    ):
        with offline_engine(folder, tmp_path / name, python=python) as engine:
            replies.append(engine.generate(prompts, max_tokens=24))
            assert ("fd_minicpm41" in engine.logs()) is (name == "with")
    assert replies[0] == replies[1]
    assert all(len(reply["token_ids"]) > 1 for reply in replies[0])
