"""The thinking budget on real Paddle tensors, for tokenizers that cut the markers differently."""

from __future__ import annotations

import random
import sys
import time
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from checkpoints import tiny_tokenizer, write_tiny_checkpoint
from fd_minicpm41.errors import UsageError
from fd_minicpm41.hybrid_reasoning import HybridReasoningMode, ReplySplitter
from fd_minicpm41.hybrid_reasoning.automaton import TokenTexts, build_tables
from fd_minicpm41.hybrid_reasoning.mode import BUDGET_VARIABLE, MAX_BUDGET, SENTENCE_VARIABLE
from fd_minicpm41.hybrid_reasoning.thinking_budget import ThinkingBudget

MODE = HybridReasoningMode()


def sentencepiece_like() -> Tokenizer:
    """Pieces with a marked space, bytes as <0x0A>, and markers cut through their neighbours."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    pieces += [chr(i) for i in range(33, 127)]
    pieces += [
        "▁",
        "▁a",
        "a</",
        "></",
        "nk>",
        "thi",
        "think",
        ".</th",
        ">b",
        "</",
        "▁<",
        "<th",
        "ink",
        "h",
        "in",
    ]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("<", "/"), ("▁", "a"), ("▁", "<"), ("i", "n")]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def single_tokens() -> Tokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    return tokenizer


TOKENIZERS = {
    "several pieces": tiny_tokenizer,
    "sentencepiece": sentencepiece_like,
    "single": single_tokens,
}


def token_texts(tokenizer: Tokenizer) -> TokenTexts:
    return TokenTexts(
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        size=tokenizer.get_vocab_size(),
    )


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def texts(request):
    return token_texts(TOKENIZERS[request.param]())


@pytest.fixture(scope="module")
def tables(texts):
    return build_tables(texts, len(texts.texts) + 3, MODE)


def random_tokens(rng, texts, length):
    """Tokens whose texts crowd around the markers, cut every way the vocabulary allows."""
    near = [
        i for i, t in enumerate(texts.texts) if t and all(c in "<|/>think_oughsarde \n" for c in t)
    ]
    return [
        rng.choice(near) if rng.random() < 0.9 else rng.randrange(len(texts.texts))
        for _ in range(length)
    ]


def cut_at_random(rng, texts, text):
    """Tokens that add ``text``, each chosen at random among those that fit."""
    tokens = []
    while text:
        fitting = [i for i, t in enumerate(texts.texts) if t and text.startswith(t)]
        tokens.append(rng.choice(fitting))
        text = text[len(texts.texts[tokens[-1]]) :]
    return tokens


def test_automaton_agrees_with_the_splitter(texts, tables):
    rng = random.Random(3)
    parts = [
        "<think>",
        "</think>",
        "</thi",
        "<",
        "\n",
        " ",
        "a",
        "think",
        "<|thought_start|>",
        "<|thought_end|>",
        "/",
    ]
    for _ in range(1500):
        start = rng.choice(["auto", "open", "off"])
        if rng.random() < 0.5:
            tokens = random_tokens(rng, texts, 12)
        else:
            tokens = cut_at_random(rng, texts, "".join(rng.choices(parts, k=6)))
        splitter = ReplySplitter(MODE, start=start)
        position, left = tables.start(start, MAX_BUDGET)
        for token in tokens:
            was_thinking = splitter.where == "think"
            splitter.feed(texts.texts[token])
            position, after = tables.advance(position, left, [token])
            # A token counts if the reply was thinking when it came.
            assert left - after == was_thinking
            left = after
            thinking = tables.advance(position, left, [tokens[0]])[1] < left
            assert thinking == (splitter.where == "think")


@pytest.mark.parametrize("start", ["auto", "open"])
@pytest.mark.parametrize("budget", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("sentence", ["", "Time is up, so I answer now."])
def test_forced_ending_closes_thinking_wherever_it_stands(texts, start, budget, sentence):
    mode = HybridReasoningMode(closing_sentence=sentence)
    tables = build_tables(texts, len(texts.texts), mode)
    rng = random.Random(budget)
    for _ in range(60):
        opening = "" if start == "open" else rng.choice(["<think>", " <think>\n"])
        thought = (
            opening + "a <b> </" * budget + rng.choice(["a", "\n", "</", "</thin", " <"]) + "a"
        )
        queue = cut_at_random(rng, texts, thought)
        splitter = ReplySplitter(mode, start=start)
        position, left = tables.start(start, budget)
        free, spent = "", 0
        while (token := int(tables.forced[position])) < 0:
            token = queue.pop(0)
            spent += splitter.where == "think"
            free += texts.texts[token]
            splitter.feed(texts.texts[token])
            position, left = tables.advance(position, left, [token])
        assert spent == budget and splitter.where == "think"
        ending = ""
        while (token := int(tables.forced[position])) >= 0:
            ending += texts.texts[token]
            position, left = tables.advance(position, left, [token])
        said = free if start == "open" else free.partition("<think>")[2]
        # The opened prompt ends with a newline, a marker does not.
        new_line = said.endswith("\n") or (not said and start == "open")
        begun = max(k for k in range(8) if said.endswith("</think>"[:k]))
        expected = "</think>\n"[begun:]
        if not begun:
            expected = ("" if new_line else "\n") + (sentence and sentence + "\n") + expected
        assert ending == expected
        splitter.feed(ending)
        assert splitter.where == "head"


def test_ending_is_cut_as_the_tokenizer_cuts_it():
    tokenizer = tiny_tokenizer()
    texts = token_texts(tokenizer)
    tables = build_tables(texts, len(texts.texts), MODE)

    def ending(said):
        position, left = tables.advance(*tables.start("open", len(said)), said)
        tokens = []
        while (token := int(tables.forced[position])) >= 0:
            tokens.append(token)
            position, left = tables.advance(position, left, [token])
        return tokens

    natural = tokenizer.encode("a\n</think>\n", add_special_tokens=False).ids
    said = tokenizer.encode("a", add_special_tokens=False).ids
    # After a letter the newline is part of the ending, and the tokenizer joins it to the bracket.
    assert said + ending(said) == natural
    assert texts.texts[natural[1]] == "\n<"
    # After a newline of its own the bracket stands alone; what was begun is only finished.
    newline = texts.texts.index("\n")
    assert "".join(texts.texts[t] for t in ending([newline])) == "</think>\n"
    begun = tokenizer.encode("</th", add_special_tokens=False).ids
    assert "".join(texts.texts[t] for t in ending(begun)) == "ink>\n"


def test_unwritable_sentence_is_told():
    with pytest.raises(UsageError, match="cannot write"):
        TokenTexts(lambda ids: "x" * len(ids), lambda text: [0], 1).pieces("y", ("a",))


class Server:
    """The host's side of a step: slots, tensors, greedy sampling; a model that says a script."""

    def __init__(self, folder, num_slots):
        config = SimpleNamespace(model=str(folder), vocab_size=300)
        self.processor = ThinkingBudget(SimpleNamespace(model_config=config))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.scripts = [None] * num_slots
        self.said = [[] for _ in range(num_slots)]
        self.inputs = {
            "logits_processors_args": [{} for _ in range(num_slots)],
            "seq_lens_this_time_buffer": paddle.zeros([num_slots], "int32"),
            "seq_lens_encoder": paddle.zeros([num_slots], "int32"),
            "next_tokens": paddle.full([num_slots, 1], -1, "int64"),
        }

    def insert(self, slot, script, generated=(), encode=5, **args):
        """A prefill of a request whose model would say ``script`` if it were let."""
        args = {"thinking_start": "open"} | args
        if generated:
            args["generated_token_ids"] = list(generated)
        self.inputs["logits_processors_args"][slot] = args
        self.scripts[slot], self.said[slot] = script, list(generated)
        self.inputs["seq_lens_this_time_buffer"][slot] = encode
        self.inputs["seq_lens_encoder"][slot] = encode

    def remove(self, slot):
        self.scripts[slot] = None
        self.inputs["seq_lens_this_time_buffer"][slot] = 0
        self.inputs["seq_lens_encoder"][slot] = 0

    def step(self, chunked=(), waiting=()):
        """One step; ``chunked`` slots are amid a prefill, ``waiting`` ones have no page."""
        for slot in waiting:
            self.inputs["seq_lens_this_time_buffer"][slot] = 0
        self.processor.update_state(self.inputs)
        running = [
            s for s, script in enumerate(self.scripts) if script is not None and s not in waiting
        ]
        rows = max(running) + 1
        logits = np.random.default_rng(0).standard_normal((rows, 300)).astype(np.float32)
        for slot in running:
            logits[slot, self.scripts[slot](self.said[slot])] = 50.0
        tokens = self.processor.apply(paddle.to_tensor(logits)).numpy().argmax(-1)
        for slot in running:
            if slot in chunked:
                continue
            self.said[slot].append(int(tokens[slot]))
            self.inputs["next_tokens"][slot, 0] = int(tokens[slot])
            self.inputs["seq_lens_this_time_buffer"][slot] = 1
            self.inputs["seq_lens_encoder"][slot] = 0
        for slot in waiting:
            self.inputs["seq_lens_this_time_buffer"][slot] = 1

    def text(self, slot):
        return self.tokenizer.decode(self.said[slot], skip_special_tokens=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), num_layers=1)


def says(folder, text):
    """A model that writes ``text``, one character a token, wherever forced tokens have put it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [i for char in text for i in tokenizer.encode(char, add_special_tokens=False).ids]
    return lambda said: ids[min(len(said), len(ids) - 1)]


def test_sixteen_budgets_at_once(folder):
    server = Server(folder, 16)
    budgets = [0, 1, 7, 64, None] * 3 + [3]
    for slot, budget in enumerate(budgets):
        args = {} if budget is None else {"thinking_budget": budget}
        server.insert(slot, says(folder, "z" * 100 + "</think>" + "y" * 100), **args)
    for _ in range(130):
        server.step()
    for slot, budget in enumerate(budgets):
        expected = "z" * 100 if budget is None else "z" * budget + "\n"
        if budget == 0:
            # Thinking was opened with a newline, none is added.
            expected = ""
        delta = ReplySplitter(MODE, start="open").feed(server.text(slot), finished=True)
        assert delta.reasoning == expected
        assert delta.content.startswith("y" if budget is None else "\nz")


def test_opening_by_the_model_is_not_counted_and_no_thinking_is_left_alone(folder):
    server = Server(folder, 3)
    script = says(folder, "<think>\n" + "z" * 40)
    server.insert(0, script, thinking_start="auto", thinking_budget=3)
    server.insert(
        1, says(folder, "An answer with <think> in it."), thinking_start="auto", thinking_budget=0
    )
    server.insert(2, script, thinking_start="off", thinking_budget=0)
    for _ in range(29):
        server.step()
    # The newline after the marker is the first of the three.
    assert server.text(0).startswith("<think>\nzz\n</think>\nz")
    assert server.text(1).startswith("An answer with <think> in it.")
    assert server.text(2).startswith("<think>\nzzzzz")


def test_natural_end_in_time_is_never_touched(folder):
    server = Server(folder, 1)
    server.insert(0, says(folder, "zz</think>" + "y" * 40), thinking_budget=10)
    for _ in range(30):
        server.step()
    assert server.text(0) == "zz</think>" + "y" * 20


def test_second_block_after_a_used_budget_is_ended_at_once(folder):
    server = Server(folder, 1)
    server.insert(0, says(folder, "zz</think>\n<think>" + "z" * 40), thinking_budget=12)
    for _ in range(40):
        server.step()
    assert server.text(0).startswith("zz</think>\n<think>zz\n</think>\nz")


def test_preempted_waiting_chunked_and_reused_slots(folder):
    """A request gets the same text whatever happens to it and its slot."""
    script = says(folder, "z" * 200)
    plain = Server(folder, 4)
    plain.insert(0, script, thinking_budget=20)
    for _ in range(40):
        plain.step()
    for preempt_after in (1, 5, 19, 20, 21, 23, 35):
        server = Server(folder, 4)
        # Another request has used its budget up in the slot that ours will move to.
        server.insert(2, script, thinking_budget=0)
        server.insert(1, script, thinking_budget=20, encode=64)
        server.step(chunked=[1])
        server.insert(1, script, thinking_budget=20, encode=7)
        for i in range(preempt_after):
            server.step(waiting=[1] if i == 3 else [])
            if i == 3:
                server.step()
        said = server.said[1]
        server.remove(1)
        server.step()
        server.remove(2)
        # A token that the host threw away must not count.
        server.inputs["next_tokens"][2, 0] = 9
        server.insert(2, script, generated=said, thinking_budget=20, encode=64)
        server.step(chunked=[2])
        server.insert(2, script, generated=said, thinking_budget=20)
        while len(server.said[2]) < 40:
            server.step()
        assert server.text(2) == plain.text(0)


def test_slot_without_a_budget_after_one_with_none_left(folder):
    server = Server(folder, 2)
    server.insert(0, says(folder, "z" * 99), thinking_budget=0)
    for _ in range(3):
        server.step()
    server.remove(0)
    server.insert(0, says(folder, "z" * 99))
    server.step()
    server.insert(1, says(folder, "z" * 99), thinking_budget=2)
    for _ in range(20):
        server.step()
    assert server.text(0) == "z" * 21
    assert server.text(1).startswith("zz\n</think>\nz")


def test_other_penalties_cannot_undo_a_forced_token(folder):
    server = Server(folder, 1)
    server.insert(0, says(folder, "z"), thinking_budget=0)
    server.processor.update_state(server.inputs)
    logits = paddle.full([1, 300], -5.0)
    logits[0, 7] = 80.0
    out = server.processor.apply(logits).astype("float32")
    forced = int(out.argmax())
    probabilities = paddle.nn.functional.softmax((out / 2.0 - 100.0) / 5.0)
    assert float(probabilities[0, forced]) == 1.0
    assert server.tokenizer.decode([forced]) == "</"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_of_any_type_are_changed_in_place(folder, dtype):
    server = Server(folder, 2)
    server.insert(0, says(folder, "z"), thinking_budget=0)
    server.processor.update_state(server.inputs)
    logits = paddle.ones([2, 300]).astype(dtype)
    out = server.processor.apply(logits)
    values = out.astype("float32").numpy()
    assert (values[0] > 1e4).sum() == 1 and (values[1] == 1).all()
    assert (logits.astype("float32").numpy() == values).all()


def test_reordered_slots_are_refused(folder):
    server = Server(folder, 1)
    server.insert(0, says(folder, "z"), thinking_budget=0)

    class Reordered(dict):
        enable_pd_reorder = True

    with pytest.raises(UsageError, match="FD_PD_REORDER"):
        server.processor.update_state(Reordered(server.inputs))


def test_a_step_never_waits_for_the_device(folder, monkeypatch):
    """Whatever would copy a tensor to the host is forbidden while two requests are decoded."""
    server = Server(folder, 4)
    server.insert(0, says(folder, "z" * 9), thinking_budget=3)
    server.insert(2, says(folder, "z" * 9), thinking_budget=3)
    server.step()
    logits = paddle.randn([3, 300])

    def refuse(*args, **kwargs):
        raise AssertionError("copied to the host")

    for name in ("numpy", "item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(paddle.Tensor, name, refuse)
    for _ in range(5):
        server.processor.update_state(server.inputs)
        server.processor.apply(logits)


@pytest.mark.parametrize("value", [-1, 1.5, "7", True, [1]])
def test_bad_budgets_are_told(value):
    with pytest.raises(UsageError, match="whole number of tokens"):
        HybridReasoningMode(budget=value)


def test_mode_from_the_environment():
    assert HybridReasoningMode.from_environment({}) == HybridReasoningMode()
    mode = HybridReasoningMode.from_environment({BUDGET_VARIABLE: "512", SENTENCE_VARIABLE: "So."})
    assert (mode.budget, mode.closing_sentence) == (512, "So.")
    for bad in ("-1", "many", "1.5"):
        with pytest.raises(UsageError, match=BUDGET_VARIABLE):
            HybridReasoningMode.from_environment({BUDGET_VARIABLE: bad})
    with pytest.raises(UsageError, match="end marker"):
        HybridReasoningMode(closing_sentence="So.</think>")


def test_step_at_batch_64_stays_under_50_microseconds(folder):
    """The whole of both calls, eager Paddle included; in time of this thread, which a busy machine
    does not stretch."""
    if sys.gettrace() is not None:
        pytest.skip("a tracer, as of coverage, slows every line: the time would be its own")
    config = SimpleNamespace(model=str(folder), vocab_size=73448)
    processor = ThinkingBudget(SimpleNamespace(model_config=config))
    inputs = {
        "logits_processors_args": [{"thinking_budget": 10_000} for _ in range(64)],
        "seq_lens_this_time_buffer": paddle.ones([64], "int32"),
        "seq_lens_encoder": paddle.zeros([64], "int32"),
        "next_tokens": paddle.randint(0, 200, [64, 1]),
    }
    logits = paddle.randn([64, 73448])
    best = float("inf")
    for _ in range(20):
        began = time.thread_time()
        for _ in range(100):
            processor.update_state(inputs)
            processor.apply(logits)
        best = min(best, (time.thread_time() - began) / 100)
    print(f"{best * 1e6:.1f} us a step")
    assert best < 50e-6
