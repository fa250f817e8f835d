"""Draws docs/images/prefill_h100.png and step_h100.png from the results of the same names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GREY, BLUE, LIGHT, ORANGE = "#9aa5b1", "#1f6feb", "#79b8ff", "#d97706"


def read(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"benchmarks/results/{name}_h100.json").read_text())


def lengths_axis(axis: Any, lengths: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)


def draw(figure: Any, name: str, environment: dict[str, Any], title: str) -> None:
    figure.suptitle(f"{title}, {environment['gpu']}, {environment['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(ROOT / f"docs/images/{name}_h100.png", dpi=140)


def prefill() -> None:
    result = read("prefill")
    kinds = {
        kind: [row for row in result["rows"] if row["kind"] == kind]
        for kind in ("correlated", "independent")
    }
    lengths = [row["length"] for row in kinds["correlated"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    rows = kinds["correlated"]
    left.plot(lengths, [row["cudnn_ms"] for row in rows], "o-", color=GREY, label="cuDNN, dense")
    left.plot(lengths, [row["flash_ms"] for row in rows], "o:", color=GREY, label="FA2, dense")
    for kind, colour in (("correlated", BLUE), ("independent", LIGHT)):
        times = [row["ours_ms"] for row in kinds[kind]]
        left.plot(lengths, times, "o-", color=colour, label=f"sparse step, {kind} queries")
        gains = [row["dense_ms"] / row["ours_ms"] for row in kinds[kind]]
        right.plot(lengths, gains, "o-", color=colour, label=f"{kind} queries")
    left.plot(lengths, [row["floor_ms"] for row in rows], "--", color="#c9d1d9", label="floor")
    left.set_yscale("log")
    left.set_ylabel("milliseconds a layer (log)")
    right.axhline(1, color=GREY, linewidth=0.8)
    right.set_ylabel("better dense / sparse step")
    for axis in (left, right):
        lengths_axis(axis, lengths)
        axis.set_xlabel("prompt, tokens")
        axis.legend(frameon=False, fontsize=8)
    draw(figure, "prefill", result["environment"], "Prefill attention, one layer")


def step() -> None:
    result = read("step")
    prompts = [row for row in result["rows"] if row["kind"] == "prompt"]
    decode = [row for row in result["rows"] if row["kind"] == "decode"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    lengths = [row["length"] for row in prompts]
    for side, colour in (("dense", GREY), ("sparse", BLUE)):
        times = [row[f"{side}_ms"] / 1e3 for row in prompts]
        left.plot(lengths, times, "o-", color=colour, label=side)
    left.set_yscale("log")
    left.set_ylabel("seconds to the first token (log)")
    left.set_xlabel("prompt, tokens")
    lengths_axis(left, lengths)
    contexts = sorted({row["length"] for row in decode})
    colours = {1: GREY, 4: LIGHT, 16: BLUE, 64: ORANGE}
    for batch in sorted({row["batch"] for row in decode}):
        rows = [row for row in decode if row["batch"] == batch]
        gains = [row["gain"] for row in rows]
        places = [row["length"] for row in rows]
        right.plot(places, gains, "o-", color=colours[batch], label=f"batch {batch}")
    right.axhline(1, color=GREY, linewidth=0.8)
    right.set_ylabel("tokens/s, sparse / dense")
    right.set_xlabel("context, tokens")
    lengths_axis(right, contexts)
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=8)
    draw(figure, "step", result["environment"], "Whole model of 8B shapes, bf16")


if __name__ == "__main__":
    prefill()
    step()
