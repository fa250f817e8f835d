"""``quantize``: a checkpoint folder rewritten with low-bit weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fd_minicpm41.cli.runtime import byte_progress, counted, prepare_paddle, progress
from fd_minicpm41.errors import UsageError

if TYPE_CHECKING:
    from fd_minicpm41.quantization.sidecar import Sidecar

METHODS = ("wint8", "wint4", "wint2", "w4a8", "w4afp8", "fp8")
DEFAULT_WINDOWS = 16
DEFAULT_LENGTH = 2048


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "quantize",
        help="rewrite a checkpoint with low-bit weights",
        description="Writes a checkpoint folder whose linear layers have 8, 4 or 2 bits, layer by "
        "layer. Interrupted or killed, the same command goes on where it was, to the same bytes.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint to quantise")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--method", required=True, choices=METHODS, help="what to make")
    parser.add_argument(
        "--algo",
        choices=("auto", "rtn", "gptq", "ternary", "import"),
        default="auto",
        help="auto: ternary if the weights are, gptq for 2 and 4 bits if there is a --calib, else "
        "rtn, which 2 bits must be asked for; import rewrites a symmetric GPTQ checkpoint",
    )
    parser.add_argument(
        "--group", type=int, default=128, help="weights a scale: 64 or 128 (default: 128)"
    )
    parser.add_argument(
        "--hadamard",
        type=int,
        metavar="BLOCK",
        help="0, 64 or 128 (default: the group for wint2 by gptq, else 0)",
    )
    parser.add_argument("--calib", metavar="FILE", help="UTF-8 text that gptq calibrates on")
    parser.add_argument(
        "--calib-windows",
        type=int,
        default=DEFAULT_WINDOWS,
        metavar="N",
        help=f"windows of the text (default: {DEFAULT_WINDOWS})",
    )
    parser.add_argument(
        "--calib-length",
        type=int,
        default=DEFAULT_LENGTH,
        metavar="N",
        help=f"tokens a window (default: {DEFAULT_LENGTH})",
    )
    parser.add_argument(
        "--bits-map",
        metavar="JSON",
        help='exceptions, a file or text such as \'{"down_proj": 4, "*.layers.0.*": 4}\'; 16 keeps '
        "a layer as it is",
    )
    parser.add_argument(
        "--lm-head", choices=("keep", "int8"), default="keep", help="8-bit rows for the head"
    )
    parser.add_argument(
        "--embedding", choices=("keep", "int8"), default="keep", help="8-bit rows for the embedding"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="(default: auto)"
    )
    parser.add_argument("--chart", metavar="FILE", help="draw the error by layer as PNG")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the folder whole or not at all, and says what it holds."""
    prepare_paddle()
    from fd_minicpm41.quantization.plan import Recipe
    from fd_minicpm41.quantization.quantise import quantise
    from fd_minicpm41.quantization.sidecar import weight_files
    from fd_minicpm41.quantization.streaming import choose_device, read_windows
    from fd_minicpm41.reference.tokenizer import Tokenizer

    device = choose_device(args.device)
    algorithm = _algorithm(args)
    hadamard = args.hadamard
    if hadamard is None:
        hadamard = args.group if args.method == "wint2" and algorithm == "gptq" else 0
    recipe = Recipe(
        args.method,
        algorithm,
        args.group,
        hadamard,
        _bits_map(args.bits_map),
        int8_head=args.lm_head == "int8",
        int8_embedding=args.embedding == "int8",
    )
    calibration = None
    if args.calib is not None:
        calibration = read_windows(
            Tokenizer(args.model), args.calib, args.calib_length, args.calib_windows, "--calib"
        )
    with (
        byte_progress(weight_files(Path(args.model)), "hashing") as hashing,
        progress(1, f"quantising ({algorithm})", "linear") as bar,
    ):
        sidecar = quantise(
            args.model,
            args.out,
            recipe,
            calibration,
            device=device,
            on_progress=counted(bar),
            on_hash=hashing.update,
        )
    if args.chart is not None:
        draw_module_errors(sidecar, args.chart)
    print(
        f"wrote {args.out}: {sidecar.name} by {algorithm}, {sidecar.bits_per_weight} bits a weight "
        f"in the linear layers, {sidecar.size / 1e9:.3g} GB in all"
    )
    return 0


def _algorithm(args: argparse.Namespace) -> str:
    if args.algo != "auto":
        return str(args.algo)
    if args.method == "wint2" and _is_ternary(args.model):
        chosen = "ternary"
    elif args.calib is not None and args.method != "wint8":
        chosen = "gptq"
    elif args.method == "wint2":
        raise UsageError(
            "2 bits without calibration destroy a model: give a text with --calib FILE, or ask for "
            "it with --algo rtn"
        )
    else:
        chosen = "rtn"
        if args.calib is not None:
            raise UsageError("wint8 needs no calibration: leave --calib out, or give --algo gptq")
    return chosen


def _is_ternary(model: str) -> bool:
    """Looks at one layer; the quantiser holds every other one to it."""
    from fd_minicpm41.quantization.ternary import ternary_group
    from fd_minicpm41.reference.checkpoint import Checkpoint

    name = "model.layers.0.self_attn.q_proj.weight"
    try:
        checkpoint = Checkpoint(model)
    except UsageError:
        return False  # whatever is wrong is said when the quantiser opens it
    if checkpoint.sidecar is not None or name not in checkpoint.shapes:
        return False
    return ternary_group(checkpoint.load(name).t().contiguous()) > 0


def _bits_map(given: str | None) -> dict[str, Any]:
    if given is None:
        return {}
    try:
        is_text = given.lstrip().startswith("{")
        values = json.loads(given if is_text else Path(given).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--bits-map cannot be read ({error}): give JSON such as '{{\"down_proj\": 4}}', or a "
            "file of it"
        ) from None
    if not isinstance(values, dict):
        raise UsageError(f"--bits-map holds {values!r}, wanted an object of patterns: correct it")
    return values


def draw_module_errors(sidecar: Sidecar, path: str) -> None:
    """One line for each kind of linear layer."""
    from fd_minicpm41.quantization.chart import plot_errors

    found: dict[str, dict[int, float]] = {}
    for module, error in sidecar.errors.items():
        parts = module.split(".")
        if parts[1] == "layers":
            found.setdefault(parts[-1], {})[int(parts[2])] = error
    last = max(layer for errors in found.values() for layer in errors)
    series = {kind: [e.get(i) for i in range(last + 1)] for kind, e in found.items()}
    what = "relative error of the " + ("output" if sidecar.algorithm == "gptq" else "weights")
    plot_errors(series, path, f"{sidecar.name} by {sidecar.algorithm}", what)
