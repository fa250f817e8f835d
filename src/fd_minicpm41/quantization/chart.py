"""Charts of error by layer, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fd_minicpm41.errors import UsageError


def plot_errors(
    series: Mapping[str, Sequence[float | None]], path: str | Path, title: str, what: str
) -> None:
    """Draws one line a series over the layers.

    Args:
        series: a value a layer by name; ``None`` where a layer has none.
        what: the label of the values.

    Raises:
        UsageError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UsageError(
            "a chart needs the package matplotlib: pip install 'fd-minicpm41[plot]'"
        ) from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in series.items():
        points = [(i, value) for i, value in enumerate(values) if value is not None]
        axes.plot(*zip(*points, strict=True), label=name, marker=".", linewidth=1)
    axes.set(title=title, xlabel="layer", ylabel=what, ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    path = Path(path)
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UsageError(
            f"{path} cannot be written ({error}): give a path in a folder that exists"
        ) from None
