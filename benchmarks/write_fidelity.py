"""Writes the tables marked `<!-- table NAME -->` of docs/fidelity.md and fidelity_cn.md, and draws
their pictures, from benchmarks/results/small_model_*.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fd_minicpm41.small_model.report import in_thousands, lengths_of, plot_heat_maps
from fd_minicpm41.small_model.scores import ATTENTIONS, WEIGHTS, Row, find, share
from write_tables import fill, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
IMAGES = ROOT / "docs/images"
PAGES = {"en": ROOT / "docs/fidelity.md", "cn": ROOT / "docs/fidelity_cn.md"}
SEEDS = {"seed 1, shipped": "h100", "seed 2": "seed2_h100"}
HELD_TO_REFERENCE = (8192, 16384)
KINDS = ("arithmetic_think", "arithmetic_no_think", "tool_call", "copy", "count", "chat")

CHINESE = {
    "engine": "引擎",
    "attention": "注意力",
    "weights": "权重",
    "dense": "稠密",
    "sparse": "稀疏",
    "reference": "参考实现",
    "ops": "算子",
    "fastdeploy": "FastDeploy",
    "blocks read at": "读取的块，",
    "perplexity": "困惑度",
    "of dense": "与稠密之比",
    "of bf16": "与 bf16 之比",
    "thinking": "思考",
    "no thinking": "不思考",
    "tool call": "工具调用",
    "copying": "复述",
    "counting": "计数",
    "chat": "闲聊",
    "bar": "标准",
    "wanted": "要求",
    "measured": "实测",
    "seed 1, shipped": "种子 1（随包附带）",
    "seed 1": "种子 1",
    "seed 2": "种子 2",
    "model": "模型",
    "blocks": "块数",
    "held": "达到",
    "yes": "是",
    "**no**": "**否**",
    "at least": "至少",
    "at most": "至多",
    "dense retrieval, worst length": "稠密检索，最差的长度",
    "sparse below dense, worst length": "稀疏低于稠密，最差的长度",
    "share of blocks read at 16K": "16K 时读取的块的比例",
    "perplexity, sparse over dense": "困惑度，稀疏比稠密",
    "thinking obeyed": "遵守思考的格式",
    "no thinking obeyed": "遵守不思考的要求",
    "tool calls in form": "工具调用的格式",
    "wint8 below bf16, worst length": "wint8 低于 bf16，最差的长度",
    "wint4 below bf16, worst length": "wint4 低于 bf16，最差的长度",
    "kernels from the reference, 8K and 16K": "内核与参考实现之差，8K 与 16K",
    "points": "个百分点",
    "questions for each length": "题（每个长度）",
    "prompts of each kind": "题（每种格式）",
    "tokens of prose": "个词元的文章",
    "processors": "个 CPU 核",
}


def english(text: str) -> str:
    return text


def chinese(text: str) -> str:
    return CHINESE.get(text, text)


Say = Callable[[str], str]
LANGUAGES: dict[str, Say] = {"en": english, "cn": chinese}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"small_model_{name}.json").read_text())


def percent(row: Row | None, what: str = "right") -> str:
    return "-" if row is None else f"{100 * share(row, what):.1f} %"


def made_on(result: dict[str, Any], say: Say) -> str:
    rows = result["rows"]
    sizes = [
        (max((r.get(key, 0) for r in rows), default=0), what)
        for key, what in (
            ("questions", "questions for each length"),
            ("prompts", "prompts of each kind"),
            ("tokens", "tokens of prose"),
        )
    ]
    listed = ", ".join(f"{count} {say(what)}" for count, what in sizes if count)
    e = result.get("environment")
    if e is None:
        made = result["made"]
        cores = f"{made['processors']} {say('processors')}"
        return f"{listed}. {cores}, Python {made['python']}, {made['date']}."
    command = re.sub(r" --(out|formats|model) \S+", "", e["command"])
    if "gpu" in e:
        machine = f"{e['gpu']}, driver {e['driver']}, CUDA {e['cuda']}"
    else:
        machine = f"{e['processors']} {say('processors')}"
    return f"{listed}. {machine}, PyTorch {e['torch']}, {e['date']}: `{command}`."


def score_table(rows: Sequence[Row], models: Iterable[tuple[str, str, str]], say: Say) -> str:
    """A line a model: retrieval by length, blocks read, perplexity and its ratio to the first."""
    lengths = lengths_of(rows)
    models = [m for m in models if find(rows, engine=m[0], attention=m[1], weights=m[2])]
    longest = in_thousands(lengths[-1])
    head = [say("engine"), say("attention"), say("weights"), *map(in_thousands, lengths)]
    head += [f"{say('blocks read at')} {longest}", say("perplexity")]
    lines = []
    for engine, attention, weights in models:
        own = {"engine": engine, "attention": attention, "weights": weights}
        found = [find(rows, task="retrieval", length=n, **own) for n in lengths]
        blocks = found[-1].get("blocks_read") if found[-1] else None
        prose = find(rows, task="perplexity", **own)
        lines.append(
            [
                *(say(engine), say(attention), weights),
                *map(percent, found),
                "-" if blocks is None else f"{100 * blocks:.1f} %",
                "-" if prose is None else f"{prose['perplexity']:.4f}",
            ]
        )
    return table(head, lines)


def attention(say: Say) -> str:
    result = read("h100")
    models = [(engine, a, "bf16") for engine in ("reference", "ops") for a in ATTENTIONS]
    return f"{score_table(result['rows'], models, say)}\n\n{made_on(result, say)}"


def budgets(say: Say) -> str:
    """The same weights served with more and with fewer blocks."""
    result = read("budgets_h100")
    lengths = [4096, 8192, 16384]
    lines = []
    for row in result["rows"]:
        found = [row["retrieval"].get(str(n)) for n in lengths]
        blocks, prose = row.get("blocks_read_at_16384"), row.get("perplexity")
        lines.append(
            [
                say(row["model"]),
                say("dense") if row["budget"] is None else str(row["budget"]),
                *("-" if f is None else f"{f[0]} / {f[1]}" for f in found),
                "-" if blocks is None else f"{100 * blocks:.1f} %",
                "-" if prose is None else f"{prose:.2f}",
            ]
        )
    head = [say("model"), say("blocks"), *map(in_thousands, lengths)]
    return table([*head, f"{say('blocks read at')} 16K", say("perplexity")], lines)


def weights(say: Say) -> str:
    rows = read("h100")["rows"]
    models = [("ops", a, w) for w in WEIGHTS for a in reversed(ATTENTIONS)]
    return score_table(rows, models, say)


def kernels(say: Say) -> str:
    """Right answers of the reference and of the kernels, with every kind of weights."""
    rows = read("h100")["rows"]
    lengths = [n for n in lengths_of(rows) if n in HELD_TO_REFERENCE]
    lines = []
    for w in WEIGHTS:
        for a in ATTENTIONS:
            cells = []
            for length in lengths:
                own = {"task": "retrieval", "attention": a, "weights": w, "length": length}
                pair = [find(rows, engine=engine, **own) for engine in ("reference", "ops")]
                cells += ["-" if row is None else str(row["right"]) for row in pair]
            lines.append([w, say(a), *cells])
    names = [f"{say(e)}, {in_thousands(n)}" for n in lengths for e in ("reference", "ops")]
    return table([say("weights"), say("attention"), *names], lines)


def form_table(rows: Sequence[Row], models: Iterable[tuple[str, str]], say: Say) -> str:
    names = ("thinking", "no thinking", "tool call", "copying", "counting", "chat")
    lines = []
    for a, w in models:
        own = {"task": "format", "engine": "ops", "attention": a, "weights": w}
        found = [find(rows, kind=kind, **own) for kind in KINDS]
        if any(row is not None for row in found):
            cells = (f"{percent(row, 'well_formed')} / {percent(row)}" for row in found)
            lines.append([w, say(a), *cells])
    head = [say("weights"), say("attention")]
    return table([*head, *(say(name) for name in names)], lines)


def forms(say: Say) -> str:
    models = [(a, w) for w in WEIGHTS for a in ATTENTIONS]
    return form_table(read("h100")["rows"], models, say)


def cpu(say: Say) -> str:
    result = read("cpu")
    rows = result["rows"]
    engines = dict.fromkeys(row["engine"] for row in rows)
    models = [(e, a, w) for e in engines for w in WEIGHTS for a in ATTENTIONS]
    return f"{score_table(rows, models, say)}\n\n{made_on(result, say)}"


# ---- the bars ----


def worst_gap(
    rows: Sequence[Row],
    high: dict[str, str],
    low: dict[str, str],
    lengths: Sequence[int],
    is_absolute: bool = False,
) -> float | None:
    """By how many points retrieval of ``low`` is below that of ``high``, at its worst length;
    ``None`` where one of them was not measured at one of ``lengths``."""
    gaps = []
    for length in lengths:
        pair = [find(rows, task="retrieval", length=length, **side) for side in (high, low)]
        if pair[0] is None or pair[1] is None:
            return None
        gap = 100 * (share(pair[0]) - share(pair[1]))
        gaps.append(abs(gap) if is_absolute else gap)
    return max(gaps, default=None)


def largest(*values: float | None) -> float | None:
    return None if any(v is None for v in values) else max(v for v in values if v is not None)


def measured_bars(rows: Sequence[Row]) -> list[tuple[str, float, float | None, str, bool]]:
    """What is asked, the bar, the value, its unit, and whether more is better."""
    lengths = lengths_of(rows)

    def side(attention: str, weights: str = "bf16", engine: str = "ops") -> dict[str, str]:
        return {"engine": engine, "attention": attention, "weights": weights}

    dense = [find(rows, task="retrieval", length=n, **side("dense")) for n in lengths]
    at_16k = find(rows, task="retrieval", length=16384, **side("sparse"))
    prose = [find(rows, task="perplexity", **side(a)) for a in ("sparse", "dense")]
    ratio = None
    if prose[0] is not None and prose[1] is not None:
        ratio = prose[0]["perplexity"] / prose[1]["perplexity"]

    def form(kind: str) -> float | None:
        row = find(rows, task="format", kind=kind, **side("sparse"))
        return None if row is None else 100 * share(row, "well_formed")

    def below_bf16(weights: str) -> float | None:
        """Over the attentions and lengths at which the format was examined."""
        gaps = []
        for a in ATTENTIONS:
            own = [n for n in lengths if find(rows, length=n, task="retrieval", **side(a, weights))]
            if own:
                gaps.append(worst_gap(rows, side(a), side(a, weights), own))
        return largest(*gaps) if gaps else None

    gaps = [
        worst_gap(rows, side(a, w, "reference"), side(a, w), HELD_TO_REFERENCE, is_absolute=True)
        for w in WEIGHTS
        for a in ATTENTIONS
    ]
    kernels = max((gap for gap in gaps if gap is not None), default=None)
    shares = [100 * share(row) for row in dense if row is not None]
    return [
        ("dense retrieval, worst length", 99, min(shares, default=None), "%", True),
        (
            "sparse below dense, worst length",
            1,
            worst_gap(rows, side("dense"), side("sparse"), lengths),
            "points",
            False,
        ),
        (
            "share of blocks read at 16K",
            25,
            100 * at_16k["blocks_read"] if at_16k and "blocks_read" in at_16k else None,
            "%",
            False,
        ),
        ("perplexity, sparse over dense", 1.02, ratio, "", False),
        ("thinking obeyed", 98, form("arithmetic_think"), "%", True),
        ("no thinking obeyed", 98, form("arithmetic_no_think"), "%", True),
        ("tool calls in form", 95, form("tool_call"), "%", True),
        ("wint8 below bf16, worst length", 1, below_bf16("wint8"), "points", False),
        ("wint4 below bf16, worst length", 3, below_bf16("wint4"), "points", False),
        ("kernels from the reference, 8K and 16K", 0.5, kernels, "points", False),
    ]


def bars(say: Say) -> str:
    """Each bar with what each seed's model was measured at; what was not is not held against it."""
    found = [measured_bars(read(name)["rows"]) for name in SEEDS.values()]
    lines = []
    for of_seeds in zip(*found, strict=True):
        name, bar, _, unit, more = of_seeds[0]
        word = say("at least" if more else "at most")
        digits = 4 if unit == "" else 2
        # What is compared is what is printed, so that no bar is missed by the last bit.
        shown = [None if v is None else round(v, digits) for _, _, v, _, _ in of_seeds]
        cells = ["-" if v is None else f"{v:.{digits}f} {say(unit)}".rstrip() for v in shown]
        holds = [v >= bar if more else v <= bar for v in shown if v is not None]
        held = say("yes" if all(holds) else "**no**") if holds else "-"
        lines.append([say(name), f"{word} {bar:g} {say(unit)}".rstrip(), *cells, held])
    return table([say(word) for word in ("bar", "wanted", *SEEDS, "held")], lines)


MAKERS: tuple[Callable[[Say], str], ...] = (
    bars,
    attention,
    budgets,
    weights,
    kernels,
    forms,
    cpu,
)
TABLES = {make.__name__: make for make in MAKERS}


def pictures() -> None:
    """The heat maps of the pages."""
    rows = read("h100")["rows"]
    by_attention = [row for row in rows if row["weights"] == "bf16"]
    plot_heat_maps(by_attention, IMAGES / "fidelity_attention.png", "retrieval, bf16 weights")
    rows = [row for row in rows if row["engine"] == "ops" and row["attention"] == "sparse"]
    plot_heat_maps(rows, IMAGES / "fidelity_weights.png", "retrieval, sparse attention")


def main() -> None:
    for language, page in PAGES.items():
        fill(page, {name: partial(make, LANGUAGES[language]) for name, make in TABLES.items()})
    pictures()


if __name__ == "__main__":
    main()
