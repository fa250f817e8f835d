"""``generate`` and ``chat``: the reference model on this machine, without FastDeploy."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from fd_minicpm41.cli.runtime import add_model_arguments, load, progress, read_prompt
from fd_minicpm41.errors import UsageError

if TYPE_CHECKING:
    from fd_minicpm41.reference.sampling import SamplingParams

# Tokens a conversation may have unless --context says otherwise: room in memory is taken at once.
CHAT_CONTEXT = 8192


def add_parser(commands: Any) -> None:
    """Adds both commands."""
    parser = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continues a prompt with a checkpoint's weights, in fp32 on this machine.",
    )
    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text, or - to read stdin")
    parser.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="at most (default: 128)"
    )
    _add_sampling_arguments(parser, "0, greedy")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.set_defaults(run=run_generate)

    parser = commands.add_parser(
        "chat",
        help="talk with the model",
        description="Talks with the model through the checkpoint's chat template. Ctrl-C stops an "
        "answer; /clear forgets the conversation; Ctrl-D or /exit ends.",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="an answer, at most (default: 1024)",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"tokens of the whole conversation (default: {CHAT_CONTEXT}, or what the model has)",
    )
    parser.add_argument(
        "--no-think", action="store_true", help="ask the template to switch thinking off"
    )
    _add_sampling_arguments(parser, "the checkpoint's generation_config.json")
    parser.set_defaults(run=run_chat)


def _add_sampling_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--temperature", type=float, help=f"0 is greedy (default: {default})")
    parser.add_argument("--top-p", type=float, metavar="P", help="nucleus sampling")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely")
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")


def _sampling(args: argparse.Namespace, base: SamplingParams) -> SamplingParams:
    from dataclasses import replace

    given = {n: getattr(args, n) for n in ("temperature", "top_p", "top_k", "seed")}
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def _check_count(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"{option} is {value}, wanted 1 or more: correct it")


def run_generate(args: argparse.Namespace) -> int:
    """Prints the continuation as it comes, or a JSON object with what was measured."""
    _check_count("--max-tokens", args.max_tokens)
    prompt = read_prompt(args.prompt)
    began = time.perf_counter()
    model = load(args)
    from fd_minicpm41.reference.sampling import CharacterStream, SamplingParams, generate
    from fd_minicpm41.reference.tokenizer import Tokenizer

    params = _sampling(args, SamplingParams())
    tokenizer = Tokenizer(args.model)
    prompt_ids = tokenizer.encode(prompt)
    most = model.config.max_context
    if len(prompt_ids) + args.max_tokens > most:
        raise UsageError(
            f"{len(prompt_ids)} tokens of prompt and --max-tokens {args.max_tokens} exceed the "
            f"context of {most}: shorten the prompt or lower --max-tokens"
            + ("" if args.rope_table else ", or give --rope-table 128k if the model is MiniCPM4.1")
        )
    cache = model.new_cache(len(prompt_ids) + args.max_tokens, args.attention)
    stream, text = CharacterStream(tokenizer.decode), ""
    token_ids: list[int] = []
    loaded = first = time.perf_counter()
    with progress(len(prompt_ids), "reading", "token") as bar:
        for token in generate(
            model, cache, prompt_ids, args.max_tokens, params, tokenizer.stop_ids, bar.update
        ):
            if not token_ids:
                first = time.perf_counter()
                bar.close()
            token_ids.append(token)
            piece = stream.push(token)
            text += piece
            if not args.json:
                print(piece, end="", flush=True)
    piece = stream.finish()
    text += piece
    ended = time.perf_counter()
    if not args.json:
        print(piece)
        return 0
    result = {
        "text": text,
        "token_ids": token_ids,
        "finish_reason": "length" if len(token_ids) == args.max_tokens else "stop",
        "prompt_tokens": len(prompt_ids),
        "completion_tokens": len(token_ids),
        "attention": args.attention,
        "blocks_attended": cache.blocks_attended,
        "blocks_present": cache.blocks_present,
        "seconds": {
            "load": round(loaded - began, 3),
            "first_token": round(first - loaded, 3),
            "rest": round(ended - first, 3),
        },
    }
    print(json.dumps(result, ensure_ascii=False))
    return 0


def run_chat(args: argparse.Namespace) -> int:
    """Reads lines, answers each; on a terminal with a prompt sign, in a pipe without."""
    _check_count("--max-tokens", args.max_tokens)
    _check_count("--context", args.context)
    model = load(args)
    from fd_minicpm41.reference.sampling import (
        CharacterStream,
        common_prefix,
        default_sampling,
        generate,
    )
    from fd_minicpm41.reference.tokenizer import Tokenizer

    tokenizer = Tokenizer(args.model)
    params = _sampling(args, default_sampling(args.model))
    tokenizer.render_chat([{"role": "user", "content": "Hello"}])  # a bad template fails at once
    context = args.context
    if context is None:
        context = min(CHAT_CONTEXT, model.config.max_context)
    cache = model.new_cache(context, args.attention)
    known: list[int] = []  # the tokens that the cache holds
    messages: list[dict[str, str]] = []
    while True:
        line = _read_line()
        if line is None or line == "/exit":
            return 0
        if line == "/clear":
            messages = []
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        prompt_ids = tokenizer.encode_chat(messages, False if args.no_think else None)
        room = context - len(prompt_ids)
        if room < 1:
            messages.pop()
            print(
                f"the conversation would have {len(prompt_ids)} tokens in a context of {context}: "
                "say it shorter, start anew with /clear, or give a larger --context",
                file=sys.stderr,
            )
            continue
        # The answer stands in the history as the template writes it: only what is alike is kept.
        kept = common_prefix(known, prompt_ids[:-1])
        cache.rewind(kept)
        stream, answer, known = CharacterStream(tokenizer.decode), "", prompt_ids
        try:
            with progress(len(prompt_ids) - kept, "reading", "token") as bar:
                for token in generate(
                    model,
                    cache,
                    prompt_ids[kept:],
                    min(args.max_tokens, room),
                    params,
                    tokenizer.stop_ids,
                    bar.update,
                ):
                    bar.close()
                    known = [*known, token]
                    piece = stream.push(token)
                    answer += piece
                    print(piece, end="", flush=True)
            piece = stream.finish()
            answer += piece
            print(piece)
        except KeyboardInterrupt:
            # An interrupt may fall in the middle of a forward pass: what it wrote is not counted.
            print(" [stopped]")
        known = known[: cache.length]
        messages.append({"role": "assistant", "content": answer})


def _read_line() -> str | None:
    """One line of the user's, or None at the end; Ctrl-C at the prompt ends too."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    line = sys.stdin.buffer.readline()
    if not line:
        return None
    try:
        return line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input is not UTF-8 ({error}): set the terminal to UTF-8"
        ) from None
