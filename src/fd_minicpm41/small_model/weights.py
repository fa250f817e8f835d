"""The small model in every weight format, made by the package's own quantiser."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from random import Random

from fd_minicpm41.quantization.plan import Recipe
from fd_minicpm41.quantization.quantise import quantise
from fd_minicpm41.quantization.sidecar import hash_file, read_sidecar, weight_files
from fd_minicpm41.quantization.streaming import Progress, TokenWindows
from fd_minicpm41.reference.tokenizer import Tokenizer
from fd_minicpm41.small_model.examination import plain_ids
from fd_minicpm41.small_model.prose import calibration_paragraphs
from fd_minicpm41.small_model.tasks import PROMPT_KINDS, make_prompt, make_retrieval

# What `fd-minicpm41 quantize --method M --calib ...` takes by default.
RECIPES = {
    "wint8": Recipe("wint8", "rtn"),
    "wint4": Recipe("wint4", "gptq"),
    "wint2": Recipe("wint2", "gptq", hadamard=128),
    "w4a8": Recipe("w4a8", "gptq"),
    "w4afp8": Recipe("w4afp8", "gptq"),
}

# The formats that are files of their own; fp8 is made of bf16 weights as they are loaded.
STORED = tuple(RECIPES)

CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 8, 1024
CALIBRATION_SEED = 7


def calibration_windows(
    tokenizer: Tokenizer, count: int = CALIBRATION_WINDOWS, length: int = CALIBRATION_LENGTH
) -> TokenWindows:
    """What GPTQ reads: tasks of the training split with their replies, in prose of its own."""
    rng = Random(CALIBRATION_SEED)
    windows = [_window(tokenizer, rng, length) for _ in range(count)]
    digest = sha256(repr(windows).encode()).hexdigest()
    return TokenWindows(windows, "tasks of the training split", digest)


def _window(tokenizer: Tokenizer, rng: Random, length: int) -> list[int]:
    def length_of(text: str) -> int:
        return len(plain_ids(tokenizer, text))

    made = make_retrieval(rng, calibration_paragraphs(), length_of, length // 2, 6, "train")
    messages = []
    for index, question in enumerate(made.questions):
        asked = made.prefix + question.question if index == 0 else question.question
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": question.reply})
    text = tokenizer.render_chat(messages[:-1], enable_thinking=False) + made.questions[-1].reply
    ids = tokenizer.encode(text)
    while len(ids) < length:
        prompt = make_prompt(rng, rng.choice(PROMPT_KINDS), "train")
        ids += tokenizer.encode_chat(prompt.messages, prompt.enable_thinking, prompt.tools)
        ids += tokenizer.encode(prompt.reply + "\n")
    return ids[:length]


def make_weights(
    source: Path,
    methods: Iterable[str],
    folder: Path,
    on_progress: Progress | None = None,
) -> dict[str, Path]:
    """The checkpoint folder of each of ``methods``, below ``folder``; those that are there stay.

    Raises:
        UsageError: what :func:`quantise` raises.
    """
    tokenizer = Tokenizer(source)
    digest = {path.name: hash_file(path) for path in weight_files(source)}
    made = {}
    for method in methods:
        # Another source gets other folders, so that none is ever overwritten.
        name = sha256(repr((sorted(digest.items()), RECIPES[method])).encode()).hexdigest()[:12]
        out = folder / f"{method}-{name}"
        made[method] = out
        if out.is_dir() and read_sidecar(out) is not None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        recipe = RECIPES[method]
        windows = calibration_windows(tokenizer) if recipe.algorithm == "gptq" else None
        quantise(source, out, recipe, windows, on_progress=on_progress)
    return made
