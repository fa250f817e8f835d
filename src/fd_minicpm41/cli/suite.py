"""``eval --suite small``: the small trained model examined, dense and sparse, in every format."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fd_minicpm41.cli.runtime import counted, progress
from fd_minicpm41.errors import UsageError
from fd_minicpm41.small_model.scores import ATTENTIONS, ENGINES, WEIGHTS, AttentionName

if TYPE_CHECKING:
    from fd_minicpm41.small_model.engines import Engine

# Arguments that only the suite has: their defaults stand where None is asked for.
DEFAULTS: dict[str, Any] = {
    "engine": "ops",
    "attention": list(ATTENTIONS),
    "weights": ["bf16"],
    "lengths": None,
    "questions": 16,
    "prompts": 16,
    "prose": 1,
    "dir": ".small_suite",
    "url": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the suite's arguments to ``eval``."""
    group = parser.add_argument_group(
        "the suite",
        "--suite small answers questions about long documents, reads prose and has short chats; "
        "--model is then the small model that ships with the package unless another is given. "
        "Results are kept in --dir cell by cell: the same command goes on where it was stopped.",
    )
    group.add_argument("--suite", choices=("small",), help="examine instead of reading --text")
    group.add_argument(
        "--engine",
        choices=ENGINES,
        help="the readable reference, the kernels, or a running server (default: ops)",
    )
    group.add_argument(
        "--attention", nargs="+", choices=ATTENTIONS, help="(default: dense and sparse)"
    )
    group.add_argument(
        "--weights",
        nargs="+",
        choices=(*WEIGHTS, "all"),
        help="formats, quantised here when they are first asked for (default: bf16)",
    )
    group.add_argument(
        "--lengths", nargs="+", type=int, metavar="N", help="tokens (default: 1024 to 16384)"
    )
    group.add_argument(
        "--questions", type=int, metavar="N", help="for each length; 0 for none (default: 16)"
    )
    group.add_argument(
        "--prompts", type=int, metavar="N", help="short ones of each kind (default: 16)"
    )
    group.add_argument(
        "--prose", type=int, metavar="N", help="windows of 8192 tokens to read (default: 1)"
    )
    group.add_argument(
        "--dir", metavar="DIR", help="results, pictures and weights (default: .small_suite)"
    )
    group.add_argument("--url", metavar="URL", help="of the server, for --engine fastdeploy")


def check(args: argparse.Namespace) -> None:
    """Tells arguments of the suite from those of a text, and fills in the suite's defaults.

    Raises:
        UsageError: one that does not go with the others.
    """
    if args.suite is None:
        given = [name for name in DEFAULTS if getattr(args, name) is not None]
        if given:
            raise UsageError(f"--{given[0]} belongs to the suite: add --suite small")
        for name in ("model", "text"):
            if getattr(args, name) is None:
                raise UsageError(f"--{name} is missing: give it, or --suite small")
        return
    for name in ("text", "source", "simulate", "chart", "windows"):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} does not go with --suite: leave it out")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if "all" in args.weights:
        args.weights = list(WEIGHTS)
    for name in ("questions", "prompts", "prose"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name} is {getattr(args, name)}, wanted 0 or more: correct it")
    if args.engine == "fastdeploy":
        if args.url is None:
            raise UsageError("--engine fastdeploy needs --url: give the address of the server")
        if len(args.attention) > 1 or len(args.weights) > 1:
            raise UsageError(
                "a server has one attention and one weight format: name those it was started with "
                "by --attention and --weights"
            )
    elif args.url is not None:
        raise UsageError(f"--url does not go with --engine {args.engine}: leave it out")


def run(args: argparse.Namespace) -> int:
    """Prints the table; writes ``results.json`` and a heat map for each engine."""
    from fd_minicpm41.config import MiniCPMConfig
    from fd_minicpm41.quantization.streaming import choose_device
    from fd_minicpm41.small_model import path, report, suite
    from fd_minicpm41.small_model.examination import LENGTHS

    folder = path() if args.model is None else Path(args.model)
    config = MiniCPMConfig.from_pretrained(folder)
    lengths = tuple(sorted(set(args.lengths or LENGTHS)))
    # What a conversation puts around a document and what is answered takes less than this.
    longest = config.max_context - 256
    for length in lengths:
        if not 256 <= length <= longest:
            raise UsageError(
                f"--lengths has {length}, wanted 256 to {longest}, the model's context: correct it"
            )
    if args.engine != "fastdeploy":
        choose_device(args.device)
    plan = suite.Plan(
        engine=args.engine,
        attentions=tuple(dict.fromkeys(args.attention)),
        weights=tuple(dict.fromkeys(args.weights)),
        lengths=lengths,
        questions=args.questions,
        prompts=args.prompts,
        windows=args.prose,
    )
    results = suite.Results.open(Path(args.dir), suite.model_digest(folder))
    make = _maker(args, folder)
    with progress(1, "examining", "token") as bar:
        rows = suite.run(folder, plan, results, make, counted(bar), lambda row: None)
    written = [results.path]
    if plan.questions:
        picture = results.path.with_name(f"retrieval_{args.engine}.png")
        try:
            report.plot_heat_maps(rows, picture, "retrieval from documents")
            written.append(picture)
        except UsageError as error:
            print(f"no heat map: {error}")
    if args.json:
        print(json.dumps({"model": results.model, "rows": rows}))
        return 0
    print(report.table(rows))
    print(f"\nwrote {', '.join(map(str, written))}")
    return 0


def _maker(args: argparse.Namespace, folder: Path) -> Any:
    """Gives the engine of an attention and a weight format."""
    from fd_minicpm41.quantization.evaluation import Side
    from fd_minicpm41.reference.checkpoint import Checkpoint
    from fd_minicpm41.reference.tokenizer import Tokenizer
    from fd_minicpm41.small_model.engines import LocalEngine, ServerEngine
    from fd_minicpm41.small_model.weights import STORED, make_weights

    stop_ids = Tokenizer(folder).stop_ids
    made: dict[str, Path] = {}

    def make(attention: AttentionName, weights: str) -> Engine:
        if args.engine == "fastdeploy":
            return ServerEngine(args.url, stop_ids)
        if weights in STORED and weights not in made:
            with progress(1, f"quantising to {weights}", "linear") as bar:
                made.update(
                    make_weights(folder, [weights], Path(args.dir) / "weights", counted(bar))
                )
        side = None
        if weights == "fp8":
            side = Side.of(Checkpoint(folder)).as_fp8()
        return LocalEngine(made.get(weights, folder), args.engine, attention, side, stop_ids)

    return make
