"""Checkpoints quantised, imported, killed, resumed, refused; what the reference reads of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints import tiny_tokenizer, write_tiny_checkpoint
from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.formats import LowBitFormat, dequantize, unpack
from fd_minicpm41.quantization.plan import Recipe, plan_formats
from fd_minicpm41.quantization.quantise import quantise
from fd_minicpm41.quantization.sidecar import SIDECAR, Sidecar, read_sidecar
from fd_minicpm41.quantization.streaming import TokenWindows, read_windows
from fd_minicpm41.quantization.verification import inspect_modules, verify
from fd_minicpm41.reference.checkpoint import Checkpoint, load_model
from fd_minicpm41.reference.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
BOOK = ROOT / "tests/data/sense_and_sensibility.txt"
LINEARS = 7
GPTQ2 = Recipe("wint2", "gptq", 64, hadamard=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", num_shards=2, seed=5)


@pytest.fixture(scope="module")
def calibration(source: Path) -> TokenWindows:
    return read_windows(Tokenizer(source), BOOK, 128, 4, "--calib")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    held: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        held |= load_file(path)
    return held


def message(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(UsageError) as caught:
        quantise(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("method", ["wint8", "wint4", "wint2", "w4a8", "w4afp8"])
@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_what_is_written_is_what_the_reference_reads(
    tmp_path: Path, source: Path, calibration: TokenWindows, method: str, algorithm: str
) -> None:
    out = tmp_path / "out"
    recipe = Recipe(method, algorithm, 64, hadamard=64 if method == "wint2" else 0)
    sidecar = quantise(source, out, recipe, calibration if algorithm == "gptq" else None)
    assert read_sidecar(out) == sidecar
    assert len(sidecar.modules) == 2 * LINEARS and sidecar.name == method
    extra = 32 / 256 if method in ("w4a8", "w4afp8") else 0
    bits = {"wint8": 8, "wint2": 2}.get(method, 4)
    assert bits + 0.25 <= sidecar.bits_per_weight <= bits + 0.25 + extra
    assert sidecar.size == sum(array.nbytes for array in tensors(out).values())
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(out).keys()

    held, original = tensors(out), tensors(source)
    checkpoint = Checkpoint(out)
    checkpoint.check(MiniCPMConfig.from_pretrained(out))
    for name, wanted in original.items():
        module = name.removesuffix(".weight")
        if module not in sidecar.modules:
            assert held[name].dtype == wanted.dtype
            np.testing.assert_array_equal(held[name], wanted, err_msg=name)
            continue
        parts = held[f"{module}.qweight"], held[f"{module}.scales"]
        assert parts[0].dtype == np.uint8 and parts[1].dtype == ml_dtypes.bfloat16
        assert (f"{module}.channel_scales" in held) == (extra > 0) and name not in held
        np.testing.assert_array_equal(
            checkpoint.load(name).numpy(), dequantize(*parts, sidecar.modules[module])
        )
    others = set(contents(source)) - {p.name for p in source.glob("*.safetensors*")}
    for name in others:
        assert contents(out)[name] == contents(source)[name]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # A server of another user reads them as it does any file made here.
    (tmp_path / "probe").touch()
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert modes == {(tmp_path / "probe").stat().st_mode}
    errors = verify(out, source)
    most = {"wint8": 0.01, "wint2": 0.6}.get(method, 0.2)
    assert errors.keys() == sidecar.modules.keys() and max(errors.values()) < most
    model = load_model(out)
    assert np.isfinite(model([1, 5, 9], model.new_cache(8)).numpy()).all()


def test_the_vocabulary_in_8_bits(tmp_path: Path, source: Path) -> None:
    recipe = Recipe("wint2", "rtn", 128, int8_head=True, int8_embedding=True)
    sidecar = quantise(source, tmp_path / "out", recipe)
    for module in ("lm_head", "model.embed_tokens"):
        assert sidecar.modules[module] == LowBitFormat(8, 256, 256)
        assert sidecar.errors[module] < 0.01
    assert sidecar.bits_per_weight == 2.125  # of the linear layers alone
    verify(tmp_path / "out", source)
    tied = write_tiny_checkpoint(tmp_path / "tied", tied=True)
    assert "its embedding: make both int8" in message(
        tied, tmp_path / "x", Recipe("wint8", "rtn", int8_head=True)
    )
    sidecar = quantise(
        tied, tmp_path / "y", Recipe("wint8", "rtn", int8_head=True, int8_embedding=True)
    )
    assert "lm_head" not in sidecar.modules and "model.embed_tokens" in sidecar.modules
    load_model(tmp_path / "y")


def test_mixed_precision_by_a_bits_map(
    tmp_path: Path, source: Path, calibration: TokenWindows
) -> None:
    bits = {"mlp.down_proj": 4, "model.layers.1.*": 16, "*.1.self_attn.o_proj": {"bits": 8}}
    recipe = Recipe("wint2", "gptq", 64, hadamard=64, bits=bits)
    sidecar = quantise(source, tmp_path / "out", recipe, calibration)
    assert sidecar.name == "wint2-mix"
    layer0, layer1 = "model.layers.0.", "model.layers.1."
    assert sidecar.modules[layer0 + "mlp.down_proj"] == LowBitFormat(4, 64, 16)
    assert sidecar.modules[layer0 + "mlp.up_proj"] == LowBitFormat(2, 64, 3, 64)
    of_layer1 = {name for name in sidecar.modules if name.startswith(layer1)}
    assert of_layer1 == {layer1 + "self_attn.o_proj"}
    assert sidecar.modules[layer1 + "self_attn.o_proj"].bits == 8
    assert layer1 + "mlp.up_proj.weight" in tensors(tmp_path / "out")
    verify(tmp_path / "out", source)
    reports = inspect_modules(tmp_path / "out")
    for module, report in reports.items():
        packed = tensors(tmp_path / "out")[f"{module}.qweight"]
        codes = unpack(packed, report.fmt.bits)
        wanted = np.bincount(codes.reshape(-1), minlength=2**report.fmt.bits)
        assert report.counts == wanted.tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": {"self_attn.q_proj": 4}}, "different formats: they read the same input"),
        ({"bits": {"mlp.dwon_proj": 4}}, "'mlp.dwon_proj' matches no linear layer"),
        ({"bits": {"*": 3}}, "is 3, wanted 2, 4, 8 or 16"),
        ({"bits": {"*": True}}, "is True, wanted"),
        ({"bits": {"*": {"bits": 4, "zero": 1}}}, "has zero, wanted bits, group or hadamard"),
        ({"bits": {"*": 2}, "method": "w4a8"}, "is 2, wanted 4 or 16"),
        ({"method": "w4a8", "hadamard": 64}, "w4a8 has no Hadamard transform"),
        ({"method": "fp8"}, "serve the bf16 checkpoint with --quantization fp8"),
        ({"method": "int3"}, "method is 'int3', wanted one of wint8"),
        ({"algorithm": "awq"}, "algorithm is 'awq', wanted one of"),
        ({"algorithm": "ternary", "method": "wint4"}, "give --method wint2"),
        ({"group": 100}, "group is 100"),
    ],
)
def test_recipes_that_cannot_be_made(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan_formats(Recipe(**({"method": "wint2"} | changes)), 2)


def write_ternary(folder: Path, source: Path, group: int) -> Path:
    """The source with every linear layer ternary in groups, in bf16."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        for name, array in held.items():
            if name.endswith("_proj.weight"):
                groups = array.astype(np.float32).reshape(len(array), -1, group)
                sizes = np.abs(groups).mean(-1, keepdims=True).astype(ml_dtypes.bfloat16)
                signs = np.sign(groups) * (np.abs(groups) > 0.5 * sizes.astype(np.float32))
                held[name] = (signs.astype(ml_dtypes.bfloat16) * sizes).reshape(array.shape)
        save_file(held, path)
    return folder


@pytest.mark.parametrize("group", [64, 128])
def test_ternary_checkpoints_are_lossless(tmp_path: Path, source: Path, group: int) -> None:
    ternary = write_ternary(tmp_path / "ternary", source, group)
    sidecar = quantise(ternary, tmp_path / "out", Recipe("wint2", "ternary"))
    assert set(sidecar.modules.values()) == {LowBitFormat(2, group, 2)}
    assert set(verify(tmp_path / "out", ternary).values()) == {0.0}
    for name in Checkpoint(ternary).shapes:
        np.testing.assert_array_equal(
            Checkpoint(tmp_path / "out").load(name).numpy(), Checkpoint(ternary).load(name).numpy()
        )


def test_weights_that_are_not_ternary_are_named(tmp_path: Path, source: Path) -> None:
    recipe = Recipe("wint2", "ternary")
    assert "model.layers.0.self_attn.q_proj is not ternary" in message(
        source, tmp_path / "a", recipe
    )
    small = write_ternary(tmp_path / "small", source, 32)
    assert "is ternary in groups of 32" in message(small, tmp_path / "b", recipe)


# How AutoGPTQ packs, written out apart from the code that reads it.
def gptq_tensors(codes: np.ndarray, scales: np.ndarray, zero: int) -> dict[str, np.ndarray]:
    rows, columns = codes.shape
    words = np.zeros((columns // 8, rows), np.uint32)
    for k in range(columns):
        words[k // 8] |= codes[:, k].astype(np.uint32) << np.uint32(4 * (k % 8))
    zeros = np.zeros((scales.shape[1], rows // 8), np.uint32)
    for n in range(rows):
        zeros[:, n // 8] |= np.uint32(zero << (4 * (n % 8)))
    return {
        "qweight": words.view(np.int32),
        "qzeros": zeros.view(np.int32),
        "scales": np.ascontiguousarray(scales.astype(np.float16).T),
        "g_idx": (np.arange(columns) // (columns // scales.shape[1])).astype(np.int32),
    }


def write_gptq(folder: Path, rounded: Path, version: int = 1, **settings: Any) -> Path:
    """A GPTQ checkpoint with the codes of a wint4 folder of ours."""
    shutil.copytree(rounded, folder)
    held = tensors(rounded)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / SIDECAR).unlink()
    for name in [n for n in held if n.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        codes, scales = unpack(held.pop(name), 4), held.pop(f"{module}.scales")
        parts = gptq_tensors(codes, scales.astype(np.float32), 8 - (version == 1))
        held |= {f"{module}.{part}": array for part, array in parts.items()}
    save_file(held, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    } | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    out = tmp_path_factory.mktemp("rounded") / "wint4"
    quantise(source, out, Recipe("wint4", "rtn", 128))
    return out


@pytest.mark.parametrize("version", [1, 2])
def test_a_symmetric_gptq_checkpoint_is_imported(
    tmp_path: Path, rounded: Path, version: int
) -> None:
    """Codes are taken over; these scales are bf16 already, so that nothing at all changes."""
    gptq = write_gptq(tmp_path / "gptq", rounded, version)
    sidecar = quantise(gptq, tmp_path / "out", Recipe("wint4", "import"))
    assert set(sidecar.errors.values()) == {0.0}
    held, wanted = tensors(tmp_path / "out"), tensors(rounded)
    assert held.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(held[name], array, err_msg=name)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    verify(tmp_path / "out", gptq)
    load_model(tmp_path / "out")


def test_gptq_scales_are_rounded_to_bf16_and_that_is_recorded(
    tmp_path: Path, rounded: Path
) -> None:
    gptq = write_gptq(tmp_path / "gptq", rounded)
    held = load_file(gptq / "model.safetensors")
    for name in [n for n in held if n.endswith(".scales")]:
        held[name] = held[name] * np.float16(1 + 2.0**-9)
    save_file(held, gptq / "model.safetensors")
    sidecar = quantise(gptq, tmp_path / "out", Recipe("wint4", "import"))
    assert 0 < max(sidecar.errors.values()) <= 2.0**-8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"desc_act": True}, "desc_act is True, wanted False"),
        ({"sym": False}, "sym is False, wanted True"),
        ({"bits": 3}, "bits is 3, wanted 4"),
        ({"group_size": 32}, "group_size is 32, wanted 64 or 128"),
        ({"quant_method": "awq"}, "reads GPTQ checkpoints alone"),
    ],
)
def test_gptq_checkpoints_of_other_kinds(
    tmp_path: Path, rounded: Path, settings: dict[str, Any], said: str
) -> None:
    gptq = write_gptq(tmp_path / "gptq", rounded, **settings)
    assert said in message(gptq, tmp_path / "out", Recipe("wint4", "import"))


def test_gptq_tensors_that_say_otherwise_than_the_settings(tmp_path: Path, rounded: Path) -> None:
    gptq = write_gptq(tmp_path / "gptq", rounded)
    good = load_file(gptq / "model.safetensors")
    q = "model.layers.0.self_attn.q_proj"
    for part, change, said in (
        ("g_idx", lambda a: a[::-1].copy(), "g_idx is not in order"),
        ("qzeros", lambda a: a - 1, "qzeros is not 8 throughout"),
        ("scales", lambda a: a * np.float16("inf"), "scales holds NaN or infinity"),
        ("qweight", lambda a: a[:-1].copy(), "wanted [32, 256]"),
    ):
        save_file(good | {f"{q}.{part}": change(good[f"{q}.{part}"])}, gptq / "model.safetensors")
        assert said in message(gptq, tmp_path / "out", Recipe("wint4", "import"))
        shutil.rmtree(tmp_path / ".out.partial")
    del good[f"{q}.scales"]
    save_file(good, gptq / "model.safetensors")
    assert f"lacks {q}.scales" in message(gptq, tmp_path / "out", Recipe("wint4", "import"))


# Interruptions. The child kills itself, or runs into a limit, at a chosen write.
CHILD = """
import os, resource, signal, sys
sys.path[:0] = [{src!r}, {tests!r}]
from pathlib import Path
kill_before, limit = int(sys.argv[1]), int(sys.argv[2])
import paddle
from fd_minicpm41.quantization.plan import Recipe
from fd_minicpm41.quantization.quantise import quantise
from fd_minicpm41.quantization.streaming import read_windows
from fd_minicpm41.reference.tokenizer import Tokenizer
real, count = Path.replace, 0
def replace(self, target):
    global count
    count += 1
    if count == kill_before:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
Path.replace = replace
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
source, out = Path({source!r}), Path({out!r})
calibration = read_windows(Tokenizer(source), {book!r}, 128, 4, "--calib")
try:
    quantise(source, out, Recipe("wint2", "gptq", 64, hadamard=64), calibration)
except ValueError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def run_child(
    source: Path, out: Path, kill_before: int = 0, limit: int = 0
) -> subprocess.CompletedProcess[str]:
    script = CHILD.format(
        src=str(ROOT / "src"),
        tests=str(ROOT / "tests"),
        source=str(source),
        out=str(out),
        book=str(BOOK),
    )
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(kill_before), str(limit)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, source: Path) -> None:
    """SIGKILL with a half-written file at each kind of place; then once to the end."""
    whole = tmp_path / "whole"
    assert run_child(source, whole).returncode == 0
    out = tmp_path / "out"
    partial = tmp_path / ".out.partial"
    shards = partial / "checkpoint"
    # The writes of a fresh run: job, 2 for the vocabulary, then errors, shard and activations of
    # each layer, then 5 other files, the index and the sidecar.
    for kill_before, finished in ((3, 0), (4, 1), (3, 2), (4, 2), (3, 3), (7, 3)):
        killed = run_child(source, out, kill_before)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not out.exists()
        assert len(list(shards.glob("*.safetensors"))) == finished
        assert list(partial.rglob("*.tmp"))
    assert run_child(source, out).returncode == 0
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
def test_a_full_disk_leaves_finished_layers_and_no_folder(tmp_path: Path, source: Path) -> None:
    """Files may not grow beyond 200 kB, which is less than the activations have."""
    out = tmp_path / "out"
    stopped = run_child(source, out, limit=200_000)
    assert stopped.returncode == 2, stopped.stderr
    assert stopped.stderr.count("\n") == 1
    assert f"{out} cannot be written (" in stopped.stderr
    assert "free some space and repeat the command; 0 of 2 layers are finished" in stopped.stderr
    assert not out.exists()
    assert not list((tmp_path / ".out.partial").rglob("*.tmp"))
    assert run_child(source, out).returncode == 0
    verify(out, source)


def test_the_partial_folder_is_used_by_the_same_command_alone(
    tmp_path: Path, source: Path, calibration: TokenWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > LINEARS:
            raise Stopped

    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with pytest.raises(Stopped):
        quantise(source, out, GPTQ2, calibration, on_progress=stop)
    assert not out.exists() and (partial / "job.json").exists()
    assert "holds an unfinished run with other arguments" in message(
        source, out, Recipe("wint4", "gptq", 64), calibration
    )
    told: list[tuple[int, int]] = []
    quantise(source, out, GPTQ2, calibration, on_progress=lambda *at: told.append(at))
    assert told[0] == (LINEARS, 2 * LINEARS) and told[-1] == (2 * LINEARS, 2 * LINEARS)
    quantise(source, tmp_path / "again", GPTQ2, calibration)
    assert contents(out) == contents(tmp_path / "again")
    assert not partial.exists()


def test_what_lies_about_from_before_the_first_write_is_removed(
    tmp_path: Path, source: Path
) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "job.json.tmp").write_text("{")
    quantise(source, tmp_path / "out", Recipe("wint8", "rtn"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "exists already" in message(source, tmp_path / "out", Recipe("wint8", "rtn"))


# Bad input.


def test_a_checkpoint_that_is_quantised_already(tmp_path: Path, source: Path) -> None:
    quantise(source, tmp_path / "out", Recipe("wint8", "rtn"))
    assert "is quantised already (fdm_quant.json is there)" in message(
        tmp_path / "out", tmp_path / "x", Recipe("wint4", "rtn")
    )
    for method, mend in (("gptq", "rewrite it with --algo import"), ("awq", "unquantised weights")):
        other = write_tiny_checkpoint(
            tmp_path / method, quantization_config={"quant_method": method}
        )
        said = message(other, tmp_path / "x", Recipe("wint4", "rtn"))
        assert f"quantised already (quant_method '{method}')" in said and mend in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["awq", "gptq", "out"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, value: float, tensor: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "bad")
    held = load_file(folder / "model.safetensors")
    held[tensor].reshape(-1)[[3, 8]] = value
    save_file(held, folder / "model.safetensors")
    said = message(folder, tmp_path / "out", Recipe("wint4", "rtn"))
    assert f"{tensor} holds 2 weights that are NaN or infinite" in said
    assert not (tmp_path / "out").exists()


def test_a_group_that_does_not_divide(tmp_path: Path) -> None:
    narrow = write_tiny_checkpoint(tmp_path / "narrow", intermediate_size=320)
    said = message(narrow, tmp_path / "out", Recipe("wint4", "rtn", 128))
    assert "mlp.down_proj has 320 in features, which the group of 128 does not divide" in said
    assert [path.name for path in tmp_path.iterdir()] == ["narrow"]


def test_calibration_text(tmp_path: Path, source: Path) -> None:
    tokenizer = Tokenizer(source)
    short = tmp_path / "short.txt"
    short.write_text("the thinker")
    for path, said in (
        (short, "tokens, wanted 508 for 4 windows of 128: give a longer text"),
        (tmp_path / "nowhere.txt", "cannot be read"),
    ):
        with pytest.raises(UsageError, match=said):
            read_windows(tokenizer, path, 128, 4, "--calib")
    short.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="give a UTF-8 text file"):
        read_windows(tokenizer, short, 128, 4, "--calib")
    with pytest.raises(UsageError, match="wanted at least 1 of 2"):
        read_windows(tokenizer, BOOK, 1, 4, "--calib")
    text = read_windows(tokenizer, BOOK, 100, 3, "--calib")
    pieces = tiny_tokenizer().encode(BOOK.read_text("utf-8"), add_special_tokens=False).ids
    assert text.windows == [[1, *pieces[i * 99 : (i + 1) * 99]] for i in range(3)]
    out = tmp_path / "out"
    assert "needs a calibration text" in message(source, out, GPTQ2)
    assert "takes no calibration text" in message(source, out, Recipe("wint8", "rtn"), text)


def test_sidecars_that_cannot_be_trusted(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    quantise(source, out, Recipe("wint4", "rtn"))
    path = out / SIDECAR
    good = json.loads(path.read_text())
    q = "model.layers.0.self_attn.q_proj"
    for change, said in (
        ({"version": 2}, "has version 2, this package reads up to 1: upgrade"),
        ({"version": "one"}, "has version 'one'"),
        ({"format": "other"}, "is not of format 'fdm-quant'"),
        ({"method": "wint3"}, "has method 'wint3', wanted one of"),
        ({"modules": {q: {"bits": 5}}}, "is damaged"),
        ({"modules": {q: good["modules"][q] | {"group": 7}}}, "group is 7"),
        ({"modules": {}}, "is of a module that fdm_quant.json does not name"),
        ({"modules": good["modules"] | {"other": good["modules"][q]}}, "the tensors of other"),
        ({"method": "w4a8"}, f"the tensors of {q} do not fit"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(UsageError, match=said) as caught:
            load_model(out)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UsageError, match=r"qweight is U8, wanted one of F32, F16, BF16"):
        load_model(out)


def test_verify_finds_what_was_changed(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    sidecar = quantise(source, out, Recipe("w4a8", "rtn"))
    verify(out, source)
    other = write_tiny_checkpoint(tmp_path / "other", num_shards=2, seed=6)
    with pytest.raises(UsageError, match="these are not the weights it was made from"):
        verify(out, other)
    with pytest.raises(UsageError, match="is missing or was added"):
        verify(out, write_tiny_checkpoint(tmp_path / "single", seed=5))
    shard = out / "model-00002-of-00003.safetensors"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"model-00002.* has SHA-256 .*, recorded is"):
        verify(out)

    def rewritten(change: dict[str, np.ndarray]) -> None:
        """As if the folder had been made so: hashes and all."""
        shard.write_bytes(good)
        save_file(load_file(shard) | change, shard)
        files = dict(sidecar.files)
        from fd_minicpm41.quantization.sidecar import hash_file

        files[shard.name] = hash_file(shard)
        values = Sidecar(**(sidecar.__dict__ | {"files": files})).to_dict()
        (out / SIDECAR).write_text(json.dumps(values))

    q = "model.layers.0.self_attn.q_proj"
    held = load_file(shard)
    rewritten({})
    verify(out, source)
    norm = "model.layers.0.input_layernorm.weight"
    rewritten({norm: held[norm] * np.array(2, held[norm].dtype)})
    with pytest.raises(UsageError, match=f"{norm} is not that of the source"):
        verify(out, source)
    rewritten({f"{q}.scales": held[f"{q}.scales"] * np.array(1.3, ml_dtypes.bfloat16)})
    with pytest.raises(UsageError, match="are not whole steps of its channel_scales"):
        verify(out)
    bad = held[f"{q}.scales"].copy()
    bad[0, 0] = np.nan
    rewritten({f"{q}.scales": bad})
    with pytest.raises(UsageError, match="scales holds NaN or infinity"):
        verify(out)
    with pytest.raises(UsageError, match=r"has no fdm_quant.json"):
        verify(source)


def test_a_code_that_the_format_does_not_use(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    sidecar = quantise(write_ternary(tmp_path / "t", source, 64), out, Recipe("wint2", "ternary"))
    shard = out / "model-00002-of-00003.safetensors"
    held = load_file(shard)
    held["model.layers.0.self_attn.q_proj.qweight"][0, 0] |= 3
    save_file(held, shard)
    from fd_minicpm41.quantization.sidecar import hash_file

    values = sidecar.to_dict()
    values["files"][shard.name] = hash_file(shard)
    (out / SIDECAR).write_text(json.dumps(values))
    with pytest.raises(UsageError, match="has codes 0 to 3, wanted 0 to 2"):
        verify(out)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """Anonymous memory, as the map of the source's files is the system's to drop."""
    layer_bytes = 4 * (512 * (2 * 512 + 2 * 32) + 3 * 512 * 1024)
    for layers in (2, 6):
        write_tiny_checkpoint(
            tmp_path / str(layers), num_layers=layers, hidden_size=512, intermediate_size=1024
        )
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "src")!r})
import pathlib
from fd_minicpm41.quantization.plan import Recipe
from fd_minicpm41.quantization.quantise import quantise
from fd_minicpm41.quantization.streaming import read_windows
from fd_minicpm41.reference.tokenizer import Tokenizer
def peak(layers):
    path, seen = pathlib.Path({str(tmp_path)!r}) / layers, []
    def look(done, total):
        status = pathlib.Path("/proc/self/status").read_text()
        seen.append(int(status.split("RssAnon:")[1].split()[0]) * 1024)
    text = read_windows(Tokenizer(path), {str(BOOK)!r}, 64, 1, "--calib")
    recipe = Recipe("wint4", "gptq", 128)
    quantise(path, path.with_suffix(".out"), recipe, text, on_progress=look)
    return max(seen)
print(peak("2"), peak("6"))
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    small, large = map(int, result.stdout.split())
    assert large - small < 2 * layer_bytes
