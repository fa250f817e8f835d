"""``inspect``, ``eval`` and ``verify``: what a folder of low-bit weights is worth."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fd_minicpm41.cli import suite
from fd_minicpm41.cli.quantize import draw_module_errors
from fd_minicpm41.cli.runtime import byte_progress, counted, prepare_paddle, progress
from fd_minicpm41.errors import UsageError

if TYPE_CHECKING:
    from fd_minicpm41.quantization.sidecar import Sidecar
    from fd_minicpm41.quantization.verification import ModuleReport

HISTOGRAM_WIDTH = 40


def add_parser(commands: Any) -> None:
    """Adds the three commands."""
    parser = commands.add_parser(
        "inspect",
        help="list what a folder of low-bit weights holds",
        description="Bits a weight, sizes, levels and errors by module, from the folder alone.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder quantize wrote")
    parser.add_argument("--all", action="store_true", help="a line for each module of each layer")
    parser.add_argument("--chart", metavar="FILE", help="draw the error by layer as PNG")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_inspect)

    parser = commands.add_parser(
        "eval",
        help="perplexity, and agreement with the source",
        description="Reads a text with the model, and with the checkpoint it was made from if "
        "that is given: perplexity, KL divergence, top-1 agreement. Two layers are in memory at a "
        "time. Or examines the small model: --suite small.",
    )
    parser.add_argument("--model", metavar="DIR", help="checkpoint, low-bit or not")
    parser.add_argument("--source", metavar="DIR", help="checkpoint it was made from")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to read")
    parser.add_argument(
        "--windows", type=int, metavar="N", help="windows of the text (default: all of it)"
    )
    parser.add_argument(
        "--length", type=int, default=1024, metavar="N", help="tokens a window (default: 1024)"
    )
    parser.add_argument(
        "--simulate",
        choices=("fp8",),
        help="round the weights of --model as a server does when it loads them: block-wise fp8",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "gpu"), default="auto", help="(default: auto)"
    )
    parser.add_argument(
        "--chart", metavar="FILE", help="draw the error of the hidden states by layer as PNG"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    suite.add_arguments(parser)
    parser.set_defaults(run=run_eval)

    parser = commands.add_parser(
        "verify",
        help="check a folder of low-bit weights",
        description="Hashes, packing, codes and scales; with --source also that it was made from "
        "that checkpoint and leaves the rest of it as it is.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder quantize wrote")
    parser.add_argument("--source", metavar="DIR", help="checkpoint it was made from")
    parser.set_defaults(run=run_verify)


def run_inspect(args: argparse.Namespace) -> int:
    """Prints the table and the levels."""
    prepare_paddle()
    from fd_minicpm41.quantization.verification import inspect_modules, open_quantised

    _, sidecar = open_quantised(args.model)
    with progress(1, "reading", "module") as bar:
        reports = inspect_modules(args.model, counted(bar))
    if args.chart is not None:
        draw_module_errors(sidecar, args.chart)
    if args.json:
        values = sidecar.to_dict() | {"counts": {name: r.counts for name, r in reports.items()}}
        print(json.dumps(values, ensure_ascii=False))
        return 0
    print(f"{sidecar.name} by {sidecar.algorithm}, written by fd-minicpm41 {sidecar.tool}")
    if sidecar.calibration is not None:
        held = sidecar.calibration
        print(f"calibrated on {held['tokens']} tokens of {held['text']}")
    print(
        f"{sidecar.bits_per_weight} bits a weight in the linear layers, scales included; "
        f"{sidecar.size / 1e9:.4g} GB in all\n"
    )
    _print_modules(sidecar, reports, each=args.all)
    _print_levels(reports)
    return 0


def _print_modules(sidecar: Sidecar, reports: dict[str, ModuleReport], each: bool) -> None:
    rows: dict[tuple[Any, ...], list[str]] = {}
    for module, report in reports.items():
        kind = module if each else module.split(".")[-1]
        rows.setdefault((kind, report.shape, report.fmt), []).append(module)
    width = max(len(kind) for kind, _, _ in rows)
    print(
        f"{'module':<{width}}  count  {'shape':>13}  bits  group  hadamard     bpw        MB  error"
    )
    for (kind, shape, fmt), modules in rows.items():
        size = sum(reports[module].size for module in modules)
        bpw = 8 * size / (len(modules) * shape[0] * shape[1])
        errors = [sidecar.errors[module] for module in modules if module in sidecar.errors]
        span = f"{min(errors):.4f}" if errors else ""
        if len(errors) > 1:
            span += f" to {max(errors):.4f}"
        print(
            f"{kind:<{width}}  {len(modules):>5}  {f'{shape[0]} x {shape[1]}':>13}  {fmt.bits:>4}  "
            f"{fmt.group:>5}  {fmt.hadamard or '-':>8}  {bpw:>6.3f}  {size / 1e6:>8.2f}  {span}"
        )


def _print_levels(reports: dict[str, ModuleReport]) -> None:
    totals: dict[tuple[int, int], list[int]] = {}
    for report in reports.values():
        key = (report.fmt.bits, report.fmt.zero)
        held = totals.setdefault(key, [0] * len(report.counts))
        totals[key] = [a + b for a, b in zip(held, report.counts, strict=True)]
    for (bits, zero), counts in totals.items():
        print(f"\nlevels of {bits} bits, in scales")
        # 256 levels are shown 16 at a time.
        step = max(1, len(counts) // 16)
        merged = [sum(counts[i : i + step]) for i in range(0, len(counts), step)]
        for i, count in enumerate(merged):
            share = count / sum(counts)
            bar = "#" * round(HISTOGRAM_WIDTH * count / max(merged))
            label = f"{i * step - zero / 2:g}"
            if step > 1:
                label += f" to {i * step + step - 1 - zero / 2:g}"
            print(f"{label:>12}  {share:>6.2%}  {bar}")


def run_eval(args: argparse.Namespace) -> int:
    """Prints the means over the text, or what the suite found."""
    suite.check(args)
    prepare_paddle()
    if args.suite is not None:
        return suite.run(args)
    from fd_minicpm41.config import MiniCPMConfig
    from fd_minicpm41.quantization.evaluation import Side, evaluate
    from fd_minicpm41.quantization.streaming import choose_device, read_windows
    from fd_minicpm41.reference.checkpoint import Checkpoint
    from fd_minicpm41.reference.tokenizer import Tokenizer

    if args.chart is not None and args.source is None:
        raise UsageError("--chart shows the error against the source: give --source too")
    device = choose_device(args.device)
    config = MiniCPMConfig.from_pretrained(args.model)
    checkpoint = Checkpoint(args.model)
    checkpoint.check(config)
    side, source = Side.of(checkpoint, device), None
    if args.simulate == "fp8":
        if checkpoint.sidecar is not None:
            raise UsageError("--simulate fp8 rounds unquantised weights: give such a --model")

        side = side.as_fp8()
    if args.source is not None:
        original = Checkpoint(args.source)
        original.check(config)
        source = Side.of(original, device)
    text = read_windows(Tokenizer(args.model), args.text, args.length, args.windows, "--text")
    with progress(1, "reading", "layer") as bar:
        result = evaluate(config, text.windows, side, source, counted(bar))
    if args.chart is not None:
        from fd_minicpm41.quantization.chart import plot_errors

        plot_errors(
            {Path(args.model).name: result.layer_errors},
            args.chart,
            "hidden states after each layer",
            "relative error against the source",
        )
    if args.json:
        # JSON has no NaN: what was not measured is left out.
        print(json.dumps({k: v for k, v in result.__dict__.items() if v == v and v != []}))
        return 0
    print(f"{result.num_tokens} predictions over {text.name}")
    print(f"perplexity           {result.perplexity:.4f}")
    if source is not None:
        ratio = result.perplexity / result.source_perplexity
        print(f"  of the source      {result.source_perplexity:.4f}, ratio {ratio:.4f}")
        print(f"KL divergence        {result.kl:.5f} nats")
        print(f"top-1 agreement      {result.top1:.2%}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Prints what was found in order."""
    prepare_paddle()
    from fd_minicpm41.quantization.sidecar import weight_files
    from fd_minicpm41.quantization.verification import open_quantised, verify

    _, sidecar = open_quantised(args.model)
    files = weight_files(Path(args.model))
    if args.source is not None:
        files += weight_files(Path(args.source))
    with (
        byte_progress(files, "hashing") as hashing,
        progress(1, "checking", "module") as bar,
    ):
        errors = verify(args.model, args.source, on_progress=counted(bar), on_bytes=hashing.update)
    print(f"{args.model}: {len(sidecar.files)} files and {len(sidecar.modules)} modules are whole")
    if errors:
        worst = max(errors, key=lambda module: errors[module])
        print(
            f"made from {args.source}; relative error of a weight at most {errors[worst]:.4g} "
            f"({worst})"
        )
    return 0
