"""Model and sparse-attention configuration, read from a checkpoint's ``config.json``.

Both are frozen and checked on construction; every bad value is one :class:`UsageError` that names
the field, what it is, what is wanted and how to mend it. Code that holds a configuration trusts it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from fd_minicpm41.errors import UsageError

# Pages of the KV cache, blocks of the selection and the training of the model all use 64 tokens.
BLOCK_SIZE = 64

# The coarse windows (K2) that approximate the softmax normaliser are this much larger and sparser.
COARSE_FACTOR = 4

ARCHITECTURE = "MiniCPMForCausalLM"

# Factor tables that ship with the package, by the name a user types, and the context each serves.
PUBLISHED_ROPE_TABLES = {"128k": 131072}


def _require(ok: bool, what: str, got: object, wanted: str, mend: str) -> None:
    if not ok:
        raise UsageError(f"{what} is {got!r}, wanted {wanted}: {mend}")


def _check_int(where: str, name: str, value: object, minimum: int, mend: str) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(
        is_int and value >= minimum,  # type: ignore[operator]
        f"{where}{name}",
        value,
        f"a whole number of at least {minimum}",
        mend,
    )


def _check_positive(where: str, name: str, value: object, mend: str) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _require(
        is_number and math.isfinite(value) and value > 0,  # type: ignore[arg-type,operator]
        f"{where}{name}",
        value,
        "a positive number",
        mend,
    )


@dataclass(frozen=True)
class SparseConfig:
    """InfLLM-V2's parameters; the keywords are exactly Hugging Face's ``sparse_config`` keys.

    The defaults are the published ones for MiniCPM4.1-8B. ``topk`` counts every selected block that
    is not in the local window, the initial ones included, so a row attends to at most
    ``budget = topk + window_size / block_size`` blocks. ``dense_len`` is the context length from
    which a row is sparse; -1 makes every row sparse.

    Raises:
        UsageError: a value that the algorithm cannot use.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = BLOCK_SIZE
    window_size: int = 2048
    topk: int = 64
    use_nope: bool = False
    dense_len: int = 8192

    def __post_init__(self) -> None:
        where, mend = "sparse_config.", "correct it in config.json"
        for name, minimum in (
            ("kernel_size", 1),
            ("kernel_stride", 1),
            ("init_blocks", 0),
            ("window_size", 0),
            ("topk", 1),
            ("dense_len", -1),
        ):
            _check_int(where, name, getattr(self, name), minimum, mend)
        _require(
            self.block_size == BLOCK_SIZE,
            f"{where}block_size",
            self.block_size,
            f"{BLOCK_SIZE}",
            f"the model was trained with blocks of {BLOCK_SIZE} tokens; {mend}",
        )
        _require(
            BLOCK_SIZE % self.kernel_stride == 0,
            f"{where}kernel_stride",
            self.kernel_stride,
            f"a divisor of block_size ({BLOCK_SIZE})",
            f"{mend}, the published value is 16",
        )
        _require(
            self.kernel_size % self.kernel_stride == 0,
            f"{where}kernel_size",
            self.kernel_size,
            f"a multiple of kernel_stride ({self.kernel_stride})",
            f"{mend}, the published value is 32",
        )
        _require(
            self.window_size % BLOCK_SIZE == 0,
            f"{where}window_size",
            self.window_size,
            f"a multiple of block_size ({BLOCK_SIZE})",
            f"{mend}, the published value is 2048",
        )
        _require(
            self.topk > self.init_blocks,
            f"{where}topk",
            self.topk,
            f"more than init_blocks ({self.init_blocks}), which it includes",
            f"{mend}, the published value is 64",
        )
        _require(
            self.use_nope is False,
            f"{where}use_nope",
            self.use_nope,
            "false",
            "scoring with unrotated keys is not supported; the released models do not use it",
        )

    @property
    def local_blocks(self) -> int:
        """Blocks of the local window; the token's own block is forced besides them."""
        return self.window_size // BLOCK_SIZE

    @property
    def budget(self) -> int:
        """Blocks a row attends to at most: 64 + 32 = 96 as published."""
        return self.topk + self.local_blocks

    @property
    def coarse_kernel_size(self) -> int:
        """Keys in a coarse window: 128 as published."""
        return COARSE_FACTOR * self.kernel_size

    @property
    def coarse_kernel_stride(self) -> int:
        """Keys between coarse windows: 64 as published."""
        return COARSE_FACTOR * self.kernel_stride

    @classmethod
    def from_dict(cls, values: object) -> SparseConfig:
        """Reads Hugging Face's ``sparse_config``; absent keys take the published defaults."""
        if not isinstance(values, Mapping):
            raise UsageError(
                f"sparse_config is {values!r}, wanted an object of named values: correct it in "
                'config.json, for example {"topk": 64, "dense_len": 8192}'
            )
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        _require(
            not unknown,
            "sparse_config",
            unknown,
            f"only the keys {', '.join(known)}",
            "remove or rename them in config.json",
        )
        return cls(**values)


@dataclass(frozen=True)
class RopeScaling:
    """LongRoPE factors: one number for each of the ``head_dim / 2`` frequencies.

    Args:
        short_factor: used while the table is no longer than the original context.
        long_factor: used by longer tables.
        original_max_position_embeddings: tokens of the original context.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int

    @classmethod
    def from_dict(cls, values: object, rotary_dim: int) -> RopeScaling | None:
        """Reads Hugging Face's ``rope_scaling``; ``None`` or type "default" mean no scaling.

        Raises:
            UsageError: another type, or factor lists that do not fit ``rotary_dim / 2``.
        """
        if values is None:
            return None
        if not isinstance(values, Mapping):
            raise UsageError(
                f"rope_scaling is {values!r}, wanted an object or null: correct it in config.json"
            )
        rope_type = values.get("rope_type", values.get("type"))
        if rope_type == "default":
            return None
        _require(
            rope_type == "longrope",
            "rope_scaling.rope_type",
            rope_type,
            '"longrope" or "default"',
            "MiniCPM4.1 is trained with longrope; correct it in config.json",
        )
        factors = {}
        for name in ("short_factor", "long_factor"):
            listed = values.get(name)
            ok = isinstance(listed, (list, tuple)) and len(listed) == rotary_dim // 2
            _require(
                ok,
                f"rope_scaling.{name}",
                f"a list of {len(listed)}" if isinstance(listed, (list, tuple)) else listed,
                f"a list of {rotary_dim // 2} numbers, one a frequency",
                "copy it from the model's own config.json",
            )
            for number in listed:  # type: ignore[union-attr]
                _check_positive("rope_scaling.", name, number, "copy it from the model's own file")
            factors[name] = tuple(float(number) for number in listed)  # type: ignore[union-attr]
        original = values.get("original_max_position_embeddings")
        _check_int(
            "rope_scaling.",
            "original_max_position_embeddings",
            original,
            2,
            "MiniCPM4.1 has 65536; correct it in config.json",
        )
        return cls(original_max_position_embeddings=original, **factors)  # type: ignore[arg-type]


@cache
def published_rope_table(name: str) -> RopeScaling:
    """The factor table OpenBMB published for a longer context, by the name a user types."""
    if name.lower() not in PUBLISHED_ROPE_TABLES:
        raise UsageError(
            f"rope table is {name!r}, wanted one of {', '.join(PUBLISHED_ROPE_TABLES)}: "
            "correct the name, or leave it out to use the checkpoint's own factors"
        )
    text = resources.files("fd_minicpm41").joinpath(f"data/longrope_{name.lower()}.json")
    values = json.loads(text.read_text("utf-8"))
    table = RopeScaling.from_dict(values, rotary_dim=2 * len(values["long_factor"]))
    assert table is not None
    return table


@dataclass(frozen=True)
class MiniCPMConfig:
    """The decoder's shape and scalings. Names follow the field, not the file, where they differ.

    ``max_context`` is the number of tokens the rope table may serve. ``tie_word_embeddings`` is
    what the file says; a loader decides by the presence of ``lm_head.weight``.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    max_context: int
    scale_emb: float
    scale_depth: float
    dim_model_base: float
    rope_scaling: RopeScaling | None = None
    sparse: SparseConfig | None = None
    tie_word_embeddings: bool | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    @property
    def group_size(self) -> int:
        """Query heads that share one kv head, and so one selection."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def residual_scale(self) -> float:
        """Factor of each of the two residual branches: scale_depth / sqrt(num_layers)."""
        return self.scale_depth / math.sqrt(self.num_layers)

    @property
    def logits_scale(self) -> float:
        """Factor of the last hidden state before the head: dim_model_base / hidden_size."""
        return self.dim_model_base / self.hidden_size

    def with_rope_table(self, name: str | None) -> MiniCPMConfig:
        """This configuration with a published factor table ("128k"); ``None`` changes nothing."""
        if name is None:
            return self
        table = published_rope_table(name)
        _require(
            len(table.long_factor) == self.head_dim // 2,
            "head_dim",
            self.head_dim,
            f"{2 * len(table.long_factor)}, which the {name} rope table was made for",
            "leave the rope table out",
        )
        return replace(self, rope_scaling=table, max_context=PUBLISHED_ROPE_TABLES[name.lower()])

    def with_sparse(self, sparse: SparseConfig | None = None) -> MiniCPMConfig:
        """This configuration with ``sparse``, else its own sparse attention, else the published."""
        return replace(self, sparse=sparse or self.sparse or SparseConfig())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MiniCPMConfig:
        """Reads the object of a Hugging Face ``config.json``.

        Raises:
            UsageError: a missing or unusable value, or another architecture.
        """
        mend = "correct it in config.json"
        architectures = values.get("architectures")
        _require(
            architectures == [ARCHITECTURE],
            "architectures",
            architectures,
            f"[{ARCHITECTURE!r}]",
            "this is not a MiniCPM checkpoint",
        )
        _require(
            values.get("model_type") == "minicpm",
            "model_type",
            values.get("model_type"),
            '"minicpm"',
            f"{mend}; MiniCPM3 and MiniCPM-MoE are other models",
        )
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            _check_int("", name, values.get(name), 1, mend)
        for name in ("rms_norm_eps", "scale_emb", "scale_depth", "dim_model_base"):
            _check_positive("", name, values.get(name), mend)
        rope_theta = values.get("rope_theta", 10000.0)
        _check_positive("", "rope_theta", rope_theta, mend)
        num_q_heads, num_kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
        _require(
            num_q_heads % num_kv_heads == 0,
            "num_attention_heads",
            num_q_heads,
            f"a multiple of num_key_value_heads ({num_kv_heads})",
            mend,
        )
        head_dim = values.get("head_dim")
        if head_dim is None:
            _require(
                values["hidden_size"] % num_q_heads == 0,
                "hidden_size",
                values["hidden_size"],
                f"a multiple of num_attention_heads ({num_q_heads})",
                f"{mend}, or add head_dim",
            )
            head_dim = values["hidden_size"] // num_q_heads
        _check_int("", "head_dim", head_dim, 2, mend)
        _require(head_dim % 2 == 0, "head_dim", head_dim, "an even number", mend)
        for name in ("attention_bias", "qk_norm"):
            _require(
                not values.get(name, False),
                name,
                values.get(name),
                "false",
                "MiniCPM4 and 4.1 have neither bias nor query and key norms",
            )
        _require(
            values.get("hidden_act", "silu") == "silu",
            "hidden_act",
            values.get("hidden_act"),
            '"silu"',
            mend,
        )
        sparse = values.get("sparse_config")
        eos = values.get("eos_token_id")
        if eos is None:
            eos = ()
        return cls(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=values["rms_norm_eps"],
            rope_theta=float(rope_theta),
            max_position_embeddings=values["max_position_embeddings"],
            max_context=values["max_position_embeddings"],
            scale_emb=values["scale_emb"],
            scale_depth=values["scale_depth"],
            dim_model_base=values["dim_model_base"],
            rope_scaling=RopeScaling.from_dict(values.get("rope_scaling"), head_dim),
            sparse=None if sparse is None else SparseConfig.from_dict(sparse),
            tie_word_embeddings=values.get("tie_word_embeddings"),
            bos_token_id=values.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MiniCPMConfig:
        """Reads ``config.json`` of a checkpoint folder."""
        return cls.from_dict(read_json(Path(folder), "config.json"))


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in one of a checkpoint's JSON files.

    Raises:
        UsageError: no such folder or file, or a file that is not a JSON object.
    """
    if not folder.is_dir():
        raise UsageError(
            f"model folder {str(folder)!r} does not exist: give the folder that holds config.json"
        )
    path = folder / name
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist: give a complete Hugging Face checkpoint folder"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): download the file again") from None
    if not isinstance(values, dict):
        raise UsageError(
            f"{path} holds {type(values).__name__}, wanted an object: download it again"
        )
    return values
