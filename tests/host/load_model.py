"""Loads a checkpoint as FastDeploy's worker does, without an engine, and saves what it holds.

    load_model.py CHECKPOINT OUTPUT.npz

writes every parameter of the model, fp32 and in the layers' own layout, and the logits of a fixed
hidden state. Run by ``tests/models`` in the environment of :mod:`host`.
"""

import sys

import numpy as np


def main() -> None:
    checkpoint, output = sys.argv[1:]
    # The engine always passes these, and FastDeploy 2.5 needs them.
    empty = ("speculative_config", "eplb_config", "routing_replay_config")
    sys.argv[1:] = ["--model", checkpoint, "--max_model_len", "512", "--max_num_seqs", "4"]
    sys.argv += [part for name in empty for part in (f"--{name}", "{}")]
    from fastdeploy.worker import worker_process

    args = worker_process.parse_args()
    ranks, local_rank = worker_process.init_distributed_environment()
    fd_config = worker_process.initialize_fd_config(args, ranks, local_rank)

    import paddle
    from fastdeploy.model_executor.model_loader import get_model_loader

    model = get_model_loader(load_config=fd_config.load_config).load_model(fd_config=fd_config)
    rows = np.sin(np.arange(2 * model.config.hidden_size, dtype=np.float32))
    hidden = paddle.to_tensor(rows.reshape([2, -1]))
    arrays = {name: p.astype("float32").numpy() for name, p in model.named_parameters()}
    arrays["hidden"], arrays["logits"] = hidden.numpy(), model.compute_logits(hidden).numpy()
    arrays["rotary_embs"] = model._rotary_embs().numpy()
    arrays["class"] = np.array(f"{type(model).__module__}.{type(model).__name__}")
    np.savez(output, **arrays)


if __name__ == "__main__":
    main()
