"""The offline quantiser: reads a checkpoint layer by layer, writes its low-bit twin.

Beside the checkpoint's own memory map it holds one layer in fp32, the calibration tokens'
activations, and for GPTQ the second moments of one input: ``[K, K]`` fp32 twice, 2.1 GB at
K = 16384. After each layer its tensors and the activations are put on disk, so that a killed run
goes on where it was, to the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import paddle
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fd_minicpm41 import __version__
from fd_minicpm41.config import MiniCPMConfig, read_json
from fd_minicpm41.errors import UsageError
from fd_minicpm41.quantization.atomic import copy, remove_halves, save_weights, write_text
from fd_minicpm41.quantization.formats import TERNARY_ZERO, LowBitFormat, pack
from fd_minicpm41.quantization.gptq import Hessian, factor, quantise_gptq
from fd_minicpm41.quantization.gptq_import import GPTQSource
from fd_minicpm41.quantization.hadamard import transform
from fd_minicpm41.quantization.plan import EMBEDDING, HEAD, STAGES, Recipe, plan_formats, row_format
from fd_minicpm41.quantization.rtn import Ladder, quantise_rtn, restore
from fd_minicpm41.quantization.sidecar import (
    SIDECAR,
    SUFFIXES,
    Sidecar,
    dump,
    hash_file,
    weight_files,
)
from fd_minicpm41.quantization.streaming import (
    LayerRunner,
    Progress,
    TokenWindows,
    embed,
    finite_loader,
    load_layer,
    walk_layer,
)
from fd_minicpm41.quantization.ternary import quantise_ternary, ternary_group
from fd_minicpm41.reference.checkpoint import COMPUTED_SUFFIX, INDEX_FILE, Checkpoint
from fd_minicpm41.reference.model import Linear

# Tokens on which the error of a layer's output is measured.
ERROR_TOKENS = 512
# Files of a checkpoint folder that hold weights in some form: not copied.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")

Arrays = dict[str, NDArray[Any]]


def quantise(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    calibration: TokenWindows | None = None,
    *,
    device: str = "cpu",
    on_progress: Progress | None = None,
    on_hash: Callable[[int], object] | None = None,
) -> Sidecar:
    """Writes the folder ``out``: whole, or not at all.

    What is finished of an interrupted run lies in ``.NAME.partial`` beside it and is used by the
    next call with the same arguments.

    Args:
        calibration: needed by "gptq", and by it alone.
        device: "cpu" or "gpu", as Paddle was set to.
        on_progress: told (linear layers done, in all).
        on_hash: told the bytes of the source that were hashed.

    Raises:
        UsageError: whatever is wrong with the checkpoint, the recipe or the disk.
    """
    job = _Job(Path(source), Path(out).absolute(), recipe, calibration, device)
    with paddle.no_grad():
        return job.run(on_progress, on_hash)


class _Job:
    """One call of :func:`quantise`."""

    def __init__(
        self,
        source: Path,
        out: Path,
        recipe: Recipe,
        calibration: TokenWindows | None,
        device: str,
    ) -> None:
        if out.exists():
            raise UsageError(f"{out} exists already: remove it or choose another folder")
        self.config = MiniCPMConfig.from_pretrained(source)
        self.imported: GPTQSource | None = None
        _refuse_quantised(source, recipe)
        if recipe.algorithm == "import":
            self.imported = GPTQSource(source, self.config)
            checkpoint: Any = self.imported
        else:
            checkpoint = Checkpoint(source)
            checkpoint.check(self.config)
        if (recipe.algorithm == "gptq") != (calibration is not None):
            raise UsageError(
                f"the algorithm {recipe.algorithm} "
                + ("takes no calibration text" if calibration else "needs a calibration text")
                + ": correct --calib"
            )
        self.source, self.out, self.recipe, self.calibration = source, out, recipe, calibration
        self.checkpoint = checkpoint
        self.device = device
        self.load = finite_loader(checkpoint.load, device)
        self.formats = plan_formats(recipe, self.config.num_layers)
        for name, fmt in self.formats.items():
            if fmt is not None and recipe.algorithm not in ("ternary", "import"):
                fmt.check_columns(checkpoint.shapes[f"{name}.weight"][1], name)
        self.runner: LayerRunner | None = None
        if calibration is not None:
            self.runner = LayerRunner(self.config, len(calibration.windows[0]))
        self.work = out.with_name(f".{out.name}.partial")
        self.result = self.work / "checkpoint"
        self.total = self.config.num_layers * sum(map(len, STAGES))

    def run(self, on_progress: Progress | None, on_hash: Callable[[int], object] | None) -> Sidecar:
        hashes = {p.name: hash_file(p, on_hash) for p in weight_files(self.source)}
        finished = 0
        try:
            self._open(hashes)
            self._write_vocabulary()
            hidden = None
            for index in range(self.config.num_layers):
                if not self._is_finished(index):
                    if hidden is None:
                        hidden = self._hidden_before(index)
                    hidden = self._write_layer(index, hidden, on_progress)
                finished = index + 1
                if on_progress is not None:
                    on_progress(finished * self.total // self.config.num_layers, self.total)
            return self._publish(hashes)
        except (OSError, SafetensorError) as error:
            remove_halves(self.work)
            raise UsageError(
                f"{self.out} cannot be written ({error}): free some space and repeat the command; "
                f"{finished} of {self.config.num_layers} layers are finished and kept in "
                f"{self.work}"
            ) from None

    # What lies on disk while the job runs.

    def _open(self, hashes: dict[str, str]) -> None:
        wanted = {
            "tool": __version__,
            "recipe": self.recipe.to_dict(),
            "device": self.device,
            "source": hashes,
            "calibration": None if self.calibration is None else self.calibration.sha256,
        }
        path = self.work / "job.json"
        if path.exists() and self.result.is_dir():
            try:
                held = json.loads(path.read_text("utf-8"))
            except ValueError:
                held = None
            if held != wanted:
                raise UsageError(
                    f"{self.work} holds an unfinished run with other arguments or another source: "
                    "repeat that command, or remove the folder"
                )
            remove_halves(self.work)
            return
        if self.work.exists():
            shutil.rmtree(self.work)
        self.result.mkdir(parents=True)
        write_text(dump(wanted), path)

    def _shard(self, index: int) -> Path:
        """File of layer ``index``; -1 is what stands outside the layers."""
        count = self.config.num_layers + 1
        return self.result / f"model-{index + 2:05d}-of-{count:05d}.safetensors"

    def _errors_file(self, index: int) -> Path:
        return self.work / f"errors-{index:05d}.json"

    def _hidden_file(self, index: int) -> Path:
        return self.work / f"hidden-{index:05d}.safetensors"

    def _is_finished(self, index: int) -> bool:
        if not self._shard(index).exists():
            return False
        # Its output is needed by the next layer, unless that is finished too.
        is_last = index + 1 == self.config.num_layers
        return (
            self.calibration is None
            or is_last
            or self._hidden_file(index + 1).exists()
            or self._shard(index + 1).exists()
        )

    def _hidden_before(self, index: int) -> list[paddle.Tensor]:
        if self.calibration is None:
            return []
        if index == 0:
            weight = self.load(f"{EMBEDDING}.weight")
            return embed(self.config, self.calibration.windows, weight)
        held = load_file(self._hidden_file(index))
        return [paddle.to_tensor(held[f"{i:05d}"]) for i in range(len(held))]

    def _write_layer(
        self, index: int, hidden: list[paddle.Tensor], on_progress: Progress | None
    ) -> list[paddle.Tensor]:
        done = index * self.total // self.config.num_layers

        def count(linears: int) -> None:
            nonlocal done
            done += linears
            if on_progress is not None:
                on_progress(done, self.total)

        arrays, errors, hidden = self._quantise_layer(index, hidden, count)
        write_text(json.dumps(errors), self._errors_file(index))
        save_weights(arrays, self._shard(index))
        if hidden and index + 1 < self.config.num_layers:
            held = {f"{i:05d}": x.numpy() for i, x in enumerate(hidden)}
            save_weights(held, self._hidden_file(index + 1))
        self._hidden_file(index).unlink(missing_ok=True)
        return hidden

    # The arithmetic.

    def _quantise_layer(
        self, index: int, hidden: list[paddle.Tensor], count: Callable[[int], None]
    ) -> tuple[Arrays, dict[str, float], list[paddle.Tensor]]:
        prefix = f"model.layers.{index}."
        arrays: Arrays = {}
        errors: dict[str, float] = {}
        for name in self.checkpoint.shapes:
            module = name.removesuffix(".weight")
            is_extra = name.endswith(COMPUTED_SUFFIX)
            if name.startswith(prefix) and self.formats.get(module) is None and not is_extra:
                arrays[name] = self._unchanged(name)

        def stage(names: tuple[str, ...], linears: list[Linear], xs: list[paddle.Tensor]) -> None:
            modules = [prefix + name for name in names]
            if self.formats[modules[0]] is not None:
                arrays_of, errors_of = self._calibrated(modules, linears, xs)
                arrays.update(arrays_of)
                errors.update(errors_of)
            count(len(names))

        if self.runner is not None:
            layer = load_layer(self.config, self.load, index)
            hidden = walk_layer(self.runner, layer, hidden, stage)
            return arrays, errors, hidden
        for name in (short for names in STAGES for short in names):
            module = prefix + name
            if self.formats[module] is not None:
                arrays_of, errors[module] = self._uncalibrated(module)
                arrays |= arrays_of
            count(1)
        return arrays, errors, hidden

    def _calibrated(
        self, modules: list[str], linears: list[Linear], xs: list[paddle.Tensor]
    ) -> tuple[Arrays, dict[str, float]]:
        """GPTQ of linear layers with one input; they go on with their low-bit weights."""
        fmt = self.formats[modules[0]]
        assert fmt is not None
        hessian = Hessian(xs[0].shape[1])
        for x in xs:
            hessian.add(transform(x, fmt.hadamard))
        lower = factor(hessian, modules[0])
        arrays: Arrays = {}
        errors: dict[str, float] = {}
        sample = xs[0][:ERROR_TOKENS]
        for module, linear in zip(modules, linears, strict=True):
            weight = _transformed(linear.weight, fmt)
            codes, scales, ladder = quantise_gptq(weight, lower, fmt, self.recipe.method)
            arrays |= plain_arrays(module, codes, scales, fmt, ladder)
            restored = _transformed(restore(codes, scales, fmt), fmt)
            wanted = paddle.matmul(sample, linear.weight)
            errors[module] = relative_error(paddle.matmul(sample, restored), wanted)
            linear.weight = restored
        return arrays, errors

    def _uncalibrated(self, module: str) -> tuple[Arrays, float]:
        fmt = self.formats[module]
        assert fmt is not None
        ladder = None
        if self.imported is not None:
            codes, scales, fmt = self.imported.codes(module)
            self.formats[module] = fmt
            return plain_arrays(module, codes, scales, fmt, None), self.imported.scale_error(module)
        weight = self.load(f"{module}.weight").t().contiguous()
        if self.recipe.algorithm == "ternary":
            found = quantise_ternary(weight)
            if found is None:
                group = ternary_group(weight)
                raise UsageError(
                    f"{module} is "
                    + (f"ternary in groups of {group}" if group else "not ternary")
                    + ", wanted each group of 64 or 128 weights to be -s, 0 or s with a bf16 s: "
                    "use --algo gptq with a calibration text"
                )
            codes, scales, fmt = found
            self.formats[module] = fmt
        else:
            codes, scales, ladder = quantise_rtn(_transformed(weight, fmt), fmt, self.recipe.method)
        restored = _transformed(restore(codes, scales, fmt), fmt)
        arrays = plain_arrays(module, codes, scales, fmt, ladder)
        return arrays, relative_error(restored, weight)

    def _write_vocabulary(self) -> None:
        """What stands outside the layers: embedding, last norm, head."""
        path = self._shard(-1)
        wanted = {EMBEDDING: self.recipe.int8_embedding, HEAD: self.recipe.int8_head}
        if self.checkpoint.is_tied:
            if self.recipe.int8_head != self.recipe.int8_embedding:
                raise UsageError(
                    "the head of this checkpoint is its embedding: make both int8, or neither"
                )
            del wanted[HEAD]
        arrays: Arrays = {}
        errors = {}
        for name in self.checkpoint.shapes:
            module = name.removesuffix(".weight")
            if name.startswith("model.layers."):
                continue
            if not wanted.get(module, False):
                if not path.exists():
                    arrays[name] = self._unchanged(name)
                continue
            fmt = row_format(self.checkpoint.shapes[name][1])
            self.formats[module] = fmt
            if path.exists():
                continue
            weight = self.load(name).t().contiguous()
            codes, scales, _ = quantise_rtn(weight, fmt, "wint8")
            errors[module] = relative_error(restore(codes, scales, fmt), weight)
            arrays |= plain_arrays(module, codes, scales, fmt, None)
        if not path.exists():
            write_text(json.dumps(errors), self._errors_file(self.config.num_layers))
            save_weights(arrays, path)

    def _unchanged(self, name: str) -> NDArray[Any]:
        self.load(name)  # names what is not finite
        tensor = self.checkpoint.files.load(name)
        array: NDArray[Any] = tensor.numpy()
        return array.view(ml_dtypes.bfloat16) if tensor.dtype == paddle.bfloat16 else array

    # The end.

    def _publish(self, hashes: dict[str, str]) -> Sidecar:
        errors: dict[str, float] = {}
        for index in range(self.config.num_layers + 1):
            errors |= json.loads(self._errors_file(index).read_text("utf-8"))
        weight_map: dict[str, str] = {}
        sizes: dict[str, int] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        modules: dict[str, LowBitFormat] = {}
        for path in weight_files(self.result):
            for name, array in load_file(path).items():
                weight_map[name], sizes[name], shapes[name] = path.name, array.nbytes, array.shape
        num_weights = num_bits = 0
        for module in [*self.formats, HEAD]:
            qweight = f"{module}.qweight"
            if qweight not in sizes or module in modules:
                continue
            modules[module] = self._format_of(module, shapes)
            if module.startswith("model.layers."):
                parts = (f"{module}{suffix}" for suffix in SUFFIXES)
                num_bits += 8 * sum(sizes.get(name, 0) for name in parts)
                num_weights += sizes[qweight] * 8 // modules[module].bits
        calibration = None
        if self.calibration is not None:
            calibration = {
                "text": self.calibration.name,
                "windows": len(self.calibration.windows),
                "tokens": self.calibration.num_tokens,
                "sha256": self.calibration.sha256,
            }
        sidecar = Sidecar(
            method=self.recipe.method,
            modules=modules,
            algorithm=self.recipe.algorithm,
            source=hashes,
            calibration=calibration,
            bits_per_weight=round(num_bits / max(num_weights, 1), 4),
            size=sum(sizes.values()),
            files={p.name: hash_file(p) for p in weight_files(self.result)},
            errors={module: errors[module] for module in modules},
            tool=__version__,
        )
        index_values = {"metadata": {"total_size": sidecar.size}, "weight_map": weight_map}
        self._copy_other_files()
        write_text(dump(index_values), self.result / INDEX_FILE)
        write_text(dump(sidecar.to_dict()), self.result / SIDECAR)
        self.result.rename(self.out)
        shutil.rmtree(self.work, ignore_errors=True)
        return sidecar

    def _format_of(self, module: str, shapes: dict[str, tuple[int, ...]]) -> LowBitFormat:
        fmt = self.formats[module]
        assert fmt is not None
        if self.recipe.algorithm in ("ternary", "import") and module.startswith("model.layers."):
            # The group was found as the weights were read, perhaps before the run was resumed.
            columns = shapes[f"{module}.qweight"][1] * 8 // fmt.bits
            zero = TERNARY_ZERO if self.recipe.algorithm == "ternary" else fmt.zero
            return LowBitFormat(fmt.bits, columns // shapes[f"{module}.scales"][1], zero)
        return fmt

    def _copy_other_files(self) -> None:
        skipped = {INDEX_FILE, SIDECAR, "quantize_config.json"}
        for path in sorted(self.source.iterdir()):
            is_weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
            if not path.is_file() or is_weights or path.name in skipped:
                continue
            if path.name == "config.json" and self.imported is not None:
                write_text(dump(self.imported.plain_config()), self.result / path.name)
            else:
                copy(path, self.result / path.name)


def plain_arrays(
    module: str,
    codes: paddle.Tensor,
    scales: paddle.Tensor,
    fmt: LowBitFormat,
    ladder: Ladder | None,
) -> Arrays:
    """The tensors that are stored for a module, from turned codes ``[K, N]`` and scales."""
    arrays: Arrays = {
        f"{module}.qweight": pack(np.ascontiguousarray(codes.numpy().T), fmt.bits),
        f"{module}.scales": np.ascontiguousarray(scales.numpy().T).astype(ml_dtypes.bfloat16),
    }
    if ladder is not None:
        arrays[f"{module}.channel_scales"] = ladder.channel.numpy()
    return arrays


def relative_error(got: paddle.Tensor, wanted: paddle.Tensor) -> float:
    """Root of the squared error over the squares of what is wanted; six digits, 0 for 0."""
    norm = float((wanted * wanted).sum())
    error = got - wanted
    return float(f"{(float((error * error).sum()) / norm) ** 0.5 if norm else 0.0:.6g}")


def _transformed(weight: paddle.Tensor, fmt: LowBitFormat) -> paddle.Tensor:
    """Turned weights ``[K, N]`` with the Hadamard transform of their columns done, or undone."""
    if fmt.hadamard == 0:
        return weight
    return transform(weight.t().contiguous(), fmt.hadamard).t().contiguous()


def _refuse_quantised(source: Path, recipe: Recipe) -> None:
    if (source / SIDECAR).exists():
        raise UsageError(
            f"{source} is quantised already ({SIDECAR} is there): give the checkpoint it was made "
            "from"
        )
    settings = read_json(source, "config.json").get("quantization_config")
    if settings is not None and recipe.algorithm != "import":
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        mend = (
            "rewrite it with --algo import" if method == "gptq" else "give the unquantised weights"
        )
        raise UsageError(f"{source} is quantised already (quant_method {method!r}): {mend}")
