"""``fdm_quant.json``: what a folder of low-bit weights holds, and its tensors read and checked.

The folder is a Hugging Face checkpoint in which ``X.weight`` of a quantised module X is replaced by

* ``X.qweight`` uint8 ``[N, K * bits / 8]``, the plain layout of ``formats.py``;
* ``X.scales`` bf16 ``[N, K / group]``;
* ``X.channel_scales`` fp32 ``[N]``, in w4a8 and w4afp8 alone.

``config.json`` is that of the source and says nothing of it. Paddle is not imported here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fd_minicpm41.config import read_json
from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.formats import LowBitFormat

SIDECAR = "fdm_quant.json"
FORMAT = "fdm-quant"
VERSION = 1
# What is stored by each name a user types; fp8 is made by FastDeploy as it loads and never stored.
METHODS = ("wint8", "wint4", "wint2", "w4a8", "w4afp8")
# Methods whose rows have a scale of their own beside the groups'.
CHANNEL_METHODS = ("w4a8", "w4afp8")
SUFFIXES = (".qweight", ".scales", ".channel_scales")
HASH_CHUNK = 1 << 22


@dataclass(frozen=True)
class Sidecar:
    """The file's content.

    Attributes:
        method: the name a user serves it by, one of METHODS.
        modules: format by module name, such as "model.layers.0.mlp.up_proj".
        algorithm: "rtn", "gptq", "ternary" or "import".
        source: SHA-256 by file of the checkpoint it was made from.
        calibration: text and tokens that GPTQ saw; ``None`` if there were none.
        bits_per_weight: scales included, over the low-bit linear layers of the decoder.
        size: bytes of all tensors.
        files: SHA-256 by file of the weights beside it.
        errors: relative error by module: of the output on calibration tokens, or of the weight.
        tool: the version that wrote it.
    """

    method: str
    modules: Mapping[str, LowBitFormat]
    algorithm: str = "rtn"
    source: Mapping[str, str] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    bits_per_weight: float = 0.0
    size: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    tool: str = ""

    @property
    def name(self) -> str:
        """The method, with "-mix" where the layers' linears do not all have its bits."""
        bits = {fmt.bits for name, fmt in self.modules.items() if name.startswith("model.layers.")}
        return self.method if len(bits) <= 1 else f"{self.method}-mix"

    def to_dict(self) -> dict[str, Any]:
        """What is written; modules in their order."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["modules"] = {name: asdict(fmt) for name, fmt in self.modules.items()}
        return {"format": FORMAT, "version": VERSION, **values}


def read_sidecar(folder: str | Path) -> Sidecar | None:
    """The sidecar of a folder; ``None`` if it has none.

    Raises:
        UsageError: a newer version, or a file that is damaged.
    """
    path = Path(folder) / SIDECAR
    if not path.exists():
        return None
    values = read_json(Path(folder), SIDECAR)
    if values.pop("format", None) != FORMAT:
        raise UsageError(f"{path} is not of format {FORMAT!r}: quantise the checkpoint again")
    version = values.pop("version", None)
    if not isinstance(version, int) or version < 1:
        raise UsageError(f"{path} has version {version!r}, wanted {VERSION}: quantise it again")
    if version > VERSION:
        raise UsageError(
            f"{path} has version {version}, this package reads up to {VERSION}: upgrade "
            "fd-minicpm41, or quantise the checkpoint with this version"
        )
    if values.get("method") not in METHODS:
        raise UsageError(
            f"{path} has method {values.get('method')!r}, wanted one of {', '.join(METHODS)}: "
            "quantise the checkpoint again"
        )
    known = {f.name for f in fields(Sidecar)}
    try:
        modules = {name: LowBitFormat(**fmt) for name, fmt in values.pop("modules").items()}
        return Sidecar(modules=modules, **{k: v for k, v in values.items() if k in known})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({error}): quantise the checkpoint again") from None


def split_tensor_name(name: str) -> tuple[str, str] | None:
    """Module and suffix of a quantised module's tensor; ``None`` for any other tensor."""
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return name[: -len(suffix)], suffix
    return None


def logical_shapes(
    stored: Mapping[str, tuple[int, ...]], sidecar: Sidecar, where: str
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint that the stored tensors stand for.

    Raises:
        UsageError: a module whose tensors are missing or do not fit its format, or tensors of a
            module that the sidecar does not name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in stored.items():
        parts = split_tensor_name(name)
        if parts is None:
            shapes[name] = shape
        elif parts[0] not in sidecar.modules:
            raise UsageError(
                f"{where}: {name} is of a module that {SIDECAR} does not name: the folder is mixed "
                "up; quantise the checkpoint again"
            )
    for module, fmt in sidecar.modules.items():
        wanted: dict[str, tuple[int, ...]] = {}
        qweight = stored.get(f"{module}.qweight", ())
        if len(qweight) == 2:
            rows, columns = qweight[0], qweight[1] * 8 // fmt.bits
            fmt.check_columns(columns, module)
            wanted[f"{module}.scales"] = (rows, columns // fmt.group)
            if sidecar.method in CHANNEL_METHODS and fmt.bits == 4:
                wanted[f"{module}.channel_scales"] = (rows,)
            shapes[f"{module}.weight"] = (rows, columns)
        if len(qweight) != 2 or any(stored.get(n) != shape for n, shape in wanted.items()):
            raise UsageError(
                f"{where}: the tensors of {module} do not fit {SIDECAR}: the folder is incomplete "
                "or mixed up; quantise the checkpoint again"
            )
        if f"{module}.weight" in stored:
            raise UsageError(
                f"{where} holds {module} both quantised and not: quantise the checkpoint again"
            )
    return shapes


def hash_file(path: Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal; ``on_bytes`` is told the size of each piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, by name."""
    return sorted(folder.glob("*.safetensors"))


def check_hashes(
    folder: Path,
    wanted: Mapping[str, str],
    mend: str,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Holds the weights of a folder against recorded hashes.

    Raises:
        UsageError: a file that is missing, added or different, by name; ``mend`` ends the message.
    """
    held = {path.name: path for path in weight_files(folder)}
    odd = sorted(held.keys() ^ wanted.keys())
    if odd:
        raise UsageError(f"{folder}: {', '.join(odd[:6])} is missing or was added: {mend}")
    for name, path in held.items():
        digest = hash_file(path, on_bytes)
        if digest != wanted[name]:
            raise UsageError(
                f"{path} has SHA-256 {digest[:16]}..., recorded is {wanted[name][:16]}...: {mend}"
            )


def dump(values: Mapping[str, Any]) -> str:
    """JSON as this package writes it: the same bytes for the same values."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
