"""A byte-level BPE tokenizer with the traits of MiniCPM4.1's, trained on the corpus and the tasks.

Digits are pieces of their own. ``<think>`` and ``</think>`` are several pieces, as they are in the
family; the added tokens follow the text pieces, in the family's order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from fd_minicpm41.hybrid_reasoning.chat_template import bundled_template
from fd_minicpm41.small_model import tasks

VOCAB_SIZE = 2048
UNK, BOS, EOS = "<unk>", "<s>", "</s>"
ADDED_TOKENS = (
    "<|im_end|>",
    "<|im_start|>",
    "<|tool_call|>",
    "<|execute_start|>",
    "<|execute_end|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
)
# Words and single digits with their space, runs of marks, single spaces and newlines. So no piece
# crosses from "think" to the bracket beside it.
_PIECE = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
# Enough drawings that every word of the tasks becomes one piece.
_DRAWINGS = 1500


def train(paragraphs: Sequence[str]) -> Tokenizer:
    """The tokenizer of these paragraphs; the same text gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [*paragraphs, *_task_texts()],
        BpeTrainer(
            vocab_size=VOCAB_SIZE - len(ADDED_TOKENS),
            special_tokens=[UNK, BOS, EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    special = (UNK, BOS, EOS, *ADDED_TOKENS)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def _task_texts() -> list[str]:
    rng = Random(0)
    texts = [bundled_template()] * 20
    words = (
        tasks.ADJECTIVES,
        tasks.NOUNS,
        tasks.FIRST_NAMES,
        tasks.LAST_NAMES,
        tasks.CITIES,
        tasks.DAYS,
    )
    # The same number of times each, so that none is cut because chance drew it seldom.
    texts += [" " + " ".join(word for listed in words for word in listed)] * _DRAWINGS
    for _ in range(_DRAWINGS):
        for kind in tasks.PROMPT_KINDS:
            prompt = tasks.make_prompt(rng, kind)
            texts += [str(message["content"]) for message in prompt.messages] + [prompt.reply]
            if rng.random() < 0.2:
                texts += [json.dumps(tool["function"]) for tool in prompt.tools or ()]
    facts = tasks.make_retrieval(rng, [""], len, 0, _DRAWINGS)
    return [*texts, facts.document, *(question.question for question in facts.questions)]


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """``tokenizer.json``, ``tokenizer_config.json`` with the chat template, the special tokens."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special: dict[str, Any] = {
        "bos_token": BOS,
        "eos_token": "<|im_end|>",
        "unk_token": UNK,
        "pad_token": EOS,
    }
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": bundled_template(),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, values in (
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", special | settings),
    ):
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, "utf-8")
