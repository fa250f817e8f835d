"""Which low-bit format a server uses: what the user asked for, held against the checkpoint.

Runs where the user reads, before a worker starts, and needs neither Paddle nor FastDeploy. The
worker is handed a name that FastDeploy does not know (``fdm_wint2``): under its own names
FastDeploy would serve a dense model by another format, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.formats import GROUPS, LowBitFormat
from fd_minicpm41.quantization.plan import EMBEDDING, HEAD
from fd_minicpm41.quantization.sidecar import CHANNEL_METHODS, read_sidecar

QUANT_VARIABLE = "FD_QUANT_TYPE"
DATA_FREE_VARIABLE = "FD_MINICPM41_DATA_FREE_WINT2"

METHODS = ("wint8", "wint4", "wint2", "w4a8", "w4afp8", "fp8")
PREFIX = "fdm_"
# Names of FastDeploy's own that mean the same on a dense model: they are passed on.
HOST_METHODS = ("block_wise_fp8", "wfp8afp8")
# What multiplies fp8, and what a GPU without it can be given instead.
FP8_INSTEAD = {"fp8": "wint8", "w4afp8": "w4a8"}
FIRST_FP8_SM = 89
# From here on FastDeploy's cutlass_scaled_mm, which w4afp8 needs, multiplies int8 alone.
LAST_SCALED_FP8_SM = 99
# FastDeploy's own linear methods serve these on a GPU, so that its cache of loaded weights may.
HOST_CACHED = ("wint8", "fp8")
CACHE_VARIABLE = "FD_ENABLE_MODEL_LOAD_CACHE"

# Rows of each weight that are looked at before a start; the worker looks at all of them.
SAMPLED_ROWS = 4
LINEAR_NAMES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def choose_quantization(
    folder: str | Path,
    config: MiniCPMConfig,
    asked: object,
    *,
    tensor_parallel_size: int = 1,
    tile: int = 128,
    sm_version: int | None = None,
) -> dict[str, Any] | None:
    """What FastDeploy's worker is to be told; ``None`` for 16-bit weights.

    Choosing again from what was chosen gives the same.

    Args:
        asked: ``--quantization``: a name, FastDeploy's dictionary of it, or None; then
            ``FD_QUANT_TYPE`` counts.
        tile: in features that a kernel takes at once: 128 on a GPU, 64 on a CPU.
        sm_version: the GPU's compute capability times ten, if it is known.

    Raises:
        UsageError: what was asked for cannot be done with this checkpoint, and what can.
    """
    sidecar = read_sidecar(folder)
    named, name = _asked_name(asked)
    passed_on = None
    if isinstance(asked, Mapping) and (name in HOST_METHODS or _is_kv_cache_only(asked)):
        passed_on = dict(asked)
    if passed_on is None and name is not None and name not in METHODS:
        raise UsageError(
            f"{named} is {name!r}, wanted one of {', '.join(METHODS)}, or for FastDeploy's own "
            f"methods {' or '.join(HOST_METHODS)}: correct it, or leave it out for 16-bit weights"
        )
    if sidecar is not None and name not in (None, sidecar.method):
        raise UsageError(
            f"{named} is {name!r}, but the checkpoint's weights are stored as {sidecar.method}: "
            f"leave {named} out"
        )
    if passed_on is not None:
        return passed_on
    if sidecar is not None:
        _check_shards(config, sidecar.modules, tensor_parallel_size, tile)
        if sm_version is not None and sidecar.method in FP8_INSTEAD:
            check_fp8(sidecar.method, sm_version)
        # FastDeploy's own word for weights that need no quantising after they are loaded.
        chosen: dict[str, Any] = {"quantization": PREFIX + sidecar.method, "is_quantized": True}
    elif name is None:
        return None
    else:
        if sm_version is not None and name in FP8_INSTEAD:
            check_fp8(name, sm_version)
        if name in ("wint2", "w4a8", "w4afp8"):
            _check_shards(config, {}, tensor_parallel_size, tile)
        if name == "wint2" and os.environ.get(DATA_FREE_VARIABLE) != "1":
            _check_ternary(Path(folder), named)
        chosen = {"quantization": PREFIX + name}
    if os.environ.get(CACHE_VARIABLE) == "1" and (sidecar is not None or name not in HOST_CACHED):
        raise UsageError(
            f"{CACHE_VARIABLE} is 1, wanted unset with {chosen['quantization']}: FastDeploy's "
            "cache cannot hold these weights; store them once with `fd-minicpm41 quantize`"
        )
    return chosen


@cache
def stored_formats(folder: str) -> Mapping[str, LowBitFormat]:
    """Format by module name of a checkpoint that holds low-bit weights; empty if it has none.

    A head that is the embedding has the embedding's.
    """
    sidecar = read_sidecar(folder)
    if sidecar is None:
        return {}
    formats = dict(sidecar.modules)
    if EMBEDDING in formats and HEAD not in formats and not _holds(folder, f"{HEAD}.weight"):
        formats[HEAD] = formats[EMBEDDING]
    return formats


def _holds(folder: str, tensor: str) -> bool:
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(str(path), framework="np") as file:
            if tensor in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                return True
    return False


def stored_names(names: Iterable[str], folder: str) -> set[str]:
    """What a checkpoint calls its tensors, of the ``names`` that they have in 16 bits."""
    sidecar = read_sidecar(folder)
    if sidecar is None:
        return set(names)
    found, formats = set(), stored_formats(folder)
    for name in names:
        module = name.removesuffix(".weight")
        fmt = formats.get(module)
        if fmt is None:
            found.add(name)
            continue
        found |= {f"{module}.qweight", f"{module}.scales"}
        if sidecar.method in CHANNEL_METHODS and fmt.bits == 4:
            found.add(f"{module}.channel_scales")
    return found


def _asked_name(asked: object) -> tuple[str, str | None]:
    """Where the user named a method, and its name in lower case."""
    if asked is None:
        variable = os.environ.get(QUANT_VARIABLE)
        return QUANT_VARIABLE, variable.lower() if variable else None
    named = "--quantization"
    values: Mapping[Any, Any] = asked if isinstance(asked, Mapping) else {"quantization": asked}
    name = values.get("quantization")
    if not isinstance(name, str):
        raise UsageError(
            f"{named} is {asked!r}, wanted a name, as in --quantization wint4: correct it"
        )
    more = sorted(set(values) - {"quantization", "is_quantized"})
    if more and not _is_kv_cache_only(values):
        raise UsageError(
            f"{named} has {', '.join(more)} beside the name {name!r}, wanted the name alone: "
            "FastDeploy takes more as a checkpoint of its own quantised format"
        )
    return named, name.lower().removeprefix(PREFIX)


def _is_kv_cache_only(values: Mapping[Any, Any]) -> bool:
    """FastDeploy's mix_quant that leaves the weights alone."""
    return (
        values.get("quantization") == "mix_quant"
        and values.get("dense_quant_type") is None
        and values.get("moe_quant_type") is None
    )


def _check_shards(
    config: MiniCPMConfig, modules: Mapping[str, LowBitFormat], num_ranks: int, tile: int
) -> None:
    """Holds the in features of each rank against groups, Hadamard blocks and kernels."""
    split = {"self_attn.o_proj": num_ranks, "mlp.down_proj": num_ranks}
    in_features = {
        "self_attn.o_proj": config.num_q_heads * config.head_dim,
        "mlp.down_proj": config.intermediate_size,
    }
    for i in range(config.num_layers if modules else 1):
        for name in LINEAR_NAMES:
            module = f"model.layers.{i}.{name}"
            fmt = modules.get(module)
            if modules and fmt is None:
                continue
            columns, ranks = in_features.get(name, config.hidden_size), split.get(name, 1)
            step = tile
            if fmt is not None:
                step = max(tile, fmt.hadamard, fmt.group if fmt.group in GROUPS else 0)
            if columns % (ranks * step):
                over = f" over {ranks} ranks" if ranks > 1 else ""
                mend = (
                    "start with a smaller --tensor-parallel-size"
                    if ranks > 1 and columns % step == 0
                    else "serve this model in bf16"
                )
                raise UsageError(
                    f"{module} has {columns} in features{over}, wanted a multiple of {step} on "
                    f"each rank, which the low-bit kernels take at once: {mend}"
                )


def check_fp8(method: str, sm_version: int) -> None:
    """Refuses a method that multiplies fp8 on a GPU that cannot.

    Raises:
        UsageError: a compute capability below 8.9, or for w4afp8 of 10.0 and later, and what to
            choose instead.
    """
    if sm_version < FIRST_FP8_SM:
        raise UsageError(
            f"{method} needs a GPU that multiplies fp8, of compute capability 8.9 or later; this "
            f"one has {sm_version // 10}.{sm_version % 10}: choose {FP8_INSTEAD[method]}"
        )
    if method == "w4afp8" and sm_version > LAST_SCALED_FP8_SM:
        raise UsageError(
            "w4afp8 needs FastDeploy's fp8 products with scales, which it has for compute "
            f"capability 8.9 and 9.0; this GPU has {sm_version // 10}.{sm_version % 10}: choose "
            f"{FP8_INSTEAD[method]}"
        )


def is_ternary(rows: NDArray[Any], group: int) -> bool:
    """Whether each group of ``rows [N, K]`` holds only -s, 0 and s, as ``ternary.py`` tells it."""
    count, columns = rows.shape
    if columns % group:
        return False
    sizes = np.abs(rows.astype(np.float32)).reshape(count, columns // group, group)
    return bool(((sizes == sizes.max(-1, keepdims=True)) | (sizes == 0)).all())


def _check_ternary(folder: Path, named: str) -> None:
    for name, rows in _sampled_weights(folder):
        if not any(is_ternary(rows, group) for group in GROUPS):
            raise UsageError(
                f"{named} is wint2, but {name} is not ternary, and 2 bits without calibration "
                f"destroy a model: quantise it first, `fd-minicpm41 quantize --model {folder} "
                f"--out {folder}-wint2 --method wint2 --calib TEXT.txt`, and serve {folder}-wint2 "
                f"(or set {DATA_FREE_VARIABLE}=1 to round it all the same)"
            )


def _sampled_weights(folder: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """A few rows of every linear layer's weight, by name."""
    suffixes = tuple(f"{name}.weight" for name in LINEAR_NAMES)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="np") as file:
            for name in sorted(file.keys()):
                if name.endswith(suffixes):
                    yield name, file.get_slice(name)[:SAMPLED_ROWS]
