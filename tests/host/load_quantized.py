"""Chooses a format as FastDeploy's engine does, loads as its worker does, and saves what runs.

    load_quantized.py CHECKPOINT OUTPUT.npz QUANTIZATION [SM]

QUANTIZATION is the value of ``--quantization``, or empty for none. With SM the worker believes in a
GPU of that compute capability and a Paddle with CUDA, to see what it would choose there. Saved are
every parameter, ``layers`` (JSON: class of the method, bits, group, zero), and of each linear layer
its output ``NAME@M`` for the first M rows of ``rows(K)``. Run by ``tests/models``.
"""

import json
import sys

import numpy as np

NUM_ROWS = (1, 65)


def rows(columns: int) -> np.ndarray:
    """fp32 ``[65, columns]``, what every layer is multiplied by."""
    return np.random.default_rng(columns).standard_normal((max(NUM_ROWS), columns), np.float32)


def main() -> None:
    checkpoint, output, quantization, *sm_version = sys.argv[1:]
    sys.argv[1:] = []
    from fastdeploy.engine.args_utils import EngineArgs
    from fastdeploy.utils import parse_quantization

    asked = parse_quantization(quantization) if quantization else None
    sizes = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 512}
    engine = EngineArgs(model=checkpoint, quantization=asked, **sizes).create_engine_config()
    chosen = json.dumps(engine.model_config.quantization)

    # The engine always passes these, and FastDeploy 2.5 needs them.
    empty = ("speculative_config", "eplb_config", "routing_replay_config")
    sys.argv[1:] = ["--model", checkpoint, "--max_model_len", "512", "--max_num_seqs", "4"]
    sys.argv += [part for name in empty for part in (f"--{name}", "{}")]
    sys.argv += ["--quantization", chosen]
    from fastdeploy.worker import worker_process

    if sm_version:
        from fd_minicpm41.quantization import config

        config.has_cuda = lambda: True
        config.get_sm_version = lambda: int(sm_version[0])
    args = worker_process.parse_args()
    ranks, local_rank = worker_process.init_distributed_environment()
    fd_config = worker_process.initialize_fd_config(args, ranks, local_rank)

    import paddle
    from fastdeploy.model_executor.layers.linear import LinearBase
    from fastdeploy.model_executor.model_loader import get_model_loader

    model = get_model_loader(load_config=fd_config.load_config).load_model(fd_config=fd_config)
    arrays = {"chosen": np.array(chosen), "loader": np.array(fd_config.load_config.load_choices)}
    for name, parameter in model.named_parameters():
        is_bytes = parameter.dtype in (paddle.uint8, paddle.int8)
        arrays[name] = (parameter if is_bytes else parameter.astype("float32")).numpy()
    layers = {}
    for name, layer in model.named_sublayers():
        if not isinstance(layer, LinearBase):
            continue
        fmt = getattr(layer.quant_method, "fmt", None)
        layers[name] = [type(layer.quant_method).__name__, None if fmt is None else vars(fmt)]
        x = paddle.to_tensor(rows(layer.weight_shape[0]))
        for count in NUM_ROWS:
            arrays[f"{name}@{count}"] = layer(x[:count]).numpy()
    ids = paddle.to_tensor([0, 1, 257, 5])
    arrays["embedded"] = model.model.embed_tokens(ids).numpy()
    arrays["logits"] = model.compute_logits(
        paddle.to_tensor(rows(model.config.hidden_size))
    ).numpy()
    arrays["layers"] = np.array(json.dumps(layers))
    np.savez(output, **arrays)


if __name__ == "__main__":
    main()
