"""A prompt to time prefill on whose q, k and v are a trained model's: the small model's over prose.

The prompt is the part of a book that the model was not trained on and that its scores are taken on.
Each layer is a prompt of its own. It was trained on up to 16K tokens and has positions for 32K.

``python benchmarks/small_model_prompt.py`` counts, in plain PyTorch on any machine, the blocks that
neighbouring tokens list together, and writes benchmarks/results/small_model_unions.json.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

import measure  # noqa: E402
from fd_minicpm41.config import MiniCPMConfig, SparseConfig  # noqa: E402
from fd_minicpm41.reference.tokenizer import Tokenizer  # noqa: E402
from fd_minicpm41.small_model.examination import make_windows  # noqa: E402
from fd_minicpm41.small_model.prose import examination_paragraphs  # noqa: E402
from train_small.model import (  # noqa: E402
    Attention,
    Pass,
    SmallMiniCPM,
    choose_blocks,
    compress_keys,
    score_blocks,
)
from workload import BLOCK_SIZE, MEASURED_UNIONS, Pages, run_starts  # noqa: E402

# q ``[length, Q_HEADS, HEAD_DIM]`` and k, v ``[length, KV_HEADS, HEAD_DIM]``, bfloat16, q and k
# rotated.
Activations = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def activations(folder: Path, length: int, device: str) -> list[Activations]:
    """What the attention of each layer is given over the first ``length`` tokens of the prose,
    attention dense, in the mixed precision of training.

    Raises:
        UsageError: less prose than that.
    """
    config = MiniCPMConfig.from_pretrained(folder)
    model = SmallMiniCPM(config)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    (ids,) = make_windows(Tokenizer(folder), examination_paragraphs(), length, 1)
    found: list[Activations] = []

    class Watched(Attention):
        def attend_whole(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Pass
        ) -> torch.Tensor:
            found.append((q[0], k[0], v[0]))
            return super().attend_whole(q, k, v, step)

    for layer in model.model.layers:
        layer.self_attn.__class__ = Watched
    positions = torch.arange(length, device=device)[None]
    model.to(device)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        model.hidden(torch.tensor(ids, device=device)[None], Pass(positions))
    return found


class LayerPrompt(Pages):
    """One layer's activations in scrambled pages, as :class:`workload.Prompt` has drawn ones."""

    def __init__(self, layer: Activations) -> None:
        q, k, v = (part.to(torch.bfloat16) for part in layer)
        super().__init__(len(q))
        self.q = q.contiguous()
        for cache, part in ((self.k_cache, k), (self.v_cache, v)):
            padded = torch.zeros(len(cache) * BLOCK_SIZE, *part.shape[1:], dtype=part.dtype)
            padded = padded.to(part.device)
            padded[: len(part)] = part
            blocks = padded.unflatten(0, (-1, BLOCK_SIZE)).transpose(1, 2)
            cache[self.block_tables[0].long()] = blocks


def union_sizes(layer: Activations, sparse: SparseConfig) -> dict[int, float]:
    """``workload.union_sizes`` of the lists that ``sparse`` gives, without the ops."""
    q, k, _ = layer
    run = max(MEASURED_UNIONS)
    k1, k2 = compress_keys(k[None], sparse)
    parts = []
    for start in run_starts(len(q), 128, str(q.device)).tolist():
        positions = torch.arange(start, start + run, device=q.device)[None]
        rows = q[None, start : start + run]
        scores = score_blocks(rows, k1, k2, sparse, positions, -(-len(q) // BLOCK_SIZE))
        parts.append(choose_blocks(scores, positions, sparse)[0])
    chosen = torch.stack(parts, 1)  # [kv heads, runs, rows of a run, blocks]
    return {
        count: chosen.unflatten(2, (-1, count)).any(3).sum(-1).float().mean().item()
        for count in MEASURED_UNIONS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    folder = ROOT / "src/fd_minicpm41/small_model/checkpoint"
    parser.add_argument("--model", type=Path, default=folder, metavar="DIR")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384])
    out = ROOT / "benchmarks/results/small_model_unions.json"
    parser.add_argument("--out", type=Path, default=out, help="write the rows here as JSON")
    args = parser.parse_args()
    own = MiniCPMConfig.from_pretrained(args.model).sparse
    assert own is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "what": "distinct blocks that neighbouring tokens list together, small model over prose, "
        "rows past the middle, mean over both kv heads",
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "device": device,
        "rows": [],
    }
    for length in args.lengths:
        for number, layer in enumerate(activations(args.model, length, device)):
            for sparse in (SparseConfig(), own):
                sizes = {str(n): size for n, size in union_sizes(layer, sparse).items()}
                row = {"length": length, "layer": number, "budget": sparse.budget}
                result["rows"].append(measure.rounded(row | {"unions": sizes}))
                words = " ".join(f"{size:.0f}" for size in sizes.values())
                print(f"{length}, layer {number}, {sparse.budget} blocks each: {words}", flush=True)
        measure.write_json(args.out, result)


if __name__ == "__main__":
    main()
