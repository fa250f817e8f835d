"""The CUDA kernels on the calls of a real engine run: ``traces/engine.npz``.

The recorded results are the CPU ops', which compute in fp32 over the same bfloat16 caches. Against
them a kernel may round: its rotated q and k by a unit in the last place (the product and the sum of
a rotation may be fused), its probabilities before the second product (2^-9 of their sum), and its
output (2^-9), which together stay below 2^-7 of the largest value attended to.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import capi
import traces

FILE = Path(__file__).parent / "traces" / "engine.npz"


def replay_on_gpu() -> traces.Replay:
    import torch
    from gpu_ops import stream, upload

    def run(params: capi.Params) -> None:
        capi.run_cuda(params, stream())
        torch.cuda.synchronize()

    def workspace(params: capi.Params) -> int:
        return capi.workspace_cuda(params)  # type: ignore[arg-type]

    return traces.Replay(upload, run, workspace)


@pytest.mark.skipif(
    not FILE.is_file(), reason="no trace: tests/integration/test_recorded_run.py makes it"
)
def test_an_engine_run_replays_on_the_gpu() -> None:
    from gpu_ops import download

    replay = replay_on_gpu()
    lists = differing = 0
    for number, call in enumerate(traces.load(FILE)):
        got = replay.run(call)
        what = f"call {number}, {call.op}"
        is_row = np.asarray(call.inputs["batch_id_per_token"]) >= 0
        if not is_row.any():  # a warm-up step of padding rows alone
            continue
        if call.op == "rope_and_write_kv":
            wanted = call.output.astype(np.float32)
            difference = np.abs(download(got).astype(np.float32) - wanted)
            assert (difference <= np.abs(wanted) * 2.0**-7 + 1e-5).all(), what
        elif call.op == "select_blocks":
            mine, wanted = download(got)[:, is_row], call.output[:, is_row]
            assert ((mine >= 0).sum(2) == (wanted >= 0).sum(2)).all(), what
            lists += mine.shape[0] * mine.shape[1]
            differing += int((mine != wanted).any(2).sum())
        elif call.op == "sparse_attention":
            mine = download(got).astype(np.float32)[is_row]
            wanted = call.output.astype(np.float32)[is_row]
            values = download(replay.caches[call.inputs["v_cache"]]).astype(np.float32)
            assert np.abs(mine - wanted).max() <= 2.0**-7 * np.abs(values).max(), what
    # Where two scores are a rounding apart, either block may be listed.
    assert differing <= 0.01 * lists and lists > 500
