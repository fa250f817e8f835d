"""Scores of a trained model on held-out facts, prose and chats, dense and sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fd_minicpm41.small_model import tasks
from fd_minicpm41.small_model.tasks import Retrieval
from train_small.data import Writer
from train_small.model import KINDS, ROWS, AttentionKind, Cache, Pass, SmallMiniCPM

# Facts in a document of each length.
FACTS = {1024: 8, 2048: 16, 4096: 16, 8192: 16, 16384: 16}
# What a question and its reply add to a document.
SUFFIX_TOKENS = 72
CHAT_KINDS = tuple(kind for kind in tasks.PROMPT_KINDS if kind != "tool_call")


def evaluate(
    model: SmallMiniCPM,
    writer: Writer,
    questions: int,
    prompts: int,
    lengths: Sequence[int],
    max_tokens: int,
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The examinations by name, so that what one finds can be kept before the next begins.

    The writer's paragraphs are held-out prose; so are facts and prompts.

    Args:
        questions: at least so many of each length.
        prompts: of each format.
        max_tokens: of a reply to a prompt.
    """
    yield "thinking", partial(chats, model, writer, CHAT_KINDS, prompts, max_tokens)
    yield "tool_calls", partial(chats, model, writer, ("tool_call",), prompts, max_tokens)
    yield "perplexity", partial(perplexity, model, writer, max(lengths))
    for length in lengths:
        yield f"retrieval {length}", partial(retrieval, model, writer, length, questions)


def retrieval(model: SmallMiniCPM, writer: Writer, length: int, questions: int) -> dict[str, Any]:
    """Share of questions whose greedy reply is the wanted sentence, word for word.

    Each document is read once; every question then goes on from there. A reply is greedy's exactly
    if each of its tokens is the best one after those before it, so one pass over it is enough.
    """
    rng = Random(f"retrieval/{length}")
    facts = FACTS.get(length, 4)
    documents = [
        writer.retrieval(rng, length - SUFFIX_TOKENS, facts, "held_out")
        for _ in range(-(-questions // facts))
    ]
    rows = [_encode(writer, document) for document in documents]
    result: dict[str, Any] = {"questions": facts * len(documents)}
    for kind in KINDS:
        right = 0
        by_depth = [[0, 0] for _ in range(8)]
        reads = torch.zeros(2, dtype=torch.int64, device=model.lm_head.weight.device)
        reads_all = reads.clone()
        for document, row in zip(documents, rows, strict=True):
            outcomes = ask(model, row, kind, reads, reads_all)
            right += sum(outcomes)
            for question, outcome in zip(document.questions, outcomes, strict=True):
                cell = by_depth[min(7, int(question.depth * 8))]
                cell[0] += outcome
                cell[1] += 1
        result[kind] = right / result["questions"]
        result[f"{kind}_by_depth"] = [round(a / b, 4) if b else None for a, b in by_depth]
        if kind == "sparse":
            result["blocks_read_by_questions"] = _share(reads)
            result["blocks_read_in_all"] = _share(reads_all + reads)
    return result


def _share(reads: Tensor) -> float:
    attended, present = reads.tolist()
    return attended / present if present else 1.0


@dataclass(frozen=True)
class _Asked:
    """Token ids of a document's prompts: what they share, and for each question the rest.

    ``tails`` holds the rest of a prompt with the wanted reply, and the length of the reply.
    """

    head: list[int]
    tails: list[tuple[list[int], int]]


def _encode(writer: Writer, document: Retrieval) -> _Asked:
    head: list[int] = []
    tails = []
    for question in document.questions:
        text = writer.chat.render_chat(document.messages(question), enable_thinking=False)
        # No piece crosses the newlines that follow the document.
        cut = text.index(document.document) + len(document.document)
        head = head or [writer.bos, *writer.encode(text[:cut])]
        reply = writer.encode(question.reply + "<|im_end|>")
        tails.append((writer.encode(text[cut:]) + reply, len(reply)))
    return _Asked(head, tails)


def ask(
    model: SmallMiniCPM,
    asked: _Asked,
    kind: AttentionKind,
    reads: Tensor,
    reads_all: Tensor,
    at_once: int = 8,
) -> list[bool]:
    """Whether each question about a document is answered with its very sentence."""
    device = model.lm_head.weight.device
    shared = len(asked.head)
    padded = -(-shared // ROWS) * ROWS
    head = torch.tensor([asked.head + [0] * (padded - shared)], device=device)
    places = torch.arange(padded, device=device)[None]
    step = Pass(places, kind, kept=[], reads=reads_all)
    model.hidden(head, step)
    assert step.kept is not None

    outcomes: list[bool] = []
    for start in range(0, len(asked.tails), at_once):
        part = asked.tails[start : start + at_once]
        longest = max(len(ids) for ids, _ in part)
        ids = torch.zeros(len(part), longest, dtype=torch.int64)
        weight = torch.zeros(len(part), longest - 1, dtype=torch.bool)
        for i, (row, reply) in enumerate(part):
            ids[i, : len(row)] = torch.tensor(row)
            weight[i, len(row) - reply - 1 : len(row) - 1] = True
        ids, weight = ids.to(device), weight.to(device)
        caches = []
        for k, v in step.kept:
            room = (0, 0, 0, 0, 0, max(0, shared + longest - padded))
            wide = [F.pad(t.expand(len(part), -1, -1, -1), room).clone() for t in (k, v)]
            lengths = torch.full((len(part),), shared, device=device)
            caches.append(Cache(wide[0], wide[1], lengths))
        positions = shared + torch.arange(longest, device=device).expand(len(part), -1)
        hidden = model.hidden(ids, Pass(positions, kind, caches=caches, reads=reads))
        best = model.lm_head(hidden[:, :-1]).argmax(-1)
        wrong = ((best != ids[:, 1:]) & weight).any(1)
        outcomes += (~wrong).tolist()
    return outcomes


def perplexity(model: SmallMiniCPM, writer: Writer, length: int, most: int = 4) -> dict[str, Any]:
    """Of the held-out book, read in at most ``most`` windows of ``length`` tokens."""
    device = model.lm_head.weight.device
    ids = [i for paragraph in writer.paragraphs for i in writer.encode(paragraph + "\n")]
    starts = range(0, len(ids) - length, length - 1)
    windows = [[writer.bos, *ids[at : at + length - 1]] for at in starts][:most]
    result: dict[str, Any] = {"tokens": len(windows) * (length - 1)}
    for kind in KINDS:
        total = torch.zeros((), dtype=torch.float64, device=device)
        for window in windows:
            row = torch.tensor([window], device=device)
            places = torch.arange(length, device=device)[None]
            hidden = model.hidden(row, Pass(places, kind))
            for at in range(0, length - 1, 4096):
                part = slice(at, min(at + 4096, length - 1))
                logits = model.lm_head(hidden[0, part]).float()
                target = row[0, part.start + 1 : part.stop + 1]
                total += F.cross_entropy(logits, target, reduction="sum")
        result[kind] = math.exp(total.item() / result["tokens"])
    result["ratio"] = result["sparse"] / result["dense"]
    return result


def chats(
    model: SmallMiniCPM,
    writer: Writer,
    kinds: tuple[tasks.PromptKind, ...],
    count: int,
    max_tokens: int,
    at_once: int = 250,
) -> dict[str, Any]:
    """Format obedience and right answers of greedy replies to held-out prompts."""
    rng = Random(f"chats/{kinds}")
    prompts = [tasks.make_prompt(rng, kinds[i % len(kinds)], "held_out") for i in range(count)]
    replies: list[str] = []
    for start in range(0, count, at_once):
        part = prompts[start : start + at_once]
        encoded = [writer.chat.encode_chat(p.messages, p.enable_thinking, p.tools) for p in part]
        replies += [writer.chat.decode(ids) for ids in generate(model, encoded, max_tokens)]
    verdicts = [p.check(reply) for p, reply in zip(prompts, replies, strict=True)]
    result: dict[str, Any] = {
        "prompts": count,
        "format": sum(v.format_ok for v in verdicts) / count,
        "answer": sum(v.answer_ok for v in verdicts) / count,
    }
    for kind in kinds if len(kinds) > 1 else ():
        of_kind = [v for p, v in zip(prompts, verdicts, strict=True) if p.kind == kind]
        result[f"{kind}_answer"] = round(sum(v.answer_ok for v in of_kind) / len(of_kind), 4)
    result["failures"] = [
        {"prompt": p.messages[-1]["content"], "wanted": p.reply, "got": reply[:300]}
        for p, reply, v in zip(prompts, replies, verdicts, strict=True)
        if not v.format_ok
    ][:5]
    return result


def generate(model: SmallMiniCPM, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy replies to short prompts, all at once, dense."""
    device = model.lm_head.weight.device
    batch, longest = len(prompts), max(map(len, prompts))
    stops = torch.tensor(model.config.eos_token_ids, device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)
    places = torch.arange(longest, device=device).expand(batch, -1)
    step = Pass(places, kept=[])
    hidden = model.hidden(ids, step)
    assert step.kept is not None
    room = (0, 0, 0, 0, 0, max_tokens)
    caches = [Cache(F.pad(k, room), F.pad(v, room), lengths.clone()) for k, v in step.kept]
    last = hidden[torch.arange(batch, device=device), lengths - 1]
    token = model.lm_head(last).argmax(-1)
    done = torch.isin(token, stops)
    replies = [token]
    for i in range(max_tokens - 1):
        positions = caches[0].lengths[:, None].clone()
        hidden = model.hidden(token[:, None], Pass(positions, caches=caches))
        token = model.lm_head(hidden[:, 0]).argmax(-1)
        replies.append(token)
        done |= torch.isin(token, stops)
        if i % 8 == 7 and bool(done.all()):
            break
    ends = set(model.config.eos_token_ids)
    texts = []
    for row in torch.stack(replies, 1).tolist():
        stop = next((i for i, t in enumerate(row) if t in ends), len(row))
        texts.append(row[:stop])
    return texts


def meets_bars(scores: dict[str, Any]) -> dict[str, bool]:
    """The bars that the checkpoint is held to; what was not measured is not met."""
    cells = {int(name.split()[1]): cell for name, cell in scores.items() if "retrieval" in name}
    measured = bool(cells) and not any("error" in score for score in scores.values())
    if not measured:
        return {"every examination done": False}
    return {
        "dense retrieval at least 99 % at every length": all(
            cell["dense"] >= 0.99 for cell in cells.values()
        ),
        "sparse retrieval within 1 point of dense": all(
            cell["sparse"] >= cell["dense"] - 0.01 for cell in cells.values()
        ),
        "at most a quarter of the blocks read by questions at the greatest length": (
            cells[max(cells)]["blocks_read_by_questions"] <= 0.25
        ),
        "perplexity sparse over dense at most 1.02": scores["perplexity"]["ratio"] <= 1.02,
        "thinking format at least 98 %": scores["thinking"]["format"] >= 0.98,
        "tool format at least 95 %": scores["tool_calls"]["format"] >= 0.95,
    }
