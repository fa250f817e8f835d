"""Writes the tables of docs/benchmarks.md marked `<!-- table NAME -->` from benchmarks/results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/benchmarks.md"
RESULTS = ROOT / "benchmarks/results"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}_h100.json").read_text())


def rows_of(result: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["kind"] in kinds]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def k(length: int) -> str:
    return f"{length // 1024}K"


def yes(held: bool) -> str:
    return "yes" if held else "**no**"


def target_of(row: dict[str, Any]) -> tuple[str, str]:
    if row["target_ms"] is None:
        return "-", "-"
    return f"{row['target_ms']:.2f}", yes(row["held"])


def made_on(result: dict[str, Any]) -> str:
    e = result["environment"]
    command = re.sub(r" --out \S+", "", e["command"])
    return (
        f"{e['gpu']}, driver {e['driver']}, CUDA {e['cuda']}, PyTorch {e['torch']}, cuDNN "
        f"{e['cudnn']}, {e['date']}: `{command}`."
    )


def layer_decode() -> str:
    result = read("decode")
    return (
        table(
            ("batch x length", "sparse step", "dense", "dense / sparse", "floor", "target", "held"),
            (
                (
                    f"{row['batch']} x {k(row['length'])}",
                    f"{row['ours_us']:.1f}",
                    f"{row['dense_us']:.1f}",
                    f"{row['dense_us'] / row['ours_us']:.2f}",
                    f"{row['floor_us']:.1f}",
                    f"{row['target_us']:.0f}",
                    yes(row["held"]) + (", slower" if row["ours_us"] > row["dense_us"] else ""),
                )
                for row in rows_of(result, "sparse")
            ),
        )
        + "\n\nMicroseconds. Copy rate of the run "
        + f"{result['copy_bytes_per_second'] / 1e12:.2f} TB/s. {made_on(result)}"
    )


def dense_rows() -> str:
    rows = rows_of(read("decode"), "dense")
    lengths = sorted({row["length"] for row in rows})
    times = {(row["batch"], row["length"]): row for row in rows}
    lines = table(
        ("batch", *(str(length) for length in lengths)),
        (
            (
                str(batch),
                *(
                    f"{row['ours_us']:.1f} / {row['dense_us']:.1f}: "
                    f"{row['ours_us'] / row['dense_us']:.2f}{' held' if row['held'] else ''}"
                    for row in (times[batch, length] for length in lengths)
                ),
            )
            for batch in sorted({row["batch"] for row in rows})
        ),
    )
    return f"{lines}\n\n{sum(row['held'] for row in rows)} of {len(rows)} hold."


def prefill() -> str:
    result = read("prefill")
    return (
        table(
            ("prompt", "queries", "sparse step", "compress + select + attend", "cuDNN", "FA2")
            + ("cuDNN / sparse", "floor", "target", "held"),
            (
                (
                    k(row["length"]),
                    row["kind"],
                    f"{row['ours_ms']:.2f}",
                    f"{row['compress_ms']:.2f} + {row['select_ms']:.2f} + {row['attend_ms']:.2f}",
                    f"{row['cudnn_ms']:.2f}",
                    f"{row['flash_ms']:.2f}",
                    f"{row['cudnn_ms'] / row['ours_ms']:.2f}",
                    f"{row['floor_ms']:.2f}",
                    *target_of(row),
                )
                for row in rows_of(result, "correlated", "independent")
            ),
        )
        + "\n\nMilliseconds. "
        + made_on(result)
    )


def unions() -> str:
    result = read("prefill")
    counts = list(result["measured_unions"])
    lines = [("a trained model", result["measured_unions"])]
    lines += [
        (f"{row['kind']}, {k(row['length'])}", row["unions"])
        for row in rows_of(result, "correlated", "independent")
        if row["unions"]
    ]
    return table(
        ("neighbouring tokens", *counts),
        ((name, *(f"{sizes[n]:.0f}" for n in counts)) for name, sizes in lines),
    )


def small_model_unions() -> str:
    result = json.loads((RESULTS / "small_model_unions.json").read_text())
    rows = result["rows"]
    counts = list(rows[0]["unions"])
    lines = table(
        ("prompt, layer", "blocks each", *counts),
        (
            (
                f"{k(row['length'])}, {row['layer']}",
                str(row["budget"]),
                *(f"{row['unions'][n]:.0f}" for n in counts),
            )
            for row in rows
        ),
    )
    return f"{lines}\n\nPyTorch {result['torch']}, {result['device']}: `{result['command']}`."


def small_model_prefill() -> str:
    result = read("prefill_small_model")
    lines = table(
        ("prompt, layer", "union of 32 tokens", "sparse step", "cuDNN", "cuDNN / sparse"),
        (
            (
                f"{k(row['length'])}, {row['layer']}",
                f"{row['unions']['32']:.0f}",
                f"{row['ours_ms']:.2f}",
                f"{row['cudnn_ms']:.2f}",
                f"{row['cudnn_ms'] / row['ours_ms']:.2f}",
            )
            for row in sorted(result["rows"], key=lambda row: (row["length"], row["layer"]))
        ),
    )
    return f"{lines}\n\nMilliseconds. {made_on(result)}"


def chunks() -> str:
    result = read("prefill")
    lines = table(
        ("64K prompt in chunks of", "sum of chunks", "of one shot", "same lists", "same output"),
        (
            (
                k(row["chunk"]),
                f"{row['ours_ms']:.2f}",
                f"{row['ours_ms'] / row['one_shot_ms']:.2f}",
                yes(row["same_selection"]),
                yes(row["same_output"]),
            )
            for row in rows_of(result, "chunked")
        ),
    )
    (rebuild,) = rows_of(result, "rebuild")
    extra = max(row["extra_mib"] for row in rows_of(result, "correlated", "independent"))
    return (
        f"{lines}\n\nPrefix rebuild, {k(rebuild['length'])} tokens, {rebuild['layers']} layers: "
        f"{rebuild['ours_ms']:.2f} ms, {rebuild['bytes_per_second'] / 1e12:.2f} TB/s (target "
        f"{rebuild['target_ms']:.0f} ms). Memory beyond inputs, caches and outputs: at most "
        f"{extra:.0f} MiB at any length."
    )


def first_token() -> str:
    result = read("step")
    return (
        table(
            ("prompt", "sparse, ms", "dense (cuDNN), ms", "dense / sparse", "runs")
            + ("sparse, independent queries",),
            (
                (
                    k(row["length"]),
                    f"{row['sparse_ms']:.0f}",
                    f"{row['dense_ms']:.0f}",
                    f"{row['gain']:.2f}",
                    str(row["repeats"]),
                    f"{row['independent_ms']:.0f}" if "independent_ms" in row else "the same",
                )
                for row in rows_of(result, "prompt")
            ),
        )
        + "\n\n"
        + made_on(result)
    )


def decode() -> str:
    return table(
        ("batch x length", "sparse, ms", "tokens/s", "dense, ms", "tokens/s", "dense / sparse"),
        (
            (
                f"{row['batch']} x {k(row['length'])}",
                f"{row['sparse_ms']:.2f}",
                f"{row['sparse_tokens_per_second']:.0f}",
                f"{row['dense_ms']:.2f} ({row['dense_backend']})",
                f"{row['dense_tokens_per_second']:.0f}",
                f"{row['gain']:.2f}",
            )
            for row in rows_of(read("step"), "decode")
        ),
    )


def weights() -> str:
    return table(
        ("weights", "context", "step, ms", "tokens/s", "of bf16"),
        (
            (
                row["weights"],
                k(row["length"]),
                f"{row['sparse_ms']:.2f}",
                f"{1e3 / row['sparse_ms']:.0f}",
                f"{row['gain_over_bf16']:.2f}",
            )
            for row in rows_of(read("step"), "weights")
        ),
    )


def level_at(rows: list[dict[str, Any]], dense: str, sparse: str) -> str:
    """The length from which on sparse is faster, between measured ones by their logarithms."""
    gains = [(row["length"], math.log(row[dense] / row[sparse])) for row in rows]
    if gains[-1][1] <= 0:
        return f"beyond {k(gains[-1][0])}"
    slower = [number for number, (_, gain) in enumerate(gains) if gain <= 0]
    if not slower:
        return f"below {k(gains[0][0])}"
    (before, loss), (after, gain) = gains[slower[-1]], gains[slower[-1] + 1]
    share = -loss / (gain - loss)
    return f"{before * (after / before) ** share / 1024:.0f}K"


def crossover() -> str:
    layer, model = read("prefill"), read("step")
    lines = [
        (f"one layer, {kind} queries", rows_of(layer, kind), "dense_ms", "ours_ms")
        for kind in ("correlated", "independent")
    ]
    lines.append(("first token", rows_of(model, "prompt"), "dense_ms", "sparse_ms"))
    for batch in sorted({row["batch"] for row in rows_of(model, "decode")}):
        rows = [row for row in rows_of(model, "decode") if row["batch"] == batch]
        lines.append((f"decode step, batch {batch}", rows, "dense_ms", "sparse_ms"))
    return table(
        ("the whole of", "sparse is faster from"),
        ((name, level_at(rows, dense, sparse)) for name, rows, dense, sparse in lines),
    )


LINEAR_SHAPES = {
    "qkv": "qkv 4608x4096",
    "o": "o 4096x4096",
    "gate_up": "gate, up 32768x4096",
    "down": "down 4096x16384",
    "layer": "the layer",
}
LOW_BIT = ("w2 g64", "w4 g128", "w8 g128")


def linear_times() -> dict[tuple[str, str, int], dict[str, Any]]:
    rows = rows_of(read("linear"), "decode")
    return {(row["shape"], row["format"], row["tokens"]): row for row in rows}


def linear_one_token() -> str:
    result, times = read("linear"), linear_times()

    def line(shape: str, kind: str) -> Iterable[str]:
        row, cublas = times[shape, kind, 1], times[shape, "cublas", 1]["us"]
        int4 = times.get((shape, "pytorch int4", 1))
        return (
            *(LINEAR_SHAPES[shape], kind, f"{row['us']:.1f}"),
            f"{row['after_another_us']:.1f}" if "after_another_us" in row else "-",
            f"{row['floor_us']:.1f}" if "floor_us" in row else "-",
            *(f"{cublas:.1f}", f"{cublas / row['us']:.2f}"),
            f"{int4['us']:.1f}" if int4 else "-",
            f"{row['target_us']:.1f}" if "target_us" in row else "-",
            yes(row["held"]) if "held" in row else "-",
        )

    return (
        table(
            ("weight", "format", "us", "behind another kernel", "floor", "cuBLAS bf16")
            + ("cuBLAS / ours", "PyTorch int4", "target", "held"),
            (line(shape, kind) for shape in LINEAR_SHAPES for kind in LOW_BIT),
        )
        + f"\n\nCopy rate of the run {result['copy_bytes_per_second'] / 1e12:.2f} TB/s. "
        + made_on(result)
    )


def linear_tokens() -> str:
    times = linear_times()
    tokens = sorted({count for _, _, count in times})

    def line(shape: str, kind: str) -> Iterable[str]:
        us = [times[shape, kind, count]["us"] for count in tokens]
        last = us[-1] / times[shape, "cublas", tokens[-1]]["us"]
        sixteen = times[shape, kind, 16]["us"] / us[0]
        ratios = ("", "") if kind == "cublas" else (f"{sixteen:.2f}", f"{last:.2f}")
        return (LINEAR_SHAPES[shape], kind, *(f"{one:.1f}" for one in us), *ratios)

    return table(
        ("weight", "format", *(str(count) for count in tokens), "16 / 1", "64 / cuBLAS"),
        (
            line(shape, kind)
            for shape in LINEAR_SHAPES
            for kind in ("cublas", "pytorch int4", *LOW_BIT)
            if (shape, kind, 1) in times
        ),
    )


def linear_prefill() -> str:
    rows = rows_of(read("linear"), "prefill")
    tokens = sorted({row["tokens"] for row in rows})
    times = {(row["shape"], row["format"], row["tokens"]): row for row in rows}

    def cell(row: dict[str, Any]) -> str:
        return f"{row['us']:.0f} ({row['ratio']:.2f})"

    return table(
        ("weight", "format", *(f"{count} tokens" for count in tokens), "panel, MiB"),
        (
            (
                *(LINEAR_SHAPES[shape], kind),
                *(cell(times[shape, kind, count]) for count in tokens),
                f"{times[shape, kind, tokens[0]]['workspace_bytes'] / 2**20:.0f}",
            )
            for shape, kind in dict.fromkeys((row["shape"], row["format"]) for row in rows)
        ),
    )


MAKERS = (
    layer_decode,
    dense_rows,
    prefill,
    unions,
    small_model_unions,
    small_model_prefill,
    chunks,
    first_token,
    decode,
    crossover,
    weights,
    linear_one_token,
    linear_tokens,
    linear_prefill,
)
TABLES = {make.__name__: make for make in MAKERS}


def fill(page: Path, makers: Mapping[str, Callable[[], str]]) -> None:
    """Writes each table into its marked place; one whose results are not there stays as it is."""
    text = page.read_text("utf-8")
    for name, make in makers.items():
        try:
            made = make()
        except FileNotFoundError as error:
            print(f"table {name} is left as it is: {error.filename} is not there")
            continue
        opening, closing = f"<!-- table {name} -->", "<!-- end of table -->"
        pattern = re.compile(f"{re.escape(opening)}.*?{re.escape(closing)}", re.DOTALL)
        places = pattern.findall(text)
        if len(places) != 1:
            raise SystemExit(f"{page.name} has {len(places)} places for table {name}, wanted 1")
        text = text.replace(places[0], f"{opening}\n{made}\n{closing}")
    page.write_text(text, "utf-8")


def main() -> None:
    fill(PAGE, TABLES)


if __name__ == "__main__":
    main()
