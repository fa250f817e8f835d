"""Which module gets which format: the method, its group, the exceptions a user makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.formats import LowBitFormat
from fd_minicpm41.quantization.sidecar import CHANNEL_METHODS, METHODS

ALGORITHMS = ("rtn", "gptq", "ternary", "import")
DEFAULT_ZERO = {2: 3, 4: 16, 8: 256}
METHOD_BITS = {"wint2": 2, "wint4": 4, "wint8": 8, "w4a8": 4, "w4afp8": 4}
KEEP = 16  # bits of a module that stays as it is

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
# Linear layers that read the same input. A server merges them, so they share their format.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Recipe:
    """What a user asks of the quantiser.

    Args:
        method: one of METHODS.
        algorithm: one of ALGORITHMS.
        group: columns a scale; 64 or 128.
        hadamard: block of the Hadamard transform of 2-bit weights; 0 for none.
        bits: exceptions: pattern of module names (``*`` matches anything) to 2, 4, 8 or 16 bits, or
            to an object with "bits" and any of "group" and "hadamard"; the last match counts.
        int8_head, int8_embedding: 8-bit rows for the vocabulary; a tied head is the embedding.

    Raises:
        UsageError: a value that is none of these.
    """

    method: str
    algorithm: str = "gptq"
    group: int = 128
    hadamard: int = 0
    bits: Mapping[str, Any] = field(default_factory=dict)
    int8_head: bool = False
    int8_embedding: bool = False

    def __post_init__(self) -> None:
        if self.method == "fp8":
            raise UsageError(
                "method is 'fp8', which needs no files of its own: serve the bf16 checkpoint with "
                "--quantization fp8"
            )
        for name, value, known in (
            ("method", self.method, METHODS),
            ("algorithm", self.algorithm, ALGORITHMS),
        ):
            if value not in known:
                raise UsageError(
                    f"{name} is {value!r}, wanted one of {', '.join(known)}: correct it"
                )
        if self.algorithm == "ternary" and (self.method != "wint2" or self.bits):
            raise UsageError(
                "the algorithm ternary stores every linear layer in 2 bits: give --method wint2 "
                "and no bits map"
            )
        if self.hadamard and self.method in CHANNEL_METHODS:
            raise UsageError(
                f"{self.method} has no Hadamard transform, as its prompts are multiplied in 8 "
                "bits: leave --hadamard out"
            )
        self.default_format()

    def default_format(self) -> LowBitFormat:
        """The format of a linear layer without an exception."""
        bits = METHOD_BITS[self.method]
        return LowBitFormat(bits, self.group, DEFAULT_ZERO[bits], self.hadamard)

    def to_dict(self) -> dict[str, Any]:
        """The same request as JSON values."""
        return asdict(self)


def plan_formats(recipe: Recipe, num_layers: int) -> dict[str, LowBitFormat | None]:
    """The format of every linear layer, ``None`` where it stays as it is.

    Raises:
        UsageError: a pattern that matches nothing, bits that the method does not have, or layers
            that share their input but not their format.
    """
    formats: dict[str, LowBitFormat | None] = {}
    unused = set(recipe.bits)
    for i in range(num_layers):
        for stage in STAGES:
            for short in stage:
                name = f"model.layers.{i}.{short}"
                formats[name] = recipe.default_format()
                for pattern, wanted in recipe.bits.items():
                    if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}"):
                        unused.discard(pattern)
                        formats[name] = _exception(recipe, pattern, wanted)
            held = {formats[f"model.layers.{i}.{short}"] for short in stage}
            if len(held) > 1:
                raise UsageError(
                    f"the bits map gives {', '.join(stage)} of layer {i} different formats: they "
                    "read the same input and are served as one; give them the same"
                )
    if unused:
        raise UsageError(
            f"the bits map's {sorted(unused)[0]!r} matches no linear layer: use names such as "
            "down_proj or model.layers.0.*"
        )
    return formats


def _exception(recipe: Recipe, pattern: str, wanted: Any) -> LowBitFormat | None:
    values = dict(wanted) if isinstance(wanted, Mapping) else {"bits": wanted}
    bits = values.pop("bits", None)
    unknown = sorted(set(values) - {"group", "hadamard"})
    if unknown:
        raise UsageError(
            f"the bits map's {pattern!r} has {', '.join(unknown)}, wanted bits, group or hadamard: "
            "correct it"
        )
    allowed = (4,) if recipe.method in CHANNEL_METHODS else (2, 4, 8)
    if bits == KEEP and not isinstance(bits, bool):
        return None
    if bits not in allowed or isinstance(bits, bool):
        raise UsageError(
            f"the bits map's {pattern!r} is {bits!r}, wanted {', '.join(map(str, allowed))} or "
            f"{KEEP} (kept as it is) with {recipe.method}: correct it"
        )
    # A transform pays where there are few levels, so that 4 bits beside 2 do without unless asked.
    hadamard = recipe.hadamard if bits == METHOD_BITS[recipe.method] else 0
    fmt = LowBitFormat(bits, recipe.group, DEFAULT_ZERO[bits], hadamard)
    return replace(fmt, **values)


def row_format(columns: int) -> LowBitFormat:
    """8-bit rows with one scale each, for ``lm_head`` and the embedding."""
    return LowBitFormat(8, columns, DEFAULT_ZERO[8])
