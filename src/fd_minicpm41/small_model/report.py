"""Rows of the suite as a table on a terminal, and as heat maps of retrieval by depth and length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fd_minicpm41.errors import UsageError
from fd_minicpm41.small_model.scores import DEPTHS, Row, find, share

KIND_HEADS = {
    "arithmetic_think": "thinks",
    "arithmetic_no_think": "no think",
    "tool_call": "calls",
    "copy": "copies",
    "count": "counts",
    "chat": "chats",
}
NOTHING = "-"


def models_of(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(engine, attention, weights) of the rows, in their order, each once."""
    return list(dict.fromkeys((r["engine"], r["attention"], r["weights"]) for r in rows))


def lengths_of(rows: Sequence[Row]) -> list[int]:
    """Lengths of the retrieval cells."""
    return sorted({row["length"] for row in rows if row["task"] == "retrieval"})


def in_thousands(length: int) -> str:
    """16384 as "16K"."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def table(rows: Sequence[Row]) -> str:
    """One line a model: retrieval by length, perplexity, forms of replies, blocks read."""
    lengths = lengths_of(rows)
    kinds = [k for k in KIND_HEADS if any(r.get("kind") == k for r in rows)]
    head = ["engine", "attention", "weights", *map(in_thousands, lengths), "blocks", "perplexity"]
    lines = [[*head, *(KIND_HEADS[kind] for kind in kinds)]]
    for engine, attention, weights in models_of(rows):
        own = {"engine": engine, "attention": attention, "weights": weights}
        found = [find(rows, task="retrieval", length=n, **own) for n in lengths]
        cells = [NOTHING if row is None else f"{share(row):.1%}" for row in found]
        longest = found[-1] if found else None
        read = longest.get("blocks_read") if longest else None
        cells.append(NOTHING if read is None else f"{read:.1%}")
        prose = find(rows, task="perplexity", **own)
        cells.append(NOTHING if prose is None else f"{prose['perplexity']:.4f}")
        for kind in kinds:
            row = find(rows, task="format", kind=kind, **own)
            cells.append(NOTHING if row is None else f"{share(row, 'well_formed'):.1%}")
        lines.append([engine, attention, weights, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            word.ljust(width) if i < 3 else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def plot_heat_maps(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draws the share of right answers by length and depth, one field a model.

    Raises:
        UsageError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "a heat map needs the package matplotlib: pip install 'fd-minicpm41[plot]'"
        ) from None
    rows = [row for row in rows if row["task"] == "retrieval"]
    models, lengths = models_of(rows), lengths_of(rows)
    if not models:
        return
    across = min(4, len(models))
    down = -(-len(models) // across)
    figure = Figure(figsize=(1.2 + 2.9 * across, 0.8 + 2.9 * down), layout="constrained")
    fields = figure.subplots(down, across, squeeze=False)
    colours = ScalarMappable(Normalize(0, 1), "RdYlGn")
    for number, axes in enumerate(fields.flat):
        if number >= len(models):
            axes.set_axis_off()
            continue
        engine, attention, weights = models[number]
        values = [[float("nan")] * len(lengths) for _ in range(DEPTHS)]
        for column, length in enumerate(lengths):
            row = find(rows, length=length, engine=engine, attention=attention, weights=weights)
            for depth, (right, asked) in enumerate(row["depths"] if row else []):
                if asked:
                    values[depth][column] = right / asked
        axes.set_facecolor("lightgray")  # nothing was asked there
        axes.imshow(values, norm=colours.norm, cmap=colours.cmap, aspect="auto")
        axes.set_title(f"{weights}, {attention}, {engine}", fontsize="small")
        axes.set_xticks(range(len(lengths)), [in_thousands(n) for n in lengths], fontsize="small")
        depths = [f"{100 * d // DEPTHS}%" for d in range(0, DEPTHS, 3)]
        axes.set_yticks(range(0, DEPTHS, 3), depths, fontsize="small")
    figure.supxlabel("tokens of the document")
    figure.supylabel("depth of the fact")
    figure.suptitle(title)
    figure.colorbar(colours, ax=fields, label="right answers", shrink=0.8)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UsageError(
            f"{path} cannot be written ({error}): free some space or give another --dir"
        ) from None
