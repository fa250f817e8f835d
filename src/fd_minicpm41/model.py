"""MiniCPM4.1 of FastDeploy's own layers: the host's linear layers, norms, caches and loader.

Read downwards, in the order of :mod:`fd_minicpm41.reference.model`. Attention goes through
FastDeploy's ``Attention`` layer, so every backend serves it: the stock ones densely, ours by
InfLLM-V2. Tensor parallelism splits heads and columns as FastDeploy does; kv heads are replicated
when there are more ranks than kv heads.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import Any

import paddle
from fastdeploy.config import FDConfig
from fastdeploy.model_executor.forward_meta import ForwardMeta
from fastdeploy.model_executor.graph_optimization.decorator import support_graph_optimization
from fastdeploy.model_executor.layers.activation import SiluAndMul
from fastdeploy.model_executor.layers.attention.attention import Attention
from fastdeploy.model_executor.layers.embeddings import VocabParallelEmbedding
from fastdeploy.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from fastdeploy.model_executor.layers.lm_head import ParallelLMHead
from fastdeploy.model_executor.layers.normalization import RMSNorm
from fastdeploy.model_executor.models.model_base import ModelForCasualLM
from fastdeploy.model_executor.utils import default_weight_loader, process_weights_after_loading
from paddle import nn

from fd_minicpm41.config import ARCHITECTURE, MiniCPMConfig
from fd_minicpm41.errors import UsageError
from fd_minicpm41.fastdeploy_hooks import install_worker_hooks
from fd_minicpm41.preflight import check_context, served_config
from fd_minicpm41.quantization.choice import stored_formats, stored_names
from fd_minicpm41.quantization.plan import EMBEDDING, HEAD
from fd_minicpm41.quantization.vocabulary import LowBitEmbedding, LowBitHead
from fd_minicpm41.reference.model import weight_shapes
from fd_minicpm41.rope import rope_table

logger = logging.getLogger(__name__)

# Part of a checkpoint's name, what FastDeploy's layer calls it, and which shard of it this is.
WEIGHT_TABLE = (
    (".q_proj.", ".qkv_proj.", "q"),
    (".k_proj.", ".qkv_proj.", "k"),
    (".v_proj.", ".qkv_proj.", "v"),
    (".gate_proj.", ".up_gate_proj.", "gate"),
    (".up_proj.", ".up_gate_proj.", "up"),
    ("model.embed_tokens.", "model.embed_tokens.embeddings.", None),
    ("lm_head.", "lm_head.linear.", None),
)
# Recomputed from the configuration; old exports carry them.
IGNORED_WEIGHTS = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def parameter_name(weight_name: str) -> tuple[str, str | None]:
    """FastDeploy's parameter for a checkpoint's weight, and the shard of it ("q", "gate", ...)."""
    for theirs, ours, shard in WEIGHT_TABLE:
        if theirs in weight_name:
            return weight_name.replace(theirs, ours), shard
    return weight_name, None


class MiniCPM41MLP(nn.Layer):
    """down(silu(gate(x)) * up(x)); gate and up are one product, their activation one kernel."""

    def __init__(self, fd_config: FDConfig, prefix: str) -> None:
        super().__init__()
        model_config = fd_config.model_config
        self.up_gate_proj = MergedColumnParallelLinear(
            fd_config=fd_config,
            prefix=f"{prefix}.up_gate_proj",
            input_size=model_config.hidden_size,
            output_size=model_config.intermediate_size * 2,
            with_bias=False,
            activation="silu",
        )
        self.act_fn = SiluAndMul(fd_config=fd_config, bias=None, act_method="silu")
        self.down_proj = RowParallelLinear(
            fd_config=fd_config,
            prefix=f"{prefix}.down_proj",
            input_size=model_config.intermediate_size,
            output_size=model_config.hidden_size,
            with_bias=False,
        )

    def forward(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        return self.down_proj(self.act_fn(self.up_gate_proj(hidden_states)))


class MiniCPM41Attention(nn.Layer):
    """Projections around FastDeploy's attention, which rotates, writes the cache and attends."""

    def __init__(self, fd_config: FDConfig, layer_id: int, prefix: str) -> None:
        super().__init__()
        model_config = fd_config.model_config
        self.qkv_proj = QKVParallelLinear(
            fd_config=fd_config, prefix=f"{prefix}.qkv_proj", with_bias=False
        )
        self.attn = Attention(
            fd_config=fd_config, layer_id=layer_id, prefix=prefix, use_neox_rotary_style=True
        )
        self.o_proj = RowParallelLinear(
            fd_config=fd_config,
            prefix=f"{prefix}.o_proj",
            input_size=model_config.num_attention_heads * model_config.head_dim,
            output_size=model_config.hidden_size,
            with_bias=False,
        )

    def forward(self, hidden_states: paddle.Tensor, forward_meta: ForwardMeta) -> paddle.Tensor:
        qkv = self.qkv_proj(hidden_states)
        return self.o_proj(self.attn(qkv=qkv, forward_meta=forward_meta))


class MiniCPM41DecoderLayer(nn.Layer):
    """Attention and MLP; each branch is added times scale_depth / sqrt(num_layers)."""

    def __init__(
        self, fd_config: FDConfig, config: MiniCPMConfig, layer_id: int, prefix: str
    ) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale

        def norm(name: str) -> RMSNorm:
            return RMSNorm(
                fd_config,
                hidden_size=config.hidden_size,
                eps=config.rms_norm_eps,
                prefix=f"{prefix}.{name}",
                layer_id=layer_id,
            )

        self.input_layernorm = norm("input_layernorm")
        self.self_attn = MiniCPM41Attention(fd_config, layer_id, f"{prefix}.self_attn")
        self.post_attention_layernorm = norm("post_attention_layernorm")
        self.mlp = MiniCPM41MLP(fd_config, f"{prefix}.mlp")

    def forward(
        self,
        branch: paddle.Tensor,
        residual: paddle.Tensor | None,
        forward_meta: ForwardMeta,
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Takes and returns the scaled branch and the residual apart: the norm adds and normalises
        them in one kernel.
        """
        hidden_states, residual = self.input_layernorm(branch, residual)
        branch = self.self_attn(hidden_states, forward_meta) * self.residual_scale
        hidden_states, residual = self.post_attention_layernorm(branch, residual)
        return self.mlp(hidden_states) * self.residual_scale, residual


@support_graph_optimization
class MiniCPM41Model(nn.Layer):
    """Embedding, layers, last norm. Captured in decode steps, so it is called by keyword."""

    def __init__(self, fd_config: FDConfig, config: MiniCPMConfig) -> None:
        super().__init__()
        fd_config.model_config.pretrained_config.prefix_name = "model"
        self.scale_emb = config.scale_emb
        formats = stored_formats(fd_config.model_config.model)
        if EMBEDDING in formats:
            self.embed_tokens = LowBitEmbedding(config, formats[EMBEDDING])
        else:
            self.embed_tokens = VocabParallelEmbedding(
                fd_config=fd_config,
                num_embeddings=config.vocab_size,
                embedding_dim=config.hidden_size,
                params_dtype=paddle.get_default_dtype(),
                prefix=EMBEDDING,
            )
        self.layers = nn.LayerList(
            [
                MiniCPM41DecoderLayer(fd_config, config, i, f"model.layers.{i}")
                for i in range(config.num_layers)
            ]
        )
        self.norm = RMSNorm(
            fd_config,
            hidden_size=config.hidden_size,
            eps=config.rms_norm_eps,
            prefix="model.norm",
        )

    def forward(
        self, ids_remove_padding: paddle.Tensor, forward_meta: ForwardMeta
    ) -> paddle.Tensor:
        branch = self.embed_tokens(ids_remove_padding, forward_meta) * self.scale_emb
        residual = None
        for layer in self.layers:
            branch, residual = layer(branch, residual, forward_meta)
        hidden_states, _ = self.norm(branch, residual)
        return hidden_states


class MiniCPM41ForCausalLM(ModelForCasualLM):
    """MiniCPM4.1 as FastDeploy serves it.

    Raises:
        UsageError: a checkpoint or a context that cannot be served.
    """

    def __init__(self, fd_config: FDConfig) -> None:
        super().__init__(fd_config)
        install_worker_hooks()
        self.fd_config = fd_config
        self.config = served_config(fd_config.model_config.model)
        check_context(self.config, fd_config.model_config.max_model_len)
        chosen = fd_config.model_config.quantization
        if chosen is not None and fd_config.quant_config is None:
            raise UsageError(
                f"{chosen['quantization']} was chosen, but this worker was not told: start it with "
                "`fastdeploy serve` or fastdeploy.LLM"
            )
        self.logits_scale = self.config.logits_scale
        self.model = MiniCPM41Model(fd_config=fd_config, config=self.config)
        if HEAD in stored_formats(fd_config.model_config.model):
            self.lm_head = LowBitHead(fd_config, self.config)
        else:
            self.lm_head = ParallelLMHead(
                fd_config=fd_config,
                num_embeddings=self.config.vocab_size,
                embedding_dim=self.config.hidden_size,
                prefix=HEAD,
            )
        self.rotary_embs: paddle.Tensor | None = None

    @classmethod
    def name(cls) -> str:
        """The architecture that FastDeploy's loader looks up."""
        return ARCHITECTURE

    @paddle.no_grad()
    def load_weights(self, weights_iterator: Iterable[tuple[str, Any]]) -> None:
        """Loads ``(name, weight)`` pairs of a Hugging Face checkpoint.

        Raises:
            UsageError: a weight that the model has no place for, or one that is missing.
        """
        parameters = dict(self.named_parameters())
        after_loading = process_weights_after_loading(dict(self.named_sublayers()), self.fd_config)
        default_loader = default_weight_loader(self.fd_config)
        missing = stored_names(
            weight_shapes(self.config, tied=False), self.fd_config.model_config.model
        )
        # Names of the head that the embedding's weights were loaded for.
        tied: set[str] = set()

        def load(name: str, weight: Any) -> None:
            target, shard = parameter_name(name)
            parameter = parameters[target]
            loader = getattr(parameter, "weight_loader", default_loader)
            loader(parameter, weight, *([] if shard is None else [shard]))
            after_loading(target.rpartition(".")[0], parameter)

        for name, weight in weights_iterator:
            if IGNORED_WEIGHTS.search(name):
                continue
            if name not in missing:
                raise UsageError(
                    f"weight {name!r} has no place in MiniCPM4.1, or came twice: give the bf16 "
                    "checkpoint in Hugging Face's format, or one of `fd-minicpm41 quantize`"
                )
            load(name, weight)
            missing.remove(name)
            head_name = name.replace(f"{EMBEDDING}.", f"{HEAD}.")
            if head_name != name and head_name in missing:
                # Loaded as the head too, each with its own split over ranks; the head's own weight
                # replaces it if the checkpoint has one.
                load(head_name, weight)
                tied.add(head_name)
        if missing and missing <= tied:
            logger.info("fd_minicpm41: no lm_head in the checkpoint, the embedding is the head")
            missing.clear()
        if missing:
            raise UsageError(
                f"the checkpoint lacks {len(missing)} weights, {min(missing)!r} for one: download "
                "it again"
            )
        if self.fd_config.quant_config is not None:
            from fd_minicpm41.quantization.config import describe_weights

            logger.info("fd_minicpm41: weights: %s", describe_weights(self))

    def set_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The entry of FastDeploy's older loader, which cannot read Hugging Face checkpoints."""
        raise UsageError(
            "--load-choices is 'default', wanted 'default_v1': the older loader cannot read a "
            "Hugging Face checkpoint; leave --load-choices out"
        )

    def forward(
        self,
        inputs: dict[str, paddle.Tensor] | None = None,
        forward_meta: ForwardMeta = None,
        ids_remove_padding: paddle.Tensor | None = None,
    ) -> paddle.Tensor:
        """Hidden states ``[num_tokens, hidden_size]``. FastDeploy 2.5 hands over the ids
        themselves, later ones a dictionary that holds them.
        """
        if ids_remove_padding is None:
            assert inputs is not None
            ids_remove_padding = inputs["ids_remove_padding"]
        forward_meta.rotary_embs = self._rotary_embs()
        return self.model(ids_remove_padding=ids_remove_padding, forward_meta=forward_meta)

    def _rotary_embs(self) -> paddle.Tensor:
        """fp32 ``[2, 1, max_model_len, 1, head_dim]``, cos and sin.

        FastDeploy has no LongRoPE and would hand its attention another model's table. Made at the
        first (dummy) step, when the device is known, and kept at one address for captured graphs.
        """
        if self.rotary_embs is None:
            cos, sin = rope_table(self.config, self.fd_config.model_config.max_model_len)
            table = paddle.stack([paddle.to_tensor(cos), paddle.to_tensor(sin)])
            self.rotary_embs = table.unsqueeze([1, 3])
        return self.rotary_embs

    def compute_logits(
        self, hidden_states: paddle.Tensor, forward_meta: ForwardMeta | None = None
    ) -> paddle.Tensor:
        """fp32 ``[num_rows, padded vocabulary]``; padding beyond ``vocab_size`` is masked.

        FastDeploy masks by the tokenizer's count of text pieces, which for this model would ban
        ``<|im_end|>`` and every other added token.
        """
        logits = self.lm_head(hidden_states * self.logits_scale).astype("float32")
        if logits.shape[-1] > self.config.vocab_size:
            logits[:, self.config.vocab_size :] = -float("inf")
        return logits

    def clear_graph_opt_backend(self) -> None:
        """Drops the captured graphs, before weights are replaced."""
        clear = getattr(self.model, "clear_graph_opt_backend", None)
        clear = clear or self.model.clear_grpah_opt_backend
        clear(fd_config=self.fd_config)

    # FastDeploy 2.5 calls it by this name.
    clear_grpah_opt_backend = clear_graph_opt_backend
