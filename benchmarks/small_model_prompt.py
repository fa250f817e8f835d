"""A prompt to time prefill on whose q, k and v are a trained model's: the small model's over prose.

The prompt is the part of a book that the model was not trained on and that its scores are taken on.
Each layer is a prompt of its own. It was trained on up to 16K tokens and has positions for 32K.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from fd_minicpm41.config import MiniCPMConfig
from fd_minicpm41.reference.tokenizer import Tokenizer
from fd_minicpm41.small_model.examination import make_windows
from fd_minicpm41.small_model.prose import examination_paragraphs
from train_small.model import Attention, Pass, SmallMiniCPM
from workload import BLOCK_SIZE, Pages

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
