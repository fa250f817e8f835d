"""Embedding and output head of 8-bit rows, where a checkpoint stores them so."""

from __future__ import annotations

from typing import Any

import paddle
from fastdeploy.config import FDConfig
from fastdeploy.model_executor.forward_meta import ForwardMeta
from fastdeploy.model_executor.layers.linear import ColumnParallelLinear
from paddle import nn
from paddle.distributed.fleet.layers.mpu import mp_ops

from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.formats import LowBitFormat
from fd_minicpm41.quantization.plan import EMBEDDING, HEAD


class LowBitRows(nn.Layer):
    """The embedding's codes and scales, whole on every rank, so that a lookup needs no exchange.

    Raises:
        UsageError: a format other than 8 bits without a Hadamard transform.
    """

    def __init__(self, config: MiniCPMConfig, fmt: LowBitFormat) -> None:
        super().__init__()
        if fmt.bits != 8 or fmt.hadamard:
            raise UsageError(
                f"{EMBEDDING} has {fmt.bits} bits and Hadamard blocks of {fmt.hadamard}, "
                "wanted 8 bits without a transform: quantise the checkpoint again"
            )
        fmt.check_columns(config.hidden_size, EMBEDDING)
        self.fmt = fmt
        rows, columns = config.vocab_size, config.hidden_size
        for name, shape, dtype in (
            ("qweight", [rows, columns], "uint8"),
            ("scales", [rows, columns // fmt.group], "bfloat16"),
        ):
            parameter = self.create_parameter(
                shape=shape, dtype=dtype, default_initializer=nn.initializer.Constant(0)
            )
            setattr(self, name, parameter)

    def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
        """``[num_tokens, hidden_size]`` of the default dtype."""
        dtype = paddle.get_default_dtype()
        levels = paddle.gather(self.qweight, ids).astype(dtype) - self.fmt.zero / 2
        scales = paddle.gather(self.scales, ids).astype(dtype).unsqueeze(-1)
        grouped = levels.reshape([ids.shape[0], -1, self.fmt.group])
        return (grouped * scales).reshape(levels.shape)


class LowBitEmbedding(nn.Layer):
    """Stands in for FastDeploy's ``VocabParallelEmbedding``."""

    def __init__(self, config: MiniCPMConfig, fmt: LowBitFormat) -> None:
        super().__init__()
        self.embeddings = LowBitRows(config, fmt)

    def forward(
        self, ids_remove_padding: paddle.Tensor, forward_meta: ForwardMeta | None = None
    ) -> paddle.Tensor:
        return self.embeddings(ids_remove_padding)


class LowBitHead(nn.Layer):
    """Stands in for FastDeploy's ``ParallelLMHead``: rows split over ranks, logits gathered.

    Raises:
        UsageError: a vocabulary that the ranks do not divide.
    """

    def __init__(self, fd_config: FDConfig, config: MiniCPMConfig) -> None:
        super().__init__()
        parallel_config: Any = fd_config.parallel_config
        self.num_ranks = parallel_config.tensor_parallel_size
        self.tp_group = parallel_config.tp_group
        if config.vocab_size % self.num_ranks:
            raise UsageError(
                f"--tensor-parallel-size is {self.num_ranks}, wanted a divisor of the "
                f"{config.vocab_size} rows of the 8-bit {HEAD}: choose another, or store "
                f"{HEAD} in bf16"
            )
        self.linear = ColumnParallelLinear(
            fd_config=fd_config,
            prefix=HEAD,
            input_size=config.hidden_size,
            output_size=config.vocab_size,
            with_bias=False,
        )

    def forward(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        logits = self.linear(hidden_states)
        return mp_ops._c_concat(logits, group=self.tp_group) if self.num_ranks > 1 else logits
