"""What the commands share: Paddle made ready, progress bars, and input checked before use."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from fd_minicpm41.errors import UsageError

if TYPE_CHECKING:
    from fd_minicpm41.reference.model import ForCausalLM


def prepare_paddle() -> None:
    """Imports Paddle and lets it use every processor this process may run on.

    Paddle takes one thread unless ``OMP_NUM_THREADS`` is set; a value that the user set is kept.
    From here on SIGTERM unwinds like an error, so that what is half-written is removed, and not
    with the stack trace that Paddle's own handler prints.

    Raises:
        UsageError: Paddle is not installed.
    """
    if find_spec("paddle") is None:
        raise UsageError("Paddle is not installed: pip install 'fd-minicpm41[cpu]'")
    is_set = "OMP_NUM_THREADS" in os.environ
    # Paddle looks for a compiler cache on import, which nothing here needs.
    warnings.filterwarnings("ignore", message="No ccache found")
    import paddle
    from paddle.base import core

    if not is_set:
        core.set_num_threads(len(os.sched_getaffinity(0)))
    paddle.disable_signal_handler()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def progress(total: int, what: str, unit: str) -> Any:
    """A progress bar on stderr where that is a terminal, and none elsewhere."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, leave=False, disable=not sys.stderr.isatty())


def byte_progress(files: Iterable[Path], what: str) -> Any:
    """A bar like :func:`progress` over the bytes of files."""
    bar = progress(sum(path.stat().st_size for path in files), what, "B")
    bar.unit_scale = True
    return bar


def counted(bar: Any) -> Callable[[int, int], None]:
    """A callback (done, in all) that moves ``bar``."""

    def move(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return move


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose a checkpoint and how it attends."""
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="Hugging Face checkpoint folder"
    )
    parser.add_argument(
        "--attention",
        choices=("dense", "infllmv2"),
        default="dense",
        help="infllmv2 is sparse from dense_len tokens on (default: dense)",
    )
    parser.add_argument(
        "--sparse-config",
        metavar="JSON",
        help='keys of sparse_config to change, such as \'{"topk": 8, "dense_len": 0}\' '
        "(default: the checkpoint's, or else the published values)",
    )
    parser.add_argument(
        "--rope-table",
        metavar="NAME",
        help="published RoPE factors for a longer context: 128k (default: the checkpoint's own)",
    )


def load(args: argparse.Namespace) -> ForCausalLM:
    """The model that :func:`add_model_arguments`' arguments name, with a progress bar."""
    prepare_paddle()
    from fd_minicpm41.config import MiniCPMConfig, SparseConfig
    from fd_minicpm41.reference.checkpoint import load_model

    sparse = None
    if args.sparse_config is not None:
        try:
            changes = json.loads(args.sparse_config)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"--sparse-config is not JSON ({error}): quote it, as in '{{\"topk\": 8}}'"
            ) from None
        own = MiniCPMConfig.from_pretrained(args.model).sparse or SparseConfig()
        sparse = SparseConfig.from_dict(
            {**own.__dict__, **changes} if isinstance(changes, dict) else changes
        )
    with progress(1, "loading", "tensor") as bar:
        return load_model(
            args.model, rope_table=args.rope_table, sparse=sparse, on_progress=counted(bar)
        )


def read_prompt(prompt: str) -> str:
    """The prompt itself, or all of standard input for ``-``.

    Raises:
        UsageError: nothing in it, or bytes that are not UTF-8.
    """
    where = "standard input" if prompt == "-" else "--prompt"
    try:
        if prompt == "-":
            prompt = sys.stdin.buffer.read().decode("utf-8")
        else:
            # Python hides bytes of the command line that are not UTF-8 in lone surrogates.
            prompt.encode("utf-8")
    except UnicodeError as error:
        raise UsageError(
            f"{where} is not UTF-8 ({error}): convert it, for example with iconv -t UTF-8"
        ) from None
    if not prompt:
        raise UsageError(f"{where} is empty: give the model some text to go on from")
    return prompt
