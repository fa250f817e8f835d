"""Low-bit linear layers beside cuBLAS and PyTorch's own 4-bit kernel: one layer's four products."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

import measure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "gpu"), str(ROOT / "src")]
from gpu_low_bit import LowBitLinear  # noqa: E402

from accuracy import assert_within_budget  # noqa: E402
from fd_minicpm41.quantization.formats import LowBitFormat  # noqa: E402

# out features, in features of qkv, o, gate and up, down.
SHAPES = {"qkv": (4608, 4096), "o": (4096, 4096), "gate_up": (32768, 4096), "down": (4096, 16384)}
FORMATS = {
    "w2 g64": LowBitFormat(2, 64, 3),
    "w4 g128": LowBitFormat(4, 128, 16),
    "w8 g128": LowBitFormat(8, 128, 256),
}
TOKENS = (1, 4, 8, 16, 32, 64)
PREFILL_TOKENS = (512, 2048, 8192)
# The most microseconds for one token, by shape and for the layer.
TARGETS = {
    "w2 g64": {"qkv": 3.8, "o": 3.6, "gate_up": 17.0, "down": 9.0, "layer": 34.0},
    "w4 g128": {"qkv": 5.4, "o": 5.0, "gate_up": 28.0, "down": 15.5, "layer": 54.0},
    "w8 g128": {"layer": 100.0},
}
# Sixteen tokens may take so much longer than one, 64 so much of cuBLAS's time.
SIXTEEN_OVER_ONE, SIXTY_FOUR_OVER_CUBLAS = 1.2, 0.6


def random_x(tokens: int, in_features: int) -> torch.Tensor:
    return torch.randn(tokens, in_features, dtype=torch.bfloat16, device="cuda")


def assert_correct(x: torch.Tensor, got: torch.Tensor, rows: torch.Tensor) -> None:
    """Holds a timed product to fp64 within twice the framework's own error in bfloat16."""
    # In float16 the levels times the scale are exact: 8 bits of scale, at most 3 of a level.
    truth = x.double() @ rows.double().T
    framework = linear(x, rows.to(x.dtype))
    arrays = (t.float().cpu().numpy() for t in (got, truth, framework))
    assert_within_budget(*arrays, "bfloat16")


def time_cublas(shape: tuple[int, int], counts: tuple[int, ...]) -> dict[int, float]:
    size = 2 * shape[0] * shape[1]
    copies = measure.copies_for(size, size)
    weights = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    times = {}
    for tokens in counts:
        x = random_x(tokens, shape[1])
        rounds = 1 if tokens in PREFILL_TOKENS else None
        times[tokens] = measure.graph_time(lambda i, x=x: linear(x, weights[i]), copies, rounds)
    return times


def time_pytorch_int4(shape: tuple[int, int]) -> dict[int, float]:
    """``_weight_int4pack_mm``, groups of 128; {} where this PyTorch has none."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm"):
        return {}
    size = shape[0] * shape[1] // 2
    copies = measure.copies_for(size, size)
    weights = []
    for _ in range(copies):
        codes = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(shape[1] // 128, shape[0], 2, device="cuda").bfloat16()
        weights.append((packed, scales))
    times = {}
    for tokens in TOKENS:
        x = random_x(tokens, shape[1])

        def run(i: int, x: torch.Tensor = x) -> None:
            torch.ops.aten._weight_int4pack_mm(x, weights[i][0], 128, weights[i][1])

        times[tokens] = measure.graph_time(run, copies)
    return times


def make_copies(fmt: LowBitFormat, shape: tuple[int, int]) -> list[LowBitLinear]:
    size = shape[0] * shape[1] // 8 * fmt.bits
    return [LowBitLinear.random(fmt, *shape) for _ in range(measure.copies_for(size, size))]


def time_ours(weights: list[LowBitLinear]) -> dict[str, Any]:
    """Microseconds by tokens; "after_another": of one token's product behind a kernel that does not
    let it begin early."""
    shape = weights[0].shape
    rows, workspace = weights[-1].rows("float16"), weights[0].workspace()
    small = torch.zeros(32, device="cuda")
    result: dict[str, Any] = {}
    for tokens in TOKENS:
        x = random_x(tokens, shape[1])
        outs = [x.new_empty(tokens, shape[0]) for _ in range(2)]

        def run(i: int, x: torch.Tensor = x, outs: list[torch.Tensor] = outs) -> None:
            weights[i](x, outs[i % 2], workspace)

        for out in outs:
            out.fill_(float("nan"))
        result[str(tokens)] = measure.graph_time(run, len(weights))
        last = (len(weights) - 1) % 2
        assert_correct(x, outs[last], rows)
        if tokens == 1:

            def run_both(i: int, run: Callable[[int], None] = run) -> None:
                small.add_(1)
                run(i)

            both = measure.graph_time(run_both, len(weights))
            alone = measure.graph_time(lambda i: small.add_(1), len(weights))
            result["after_another"] = both - alone
    return result


def time_prefill(
    name: str, weights: list[LowBitLinear], cublas: dict[int, float]
) -> list[dict[str, Any]]:
    """Expand, then the library's product; for 4 bits also in int8 and e4m3."""
    shape, rows = weights[0].shape, []
    panel = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    bytes_of_panel = torch.empty(shape, dtype=torch.int8, device="cuda")
    ones = torch.ones(shape[0], device="cuda")
    scale_rows = torch.ones(1, shape[0], device="cuda")

    def expand(i: int) -> None:
        weights[i].rows("bfloat16", out=panel)

    expand_us = measure.graph_time(expand, len(weights))
    for tokens in PREFILL_TOKENS:
        x = random_x(tokens, shape[1])

        def run(i: int, x: torch.Tensor = x) -> None:
            expand(i)
            linear(x, panel)

        us = measure.graph_time(run, len(weights), 1)
        row = {"kind": "prefill", "format": name, "tokens": tokens}
        rows.append(
            row
            | {"us": us, "expand_us": expand_us, "cublas_us": cublas[tokens]}
            | {"ratio": us / cublas[tokens], "workspace_bytes": panel.nbytes}
        )
        if name != "w4 g128":
            continue
        narrow = torch.randint(-127, 128, x.shape, dtype=torch.int8, device="cuda")
        float8 = torch.randn(x.shape, device="cuda").to(torch.float8_e4m3fn)
        token_scales = torch.ones(tokens, 1, device="cuda")

        def run_int8(i: int, narrow: torch.Tensor = narrow) -> None:
            weights[i].rows("int8", ones, out=bytes_of_panel)
            torch._int_mm(narrow, bytes_of_panel.T)

        def run_fp8(
            i: int, float8: torch.Tensor = float8, token_scales: torch.Tensor = token_scales
        ) -> None:
            view = bytes_of_panel.view(torch.float8_e4m3fn)
            weights[i].rows("float8_e4m3fn", ones, out=view)
            torch._scaled_mm(
                float8,
                view.T,
                scale_a=token_scales,
                scale_b=scale_rows,
                out_dtype=torch.bfloat16,
            )

        for method, run_narrow in (("w4a8", run_int8), ("w4afp8", run_fp8)):
            us = measure.graph_time(run_narrow, len(weights), 1)
            rows.append(
                row
                | {"format": method, "us": us, "cublas_us": cublas[tokens]}
                | {"ratio": us / cublas[tokens], "workspace_bytes": bytes_of_panel.nbytes}
            )
    return rows


def check_eight_bit_product() -> None:
    """That the int8 and e4m3 routes multiply to what the weight says, activations exact."""
    torch.manual_seed(0)
    weight = LowBitLinear.random(LowBitFormat(4, 128, 16), 512, 1024)
    channels = (torch.randint(8, 16, (512,), device="cuda") / 4096).float()
    for kind, steps in (
        ("int8", torch.arange(1, 16)),
        ("float8_e4m3fn", 2.0 ** torch.arange(-3, 5)),
    ):
        picks = steps.cuda()[torch.randint(0, len(steps), (512, 8), device="cuda")]
        scales = (picks * channels[:, None]).bfloat16()
        # The order of tile_scales: rows 0, 8, 1, 9, ...
        tiled = scales.view(32, 2, 8, 8).permute(0, 3, 2, 1).reshape(32, 8, 16).contiguous()
        exact = LowBitLinear(weight.fmt, weight.shape, weight.qweight, tiled)
        rows = exact.rows(kind, channels)
        plain = exact.rows("float16").double()
        x = torch.randint(-8, 9, (64, 1024), device="cuda")
        truth = x.double() @ plain.T
        if kind == "int8":
            got = torch._int_mm(x.to(torch.int8), rows.T).double() * channels.double()
            assert torch.equal(got, truth)
        else:
            one = torch.ones(64, 1, device="cuda")
            got = torch._scaled_mm(
                x.float().to(torch.float8_e4m3fn),
                rows.T,
                scale_a=one,
                scale_b=channels[None],
                out_dtype=torch.bfloat16,
            )
            framework = linear(x.bfloat16(), plain.bfloat16())
            arrays = (t.float().cpu().numpy() for t in (got, truth, framework))
            assert_within_budget(*arrays, "bfloat16")


def main(args: argparse.Namespace) -> int:
    torch.manual_seed(0)
    rate = measure.copy_rate()
    check_eight_bit_product()
    rows: list[dict[str, Any]] = []
    layers: dict[tuple[str, int], float] = {}
    print(f"{'':>10}{'format':>14}" + "".join(f"{tokens:>9}" for tokens in TOKENS))
    for name, shape in SHAPES.items():
        torch.cuda.empty_cache()
        cublas = time_cublas(shape, TOKENS)
        rivals = {"cublas": cublas, "pytorch int4": time_pytorch_int4(shape)}
        for rival, times in rivals.items():
            for tokens in TOKENS if times else ():
                row = {"kind": "decode", "shape": name, "format": rival, "tokens": tokens}
                rows.append(row | {"us": times[tokens]})
                layers[rival, tokens] = layers.get((rival, tokens), 0) + times[tokens]
            if times:
                line = "".join(f"{times[tokens]:9.1f}" for tokens in TOKENS)
                print(f"{name:>10}{rival:>14}{line}", flush=True)
        for kind, fmt in FORMATS.items():
            weights = make_copies(fmt, shape)
            floor = weights[0].nbytes / rate * 1e6
            times = time_ours(weights)
            for tokens in TOKENS:
                us = times[str(tokens)]
                row = {"kind": "decode", "shape": name, "format": kind, "tokens": tokens}
                row |= {"us": us, "floor_us": floor, "of_floor": us / floor}
                row |= {"cublas_us": cublas[tokens], "speedup": cublas[tokens] / us}
                targets = {1: TARGETS[kind].get(name)}
                targets[16] = SIXTEEN_OVER_ONE * times["1"]
                targets[64] = SIXTY_FOUR_OVER_CUBLAS * cublas[64]
                if targets.get(tokens) is not None:
                    row |= {"target_us": targets[tokens], "held": us <= targets[tokens]}
                if tokens == 1:
                    row["after_another_us"] = times["after_another"]
                rows.append(row | {"correct": True})
                layers[kind, tokens] = layers.get((kind, tokens), 0) + us
            line = "".join(f"{times[str(tokens)]:9.1f}" for tokens in TOKENS)
            print(
                f"{name:>10}{kind:>14}{line}   floor {floor:.1f}, behind another kernel "
                f"{times['after_another']:.1f}",
                flush=True,
            )
            del weights
    # Long products come last: they warm the GPU up.
    for name, shape in SHAPES.items():
        cublas = time_cublas(shape, PREFILL_TOKENS)
        for kind, fmt in FORMATS.items():
            weights = make_copies(fmt, shape)
            for row in time_prefill(kind, weights, cublas):
                rows.append(row | {"shape": name})
            del weights
    for (kind, tokens), us in layers.items():
        row = {"kind": "decode", "shape": "layer", "format": kind, "tokens": tokens, "us": us}
        row["speedup"] = layers["cublas", tokens] / us
        target = TARGETS.get(kind, {}).get("layer") if tokens == 1 else None
        if target is not None:
            row |= {"target_us": target, "held": us <= target}
        rows.append(row)
    for kind in sorted({kind for kind, _ in layers}):
        line = "".join(f"{layers[kind, tokens]:9.1f}" for tokens in TOKENS)
        print(f"{'layer':>10}{kind:>14}{line}")
    for row in rows:
        if row["kind"] == "prefill":
            print(
                f"prefill {row['shape']:>8} {row['format']:>8} {row['tokens']:>5}: "
                f"{row['us']:8.1f} us, {row['ratio']:.2f} of cuBLAS's time"
            )
    judged = [row for row in rows if "held" in row]
    print(f"{sum(not row['held'] for row in judged)} of {len(judged)} rows miss their target")
    if args.out:
        rounded = [
            {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        ]
        result = {
            "what": "linear layers, bfloat16 activations; microseconds",
            "environment": measure.environment(args.command),
            "copy_bytes_per_second": rate,
            "rows": rounded,
        }
        measure.write_json(args.out, result)
    return 0
