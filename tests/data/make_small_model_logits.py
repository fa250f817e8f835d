"""Records logits of the small model as the PyTorch model computes them that trained it.

Run in an environment with PyTorch and this package (``make parity-data`` makes one), in fp32:

    PYTHONPATH=benchmarks python tests/data/make_small_model_logits.py

It rewrites tests/data/small_model_logits.json beside it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file

from fd_minicpm41 import small_model
from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.reference.tokenizer import Tokenizer
from fd_minicpm41.small_model.prose import examination_paragraphs
from fd_minicpm41.small_model.tasks import make_retrieval
from train_small.model import KINDS, SmallMiniCPM

OUT = Path(__file__).resolve().parent / "small_model_logits.json"
# Rows at the end of a prompt that are recorded, and how many of their best tokens.
ROWS, BEST = 16, 8
# A budget of 12 blocks, so that rows of a short prompt leave some out.
SPARSE = {"topk": 8, "dense_len": 512}
# Shorter than dense_len; and so long that rows leave blocks out.
LENGTHS = (300, 1400)


def main() -> None:
    """Writes the record."""
    folder = small_model.path()
    tokenizer = Tokenizer(folder)
    model = SmallMiniCPM(MiniCPMConfig.from_pretrained(folder))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: w.float() for name, w in weights.items()})
    assert model.config.sparse is not None
    model.use_sparse(replace(model.config.sparse, **SPARSE))
    cases = []
    for length in LENGTHS:
        made = make_retrieval(
            Random(length),
            examination_paragraphs(),
            lambda text: len(tokenizer.encode(text)) - 1,
            length,
            4,
            "held_out",
        )
        ids = tokenizer.encode_chat(made.messages(made.questions[1]), enable_thinking=False)
        for kind in KINDS:
            with torch.no_grad():
                logits = model(torch.tensor([ids]), kind)[0, -ROWS:]
            best = logits.topk(BEST)
            cases.append(
                {
                    "attention": kind,
                    "prompt_ids": ids,
                    "best_ids": best.indices.tolist(),
                    "best_logits": [[round(x, 5) for x in row] for row in best.values.tolist()],
                }
            )
    record = {
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "sparse": SPARSE,
        "cases": cases,
    }
    OUT.write_text(json.dumps(record) + "\n", "utf-8")


if __name__ == "__main__":
    main()
