"""The command line ``fd-minicpm41``: thin, and quick to start.

A command is a module with ``add_parser(commands)``, which sets ``run`` to a function from the
parsed arguments to the exit code. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from fd_minicpm41 import __version__
from fd_minicpm41.cli import demo, doctor, generate, gguf, quantize, quantized
from fd_minicpm41.errors import UsageError

PROGRAM = "fd-minicpm41"
COMMANDS = (generate, quantize, quantized, doctor, gguf, demo)

EPILOG = """\
examples:
  fd-minicpm41 demo
  fd-minicpm41 generate --model DIR --prompt "Once upon a time" --max-tokens 64
  fd-minicpm41 generate --model DIR --prompt - --attention infllmv2 --json < book.txt
  fd-minicpm41 chat --model DIR
  fd-minicpm41 quantize --model DIR --out DIR2 --method wint4 --calib book.txt
  fd-minicpm41 eval --model DIR2 --source DIR --text another.txt
  fd-minicpm41 eval --suite small --weights bf16 wint4
  fd-minicpm41 doctor

Bad input is answered with one line on stderr and exit code 2.
"""


class _Parser(argparse.ArgumentParser):
    """Tells a wrong argument in the same one line as any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}: see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Every command with its arguments."""
    parser = _Parser(
        prog=PROGRAM,
        description="MiniCPM4.1 with InfLLM-V2 block-sparse attention: try it here, serve it with "
        "FastDeploy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for bad input, 130 after Ctrl-C.

    The caller's handler of SIGTERM stands again afterwards.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        args = build_parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of the pipe has gone; without this the interpreter would say so when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        if handler is not None and signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)
