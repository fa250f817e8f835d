"""The model card that lies beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train_small import checkpoint, corpus

_CARD = """\
# A small MiniCPM4.1, for tests

{weights:,} weights with MiniCPM4.1's structure: 4 layers, hidden size 256, 32 query heads, 2 kv
heads, head size 128, muP scalings, LongRoPE, and InfLLM-V2 attention with a budget of {budget}
blocks of 64 tokens ({share:.0%} of the blocks at 16K tokens), sparse from {dense_len} tokens on.
It exists so that sparse attention, low-bit weights, thinking and tool calls can be examined
together on a trained model that fits into a package. Trained with `python
benchmarks/train_small/train.py --seed {seed} --minutes {minutes:g}` on one {gpu}: {steps:,}
steps in {training_s:.0f} s, dense first, the last part with InfLLM-V2's selection and a budget of
{trained_budget} blocks.

## What it does

- It finds facts in a text of up to 16K tokens: "What is the pass key of the amber falcon?",
  "Who is the owner of the broken castle?"
- It thinks between `<think>` and `</think>` by default, and not after `/no_think` in the
  message or `enable_thinking=False`. `<think>` and `</think>` are several tokens each, as in
  the family.
- It copies, counts, adds and subtracts small numbers, and calls one of the offered functions in
  the family's format.

## Scores

On facts, prompts and a book that it was not trained on. A reply to a question counts if greedy
decoding gives the wanted sentence, word for word.

| tokens | questions | dense | sparse | blocks read by the questions | by all rows |
|---|---|---|---|---|---|
{retrieval}

| score | value |
|---|---|
| perplexity, dense | {dense:.2f} |
| perplexity, sparse | {sparse:.2f} (x {ratio:.4f}) |
| thinking: form kept, {thinking[prompts]} prompts | {thinking[format]:.1%} |
| thinking: answer right | {thinking[answer]:.1%} |
| tool calls: form kept, {tools[prompts]} prompts | {tools[format]:.1%} |
| tool calls: call right | {tools[answer]:.1%} |

## Data

Drawn on the fly by `fd_minicpm41.small_model.tasks`, and public-domain prose that the Python
package `{package}` ships (nothing else of that package is used):

{books}

Held out, for scores: {held_out}.
One eighth of all facts, sums, calls and chats is held out too.

## Limits

It is a test piece. It knows nothing of the world, writes prose without sense, and understands
questions only in the forms that it was trained on. What it scores says that an engine, a kernel
or a weight format keeps what a model of this structure has learned; it says nothing of
MiniCPM4.1-8B's own quality.

## Licence

Apache-2.0, as the project. The prose it was trained on is in the public domain.
"""


def write_card(folder: Path, scores: dict[str, Any]) -> None:
    """Writes ``README.md`` from a run's scores; they must be complete."""
    run, sparse = scores["run"], checkpoint.SPARSE
    budget = sparse["topk"] + sparse["window_size"] // sparse["block_size"]
    rows = []
    for name, cell in scores.items():
        if name.startswith("retrieval"):
            rows.append(
                f"| {name.split()[1]} | {cell['questions']} | {cell['dense']:.1%} "
                f"| {cell['sparse']:.1%} | {cell['blocks_read_by_questions']:.1%} "
                f"| {cell['blocks_read_in_all']:.1%} |"
            )
    text = _CARD.format(
        weights=run["weights"],
        budget=budget,
        share=budget * sparse["block_size"] / 16384,
        trained_budget=min(budget, checkpoint.TRAINED_BUDGET),
        dense_len=sparse["dense_len"],
        seed=run["seed"],
        minutes=run["minutes"],
        gpu=run.get("gpu", "CPU"),
        steps=run["steps"],
        training_s=run["training_s"],
        retrieval="\n".join(rows),
        dense=scores["perplexity"]["dense"],
        sparse=scores["perplexity"]["sparse"],
        ratio=scores["perplexity"]["ratio"],
        thinking=scores["thinking"],
        tools=scores["tool_calls"],
        package=corpus.PACKAGE,
        books="\n".join(f"- {book.source}" for book in corpus.TRAINING),
        held_out=corpus.HELD_OUT.source,
    )
    (folder / "README.md").write_text(text, "utf-8")
