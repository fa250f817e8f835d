"""Times the kernels beside what they must beat: `minicpm41_performance.py decode`, `prefill`,
`step`, `linear`.

Every figure is the median of graph replays over inputs larger than L2, and the timed run's own
output is held to the oracle of tests/gpu.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import capi  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    decode = kinds.add_parser("decode", help="one layer, one new token a request")
    decode.add_argument("--out", type=Path, help="write the rows here as JSON")
    decode.add_argument("--max-blocks", type=int, help="width of the block tables")
    decode.add_argument("--parts", action="store_true", help="time each op by itself as well")
    decode.add_argument("--sparse-only", action="store_true", help="leave out the dense rows")
    prefill = kinds.add_parser("prefill", help="one layer, one prompt")
    prefill.add_argument("--out", type=Path, help="write the rows here as JSON")
    prefill.add_argument("--longest", type=int, default=131072, help="leave out longer prompts")
    prefill.add_argument("--repeats", type=int, default=20, help="runs that a median is of")
    prefill.add_argument(
        "--small-model",
        type=Path,
        metavar="DIR",
        help="time this checkpoint's layers over prose in place of drawn prompts "
        "(src/fd_minicpm41/small_model/checkpoint)",
    )
    step = kinds.add_parser("step", help="the whole model: prompts and decode steps")
    step.add_argument("--out", type=Path, help="write the rows here as JSON")
    step.add_argument("--longest", type=int, default=131072, help="leave out longer contexts")
    step.add_argument(
        "--weights",
        choices=["all", "bf16", "wint8", "wint4", "wint2"],
        default="all",
        help="of the model; all: bf16, and one request's decode step with each of the others",
    )
    parts = ["prompts", "decode", "weights"]
    step.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to time")
    linear = kinds.add_parser("linear", help="one layer's products with low-bit weights")
    linear.add_argument("--out", type=Path, help="write the rows here as JSON")
    args = parser.parse_args()
    if reason := capi.missing_for_cuda():
        parser.error(f"{reason}; `make benchmark KIND={args.kind}` brings all but the GPU")
    args.command = shlex.join(["python", *sys.argv])
    return importlib.import_module(args.kind).main(args)


if __name__ == "__main__":
    raise SystemExit(main())
