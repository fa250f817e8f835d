"""Draws docs/images/decode_h100.png from benchmarks/results/decode_h100.json."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    result = json.loads((ROOT / "benchmarks/results/decode_h100.json").read_text())
    rows = [row for row in result["rows"] if row["kind"] == "sparse"]
    figure, axis = plt.subplots(figsize=(9, 4.2))
    names = [f"{row['batch']} x {row['length'] // 1024}K" for row in rows]
    for shift, key, label, colour in (
        (-0.3, "dense_us", "dense, the better of two", "#9aa5b1"),
        (0.0, "ours_us", "sparse step", "#1f6feb"),
        (0.3, "floor_us", "floor: bytes at the copy rate", "#d9e2ec"),
    ):
        places = [place + shift for place in range(len(rows))]
        bars = axis.bar(places, [row[key] for row in rows], 0.28, label=label, color=colour)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
    axis.set_yscale("log")
    axis.set_xticks(range(len(rows)), names)
    axis.set_xlabel("batch x tokens of context")
    axis.set_ylabel("microseconds a layer (log)")
    environment = result["environment"]
    axis.set_title(f"Decode attention, {environment['gpu']}, {environment['date']}", fontsize=10)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs/images/decode_h100.png", dpi=140)


if __name__ == "__main__":
    main()
