"""Unmodified FastDeploy serves MiniCPM: offline engine and server give the reference's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoints import SMALL_SPARSE_CONFIG, write_tiny_checkpoint
from host.greedy import assert_greedy, expected_tokens, random_prompt
from host.host import CROWDED, OfflineEngine, Server, missing_host, offline_engine, server

pytestmark = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(missing_host() is not None, reason=str(missing_host())),
]
openai = pytest.importorskip("openai", reason="the OpenAI client comes with FastDeploy")

PROMPT_LENS = (1, 63, 64, 65, 129, 500)
SMOLLM2 = Path(__file__).parents[2] / ".demo" / "smollm2-135m-instruct"


def write_checkpoint(folder: Path, **overrides: object) -> Path:
    """32 query heads over 2 kv heads as in MiniCPM4.1, of the least head_dim FastDeploy takes."""
    return write_tiny_checkpoint(folder, hidden_size=1024, intermediate_size=512, **overrides)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


class TestOffline:
    @pytest.fixture(scope="class")
    def engine(
        self, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[OfflineEngine]:
        with offline_engine(checkpoint, tmp_path_factory.mktemp("offline")) as started:
            yield started

    @pytest.mark.parametrize("num_tokens", PROMPT_LENS)
    def test_greedy_tokens_are_the_references(
        self, engine: OfflineEngine, checkpoint: Path, num_tokens: int
    ) -> None:
        prompt = random_prompt(num_tokens)
        (reply,) = engine.generate([prompt], max_tokens=24)
        assert_greedy(reply["token_ids"], checkpoint, prompt, 24)

    def test_16_requests_share_4_slots(self, engine: OfflineEngine, checkpoint: Path) -> None:
        prompts = [random_prompt(20 + 13 * i, seed=1) for i in range(16)]
        for prompt, reply in zip(prompts, engine.generate(prompts, max_tokens=20), strict=True):
            assert_greedy(reply["token_ids"], checkpoint, prompt, 20)

    def test_decode_over_several_pages(self, engine: OfflineEngine, checkpoint: Path) -> None:
        prompts = [random_prompt(60, seed=seed) for seed in range(12)]
        # A stop token may come early: of a dozen prompts, the longest reply must cross pages.
        longest = max(prompts, key=lambda p: len(expected_tokens(checkpoint, p, 220)))
        (reply,) = engine.generate([longest], max_tokens=220)
        assert len(reply["token_ids"]) > 140
        assert_greedy(reply["token_ids"], checkpoint, longest, 220)

    def test_our_class_and_not_a_fall_back(self, engine: OfflineEngine) -> None:
        assert "registered MiniCPMForCausalLM with FastDeploy" in engine.output
        assert "PaddleFormers backend" not in engine.output


def test_chunked_prefill_and_preemption(checkpoint: Path, tmp_path: Path) -> None:
    prompts = [random_prompt(n, seed=2) for n in (500, 200, 210, 190, 129)]
    # One request of full length fits in the pages, two of these prompts' replies do not.
    options = {"max_model_len": 704, "max_num_batched_tokens": 128, "num_gpu_blocks_override": 14}
    with offline_engine(checkpoint, tmp_path, variables=CROWDED, **options) as engine:
        replies = engine.generate(prompts, max_tokens=150)
        for prompt, reply in zip(prompts, replies, strict=True):
            assert_greedy(reply["token_ids"], checkpoint, prompt, 150)
        assert engine.said("Preempted request id")


def test_prefix_caching_changes_no_token(checkpoint: Path, tmp_path: Path) -> None:
    prompt = random_prompt(400, seed=3)
    branch = prompt[:330] + random_prompt(60, seed=4)
    with offline_engine(checkpoint, tmp_path, enable_prefix_caching=True) as engine:
        for ids, cached in ((prompt, 0), (prompt, 384), (branch, 320)):
            (reply,) = engine.generate([ids], max_tokens=12)
            assert_greedy(reply["token_ids"], checkpoint, ids, 12)
            assert reply["num_cached_tokens"] == cached


def test_tied_head_and_float32_shards(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tied", tied=True, num_shards=2, dtype="float32")
    prompt = random_prompt(70)
    with offline_engine(folder, tmp_path / "log") as engine:
        (reply,) = engine.generate([prompt], max_tokens=24)
        assert_greedy(reply["token_ids"], folder, prompt, 24)


@pytest.mark.parametrize(
    "fields",
    [{"tied": True}, {"sparse_config": SMALL_SPARSE_CONFIG}],
    ids=["tied head", "sparse attention"],
)
def test_two_ranks(tmp_path: Path, fields: dict[str, object]) -> None:
    """Tensor parallel in two real processes, which talk over Gloo."""
    folder = write_checkpoint(tmp_path / "checkpoint", **fields)
    attention = "infllmv2" if "sparse_config" in fields else "dense"
    prompts = [random_prompt(n, seed=7) for n in (1, 65, 400)]
    with offline_engine(folder, tmp_path / "log", tensor_parallel_size=2) as engine:
        for prompt, reply in zip(prompts, engine.generate(prompts, max_tokens=16), strict=True):
            assert_greedy(reply["token_ids"], folder, prompt, 16, attention)


def test_published_128k_rope_table(tmp_path: Path) -> None:
    """The table is for a head_dim of 128, and served in full length."""
    folder = write_tiny_checkpoint(
        tmp_path / "long", num_q_heads=16, num_kv_heads=1, hidden_size=2048, intermediate_size=256
    )
    prompt = random_prompt(100)
    with offline_engine(
        folder,
        tmp_path / "log",
        variables={"FD_MINICPM41_ROPE": "128k"},
        max_model_len=131072,
        num_gpu_blocks_override=2100,
    ) as engine:
        (reply,) = engine.generate([prompt], max_tokens=16)
    from fd_minicpm41.reference.checkpoint import load_model
    from fd_minicpm41.reference.sampling import generate

    model = load_model(folder, rope_table="128k")
    expected = list(generate(model, model.new_cache(200), prompt, 16))
    *got, _ = reply["token_ids"]  # the last one is a stop token, see assert_greedy
    assert len(got) > 8 and got == expected[: len(got)]


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2 is not here: run make demo-smollm2 first")
def test_smollm2(tmp_path: Path) -> None:
    import os

    text = "Once upon a time there was a king who had twelve daughters, each more beautiful. "
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json"))
    ids = tokenizer.encode(text * 40, add_special_tokens=False).ids
    prompts = [ids[:n] for n in PROMPT_LENS]
    assert [len(p) for p in prompts] == list(PROMPT_LENS)
    with offline_engine(SMOLLM2, tmp_path) as engine:
        replies = engine.generate(prompts, max_tokens=16)
        for prompt, reply in zip(prompts, replies, strict=True):
            assert_greedy(reply["token_ids"], SMOLLM2, prompt, 16)


class TestServer:
    """``fastdeploy serve`` with no environment variable and no --model-impl."""

    @pytest.fixture(scope="class")
    def running(
        self, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Server]:
        folder = tmp_path_factory.mktemp("server")
        with server(checkpoint, folder, ["--enable-logprob"]) as started:
            yield started

    @pytest.fixture(scope="class")
    def client(self, running: Server) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{running.url}/v1", api_key="none", timeout=120, max_retries=0
        )

    def complete(self, client: openai.OpenAI, prompt: list[int], max_tokens: int) -> list[int]:
        completion = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        return completion.choices[0].completion_token_ids

    def test_models(self, client: openai.OpenAI, checkpoint: Path) -> None:
        (model,) = client.models.list().data
        assert model.id == str(checkpoint)

    @pytest.mark.parametrize("num_tokens", PROMPT_LENS)
    def test_completions_are_the_references(
        self, client: openai.OpenAI, checkpoint: Path, num_tokens: int
    ) -> None:
        prompt = random_prompt(num_tokens)
        assert_greedy(self.complete(client, prompt, 24), checkpoint, prompt, 24)

    def test_16_clients_at_once(self, client: openai.OpenAI, checkpoint: Path) -> None:
        prompts = [random_prompt(20 + 13 * i, seed=5) for i in range(16)]
        with ThreadPoolExecutor(16) as pool:
            replies = list(pool.map(lambda p: self.complete(client, p, 16), prompts))
        for prompt, reply in zip(prompts, replies, strict=True):
            assert_greedy(reply, checkpoint, prompt, 16)

    def test_chat_renders_the_template_and_is_the_references(
        self, client: openai.OpenAI, checkpoint: Path
    ) -> None:
        chat = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "What is a page?"}],
            max_tokens=16,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        message = chat.choices[0].message
        assert_greedy(message.completion_token_ids, checkpoint, message.prompt_token_ids, 16)
        assert chat.usage.prompt_tokens == len(message.prompt_token_ids)

    def test_streaming_gives_the_same_tokens(self, client: openai.OpenAI, checkpoint: Path) -> None:
        prompt = random_prompt(40, seed=6)
        stream = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=20,
            temperature=0,
            stream=True,
            extra_body={"return_token_ids": True},
        )
        chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
        tokens = [t for c in chunks for t in getattr(c, "completion_token_ids", None) or ()]
        assert len(chunks) > 2
        assert_greedy(tokens, checkpoint, prompt, 20)

    def test_logprobs_are_of_the_greedy_tokens(self, client: openai.OpenAI) -> None:
        chat = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=6,
            temperature=0,
            logprobs=True,
            top_logprobs=3,
        )
        content = chat.choices[0].logprobs.content
        assert len(content) > 0
        for entry in content[:-1]:
            best = max(top.logprob for top in entry.top_logprobs)
            assert entry.logprob == pytest.approx(best, abs=1e-5) and entry.logprob <= 0

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"messages": []}, "empty"),
            ({"messages": [{"role": "user", "content": "x" * 5000}]}, "too long"),
            ({"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}, "max_tokens"),
        ],
        ids=["no messages", "too long", "negative max_tokens"],
    )
    def test_a_bad_request_is_answered_and_the_server_goes_on(
        self, client: openai.OpenAI, checkpoint: Path, arguments: dict, message: str
    ) -> None:
        # FastDeploy's own words; 2.6 wraps them in status 500 where 400 is meant.
        with pytest.raises(openai.APIStatusError, match=message):
            client.chat.completions.create(model="tiny", **arguments)
        prompt = random_prompt(9)
        assert_greedy(self.complete(client, prompt, 8), checkpoint, prompt, 8)


class TestRefusal:
    """The command itself stops, with one line in place of a traceback."""

    def refuse(self, folder: Path, log: Path, *arguments: str, **variables: str) -> str:
        with server(folder, log, arguments, healthy=False, variables=variables) as started:
            output = started.wait_for_end(120)
        assert "Traceback" not in output.rpartition("fd_minicpm41")[2]
        lines = [x for x in output.splitlines() if x.startswith("fd_minicpm41: error: ")]
        assert len(lines) == 1, output
        return lines[0]

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "bare", tokenizer_files=False)
        line = self.refuse(folder, tmp_path / "log")
        assert "neither tokenizer.json nor tokenizer.model" in line

    def test_context_that_is_not_whole_pages(self, checkpoint: Path, tmp_path: Path) -> None:
        line = self.refuse(checkpoint, tmp_path, "--max-model-len", "1000")
        assert "--max-model-len is 1000" in line and "--max-model-len 960" in line

    def test_sparse_attention_with_other_pages(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "sparse", sparse_config=SMALL_SPARSE_CONFIG)
        line = self.refuse(folder, tmp_path / "log", "--block-size", "32")
        assert "--block-size is 32" in line and "--block-size 64" in line
