"""The loss curve of a training run, from its log."""

from __future__ import annotations

import json
from pathlib import Path

SMOOTHING = 0.9


def plot_loss(log: Path, picture: Path) -> bool:
    """Draws the losses of prose, replies and values by time; false without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("loss.png is not drawn: it needs matplotlib")
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True)
    for name, axis in (
        ("prose", top),
        ("reply", bottom),
        ("first", bottom),
        ("value", bottom),
        ("selection", bottom),
    ):
        steps, values, mean = [], [], None
        for line in lines:
            value = line[name]
            if value == 0:
                continue
            mean = value if mean is None else SMOOTHING * mean + (1 - SMOOTHING) * value
            steps.append(line["step"])
            values.append(mean)
        axis.plot(steps, values, label=name, linewidth=1)
    before = None
    for line in lines:
        if line["phase"] != before:
            before = line["phase"]
            for axis in (top, bottom):
                axis.axvline(line["step"], color="0.8", linewidth=0.8)
            top.text(line["step"], top.get_ylim()[1], f" {before}", fontsize=8, va="top")
    bottom.set_yscale("log")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.set_ylabel("loss")
        axis.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return True
