"""FastDeploy's quantisation configuration for each of our names, made in the worker.

``get_quantization_config`` answers a name of ours with :class:`LowBitConfig`, whose ``from_config``
decides by the machine who serves the format: FastDeploy's own linear methods where they do what the
name says on a dense model, else ours (:mod:`fd_minicpm41.quantization.linear`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import paddle
from fastdeploy.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from fastdeploy.model_executor.layers.quantization.block_wise_fp8 import BlockWiseFP8Config
from fastdeploy.model_executor.layers.quantization.quant_base import QuantConfigBase
from fastdeploy.model_executor.layers.quantization.weight_only import (
    GPUWeightOnlyLinearMethod,
    WINT4Config,
    WINT8Config,
)
from fastdeploy.model_executor.layers.quantization.wfp8afp8 import WFP8AFP8Config
from fastdeploy.model_executor.layers.utils import get_sm_version

from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.choice import FIRST_FP8_SM, PREFIX, check_fp8, stored_formats
from fd_minicpm41.quantization.linear import (
    BITS,
    GroupwiseLinearMethod,
    LowBitLinearMethod,
    RoundingLinearMethod,
    StoredLinearMethod,
)

# FastDeploy keys its cache of loaded weights by name(): a new layout needs a new version.
LAYOUT_VERSION = 1
# FastDeploy's merged linear layers by what a checkpoint calls their first part.
MERGED = {"qkv_proj": "q_proj", "up_gate_proj": "gate_proj"}


def has_cuda() -> bool:
    """Whether this Paddle can run FastDeploy's own quantised products, which have no CPU side."""
    return bool(paddle.is_compiled_with_cuda())


class LowBitConfig(QuantConfigBase):
    """Low-bit linear layers of ours.

    Args:
        method: one of ``choice.METHODS`` but fp8.
        is_stored: the checkpoint holds codes and scales; else bf16 weights, rounded when loaded.
    """

    def __init__(self, method: str, is_stored: bool) -> None:
        super().__init__()
        self.method = method
        # What FastDeploy's layers and loader read of every configuration.
        self.is_checkpoint_bf16 = not is_stored
        self.quant_max_bound = self.quant_min_bound = self.quant_round_type = 0

    def name(self) -> str:
        """Not FastDeploy's own name, which would choose its older loader for some of them."""
        return f"{PREFIX}{self.method}_v{LAYOUT_VERSION}"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QuantConfigBase:
        """The configuration that serves what was chosen: this class's, or one of FastDeploy's.

        Raises:
            UsageError: fp8 or w4afp8 on a GPU that does not multiply fp8.
        """
        method = str(config["quantization"]).removeprefix(PREFIX)
        is_stored = bool(config.get("is_quantized"))
        if method == "fp8" or (method == "w4afp8" and has_cuda()):
            check_fp8(method, get_sm_version())
        if method == "fp8":
            return fp8_config()
        if has_cuda() and not is_stored and method in HOST_CONFIGS:
            return HOST_CONFIGS[method].from_config({})
        return cls(method, is_stored)

    def get_quant_method(self, layer: Any) -> Any:
        """The method of a linear layer; ``None`` for a layer that stays in 16 bits."""
        if not isinstance(layer, LinearBase):
            return None
        if self.is_checkpoint_bf16:
            return RoundingLinearMethod(self.method)
        *parents, name = layer.prefix.split(".")
        module = ".".join([*parents, MERGED.get(name, name)])
        formats = stored_formats(layer.fd_config.model_config.model)
        if not formats:
            raise UsageError(
                "the checkpoint holds no low-bit weights, but FastDeploy says that they are "
                "quantised already: start without --dynamic-load-weight"
            )
        fmt = formats.get(module)
        if fmt is None:
            return None
        # A module of other bits than its checkpoint's method is served by what these mean.
        is_mixed = fmt.bits != BITS[self.method]
        return StoredLinearMethod(f"wint{fmt.bits}" if is_mixed else self.method, fmt)


class GroupwiseWint4Config(WINT4Config):
    """FastDeploy's wint4 with groups everywhere: without Machete it has one scale a row."""

    def get_quant_method(self, layer: Any) -> Any:
        method = super().get_quant_method(layer)
        if type(method) is GPUWeightOnlyLinearMethod:
            return GroupwiseLinearMethod(self)
        return method


# Served by FastDeploy from a bf16 checkpoint.
HOST_CONFIGS = {"wint8": WINT8Config, "wint4": GroupwiseWint4Config}


def fp8_config() -> QuantConfigBase:
    """FastDeploy's fp8 for this GPU: blocks of 128x128 from Hopper on, a scale a row on Ada."""
    config = WFP8AFP8Config if get_sm_version() == FIRST_FP8_SM else BlockWiseFP8Config
    return config.from_config({})


def describe_weights(model: paddle.nn.Layer) -> str:
    """What the linear layers of a loaded model hold and what multiplies them, for the log."""
    found = Counter(
        _describe(layer) for layer in model.sublayers() if isinstance(layer, LinearBase)
    )
    return "; ".join(f"{count} layers of {what}" for what, count in found.items())


def _describe(layer: Any) -> str:
    method, config = layer.quant_method, layer.fd_config.quant_config
    if isinstance(method, (LowBitLinearMethod, GroupwiseLinearMethod)):
        return method.describe()
    if isinstance(method, UnquantizedLinearMethod):
        return "16 bits"
    group = getattr(config, "group_size", -1)
    grouped = f" in groups of {group}" if group > 0 else ""
    return f"{config.name()}{grouped} by FastDeploy's {type(method).__name__}"
