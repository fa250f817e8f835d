"""InfLLM-V2 inside unmodified FastDeploy: greedy tokens are the reference's, whatever the schedule.

The checkpoints have a budget of 4 blocks and turn sparse at 350 tokens, so a wrong switch, a stale
compressed key or a block too few shows in the tokens; each test says that dense attention would
have answered otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from checkpoints import SMALL_SPARSE_CONFIG, write_tiny_checkpoint
from host.greedy import assert_greedy, expected_tokens, random_prompt
from host.host import CROWDED, OfflineEngine, missing_host, offline_engine, server

pytestmark = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(missing_host() is not None, reason=str(missing_host())),
]

SPARSE_CONFIG = SMALL_SPARSE_CONFIG | {"dense_len": 350}


def write_checkpoint(folder: Path, **overrides: object) -> Path:
    return write_tiny_checkpoint(folder, hidden_size=1024, intermediate_size=512, **overrides)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_checkpoint(folder, sparse_config=SPARSE_CONFIG)


def assert_sparse(
    replies: Sequence[dict], checkpoint: Path, prompts: Sequence[list[int]], max_tokens: int
) -> None:
    for prompt, reply in zip(prompts, replies, strict=True):
        assert_greedy(reply["token_ids"], checkpoint, prompt, max_tokens, "infllmv2")
    assert any(
        expected_tokens(checkpoint, prompt, max_tokens)
        != expected_tokens(checkpoint, prompt, max_tokens, "infllmv2")
        for prompt in prompts
    ), "dense attention gives the same tokens: these prompts test nothing"


class TestChunkedPrefill:
    """Chunks of at most 192 tokens, cut wherever the other requests of a step leave room; the rows
    of a step are attended to in windows of 80."""

    @pytest.fixture(scope="class")
    def engine(
        self, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[OfflineEngine]:
        folder = tmp_path_factory.mktemp("chunked")
        short = {"FD_MINICPM41_TEST_WINDOW_ROWS": "80"}
        with offline_engine(
            checkpoint, folder, variables=short, max_num_batched_tokens=192
        ) as started:
            yield started

    def test_one_log_line_says_what_runs(self, engine: OfflineEngine) -> None:
        line = "InfLLM-V2 attention, sparse from 350 tokens of context, dense below (budget 4 block"
        assert line in engine.logs()

    @pytest.mark.parametrize("num_tokens", [1, 64, 255, 349, 350, 351, 511, 700])
    def test_prompts_around_every_edge(
        self, engine: OfflineEngine, checkpoint: Path, num_tokens: int
    ) -> None:
        prompt = random_prompt(num_tokens)
        (reply,) = engine.generate([prompt], max_tokens=16)
        assert_greedy(reply["token_ids"], checkpoint, prompt, 16, "infllmv2")

    def test_decode_crosses_the_switch(self, engine: OfflineEngine, checkpoint: Path) -> None:
        prompts = [random_prompt(330, seed=seed) for seed in range(4)]
        replies = engine.generate(prompts, max_tokens=60, min_tokens=50)
        for prompt, reply in zip(prompts, replies, strict=True):
            assert len(reply["token_ids"]) > 30
            assert_greedy(reply["token_ids"], checkpoint, prompt, 60, "infllmv2", min_tokens=50)

    def test_16_mixed_requests_on_4_slots_each_as_if_alone(
        self, engine: OfflineEngine, checkpoint: Path
    ) -> None:
        prompts = [random_prompt(40 + 45 * i, seed=1) for i in range(16)]
        crowd = engine.generate(prompts, max_tokens=16)
        assert_sparse(crowd, checkpoint, prompts, 16)
        for i in (0, 9, 15):
            (alone,) = engine.generate([prompts[i]], max_tokens=16)
            assert alone["token_ids"] == crowd[i]["token_ids"]


def test_prefix_cache_with_a_branch_inside_a_page(checkpoint: Path, tmp_path: Path) -> None:
    prompt = random_prompt(600, seed=3)
    branch = prompt[:470] + random_prompt(130, seed=4)
    with offline_engine(checkpoint, tmp_path, enable_prefix_caching=True) as engine:
        replies = []
        for ids, cached in ((prompt, 0), (prompt, 576), (branch, 448)):
            (reply,) = engine.generate([ids], max_tokens=24)
            assert reply["num_cached_tokens"] == cached
            replies.append(reply)
        assert_sparse(replies, checkpoint, [prompt, prompt, branch], 24)


def test_preempted_requests_start_again(checkpoint: Path, tmp_path: Path) -> None:
    prompts = [random_prompt(n, seed=2) for n in (420, 400, 380, 360, 340)]
    options = {"max_num_batched_tokens": 256, "num_gpu_blocks_override": 22}
    with offline_engine(checkpoint, tmp_path, variables=CROWDED, **options) as engine:
        replies = engine.generate(prompts, max_tokens=120, min_tokens=110)
        for prompt, reply in zip(prompts, replies, strict=True):
            assert_greedy(reply["token_ids"], checkpoint, prompt, 120, "infllmv2", min_tokens=110)
        assert engine.said("Preempted request id")


def test_another_backend_wins_over_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    prompt = random_prompt(600)
    variables = {"FD_ATTENTION_BACKEND": "APPEND_ATTN"}
    with offline_engine(checkpoint, tmp_path, variables=variables) as engine:
        (reply,) = engine.generate([prompt], max_tokens=24)
        assert_greedy(reply["token_ids"], checkpoint, prompt, 24)
        assert "InfLLM-V2 attention" not in engine.logs()
    assert expected_tokens(checkpoint, prompt, 24) != (
        expected_tokens(checkpoint, prompt, 24, "infllmv2")
    )


def test_a_named_backend_needs_no_sparse_config(tmp_path: Path) -> None:
    """The published values hold; no context of this server reaches them, and the log says so."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    prompt = random_prompt(300)
    variables = {"FD_ATTENTION_BACKEND": "INFLLMV2_ATTN"}
    with offline_engine(folder, tmp_path / "log", variables=variables) as engine:
        (reply,) = engine.generate([prompt], max_tokens=16)
        assert_greedy(reply["token_ids"], folder, prompt, 16)
        assert "dense at every length: max_model_len is 1024 (budget 96 blocks" in engine.logs()


def test_the_switch_can_be_overridden(checkpoint: Path, tmp_path: Path) -> None:
    always = write_checkpoint(
        tmp_path / "always", sparse_config=SMALL_SPARSE_CONFIG | {"dense_len": -1}
    )
    prompt = random_prompt(330, seed=7)
    wanted = expected_tokens(always, prompt, 16, "infllmv2")
    assert wanted != expected_tokens(checkpoint, prompt, 16, "infllmv2")
    variables = {"FD_MINICPM41_DENSE_LEN": "-1"}
    with offline_engine(checkpoint, tmp_path / "log", variables=variables) as engine:
        (reply,) = engine.generate([prompt], max_tokens=16)
        assert_greedy(reply["token_ids"], always, prompt, 16, "infllmv2")


@pytest.mark.parametrize(
    "arguments, variables, said",
    [
        (["--splitwise-role", "prefill"], {}, "serve without disaggregation"),
        (["--tensor-parallel-size", "4"], {}, "--tensor-parallel-size is 4, wanted at most 2"),
        ([], {"FD_MINICPM41_DENSE_LEN": "8k"}, "FD_MINICPM41_DENSE_LEN is '8k'"),
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 1}'],
            {},
            "speculative decoding rewrites keys",
        ),
        (
            ["--quantization", '{"quantization": "mix_quant", "kv_cache_quant_type": "int8"}'],
            {},
            "kv_cache_quant_type is 'int8', wanted 16-bit pages",
        ),
    ],
    ids=["disaggregation", "tensor-parallel", "dense-len", "speculative", "kv-quant"],
)
def test_what_it_cannot_do_stops_the_server_with_one_line(
    checkpoint: Path, tmp_path: Path, arguments: list[str], variables: dict[str, str], said: str
) -> None:
    with server(checkpoint, tmp_path, arguments, variables=variables, healthy=False) as refused:
        output = refused.wait_for_end()
    lines = [line for line in output.splitlines() if "fd_minicpm41: error: " in line]
    assert len(lines) == 1 and said in lines[0]
