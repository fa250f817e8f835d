"""Records every op call of a run in which the engine mixes, cuts, preempts and shares.

``FD_MINICPM41_TRACE_OUT=file`` keeps the trace; ``tests/gpu/traces/engine.npz`` was made so, and
``tests/gpu/test_traces.py`` replays it on the CUDA kernels.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import capi
import traces
from checkpoints import SMALL_SPARSE_CONFIG, write_tiny_checkpoint
from host.greedy import random_prompt
from host.host import missing_host, offline_engine

pytestmark = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(missing_host() is not None, reason=str(missing_host())),
]


def test_a_recorded_run_replays_bit_by_bit(tmp_path: Path) -> None:
    # True head geometry in one small layer; a budget of 2 blocks, so few tokens show much.
    sparse_config = SMALL_SPARSE_CONFIG | {"topk": 2, "window_size": 0, "dense_len": 100}
    folder = write_tiny_checkpoint(
        tmp_path / "checkpoint",
        num_layers=1,
        hidden_size=128,
        head_dim=128,
        intermediate_size=128,
        sparse_config=sparse_config,
    )
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    options = {"max_model_len": 256, "max_num_batched_tokens": 96, "num_gpu_blocks_override": 6}
    with offline_engine(
        folder,
        tmp_path / "log",
        enable_prefix_caching=True,
        variables={"FD_MINICPM41_TEST_TRACE": str(recorded)},
        **options,
    ) as engine:
        prompts = [random_prompt(n) for n in (145, 30, 100)]
        engine.generate([prompts[0][:130]], max_tokens=4, min_tokens=4)
        (shared,) = engine.generate([prompts[0][:140]], max_tokens=4, min_tokens=4)
        assert shared["num_cached_tokens"] > 0
        engine.generate(prompts, max_tokens=36, min_tokens=36)
        assert engine.said("Preempted request id")
    file = Path(os.environ.get("FD_MINICPM41_TRACE_OUT", tmp_path / "engine.npz"))
    traces.pack(recorded, file)

    replay = traces.Replay(upload=np.array, run=capi.run_cpu)
    kinds = {"prefill": 0, "decode": 0, "mixed": 0, "history": 0}
    for call in traces.load(file):
        got = replay.run(call)
        if call.output is not None:
            # A padding row's list is not written.
            rows = call.inputs["batch_id_per_token"] >= 0
            where = (slice(None), rows) if call.op == "select_blocks" else rows
            assert got[where].tobytes() == call.output[where].tobytes()
        if call.op == "select_blocks":
            query_lens, history = call.inputs["query_lens"], call.inputs["history_lens"]
            is_prefill, is_decode = (query_lens > 1).any(), (query_lens == 1).any()
            kinds[
                "mixed" if is_prefill and is_decode else "prefill" if is_prefill else "decode"
            ] += 1
            kinds["history"] += bool(((query_lens > 1) & (history > 0)).any())
    assert all(kinds.values()), kinds
