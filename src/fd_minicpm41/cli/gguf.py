"""``import-gguf``: a Llama GGUF file as a MiniCPM checkpoint folder."""

from __future__ import annotations

import argparse
from typing import Any

from fd_minicpm41.cli.runtime import counted, prepare_paddle, progress


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "import-gguf",
        help="rewrite a Llama GGUF file as a checkpoint folder",
        description="Rewrites a Llama model in a GGUF file as a MiniCPM checkpoint whose muP "
        "scalings are the identity: fp32 safetensors, tokenizer and chat template.",
    )
    parser.add_argument("file", metavar="FILE", help="GGUF file with a byte-level BPE tokenizer")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the folder whole or not at all."""
    prepare_paddle()
    from fd_minicpm41.reference.import_gguf import import_gguf

    with progress(1, "converting", "tensor") as bar:
        import_gguf(args.file, args.out, counted(bar))
    print(f"wrote {args.out}")
    return 0
