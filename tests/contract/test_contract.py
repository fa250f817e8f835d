"""What we import, call and replace in FastDeploy, held against recorded signatures of each version.

Runs everywhere: the recordings are names only (:mod:`contract.host_signatures` makes them).
"""

from __future__ import annotations

import ast
import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest

from contract.host_signatures import (
    HERE,
    PACKAGE,
    hook_targets,
    package_imports,
    record,
    touched_symbols,
)
from fd_minicpm41 import fastdeploy_hooks

VERSIONS = ("2.5", "2.6", "develop")
LEDGERS = (
    *fastdeploy_hooks.LEDGER,
    *fastdeploy_hooks.WORKER_LEDGER,
    *fastdeploy_hooks.REQUEST_LEDGER,
)
# Modules whose arguments to the host are checked, and how many calls of it each has at least.
CALLERS = {
    "model.py": 10,
    "fastdeploy_hooks.py": 2,
    "quantization/linear.py": 4,
    "quantization/vocabulary.py": 1,
}


def recording(version: str) -> dict[str, Any]:
    values = json.loads((HERE / f"host_{version}.json").read_text("utf-8"))
    assert values["version"] == version
    return values["symbols"]


@pytest.fixture(params=VERSIONS)
def symbols(request: pytest.FixtureRequest) -> dict[str, Any]:
    return recording(request.param)


def test_recordings_cover_what_we_touch(symbols: dict[str, Any]) -> None:
    again = "record anew: python tests/contract/host_signatures.py CHECKOUT VERSION"
    assert set(touched_symbols()) == set(symbols), again


def test_every_import_is_there(symbols: dict[str, Any]) -> None:
    missing = [s for s, has_fall_back in package_imports().items() if symbols[s] is None]
    without_fall_back = [s for s in missing if not package_imports()[s]]
    assert not without_fall_back


def test_every_hook_target_is_there_and_in_a_ledger(symbols: dict[str, Any]) -> None:
    assert sorted(hook_targets()) == sorted(hook.target for hook in LEDGERS)
    assert [t for t in hook_targets() if symbols[t] is None] == []


@pytest.mark.parametrize("hook", LEDGERS, ids=lambda hook: hook.target)
def test_every_entry_is_argued(hook: fastdeploy_hooks.Hook) -> None:
    for text in (hook.why, hook.how, hook.upstream, hook.remove_when):
        assert len(text) > 15 and text.endswith(".") or text == hook.remove_when


def _accepts(wrapper: Any, recorded: dict[str, Any]) -> None:
    """Binds the wrapper to a call with all of the recorded parameters."""
    signature = inspect.signature(wrapper)
    signature.bind(
        *range(len(recorded["positional"])), **dict.fromkeys(recorded["keyword_only"], 0)
    )


@pytest.mark.parametrize(
    "hook",
    [hook for hook in LEDGERS if not isinstance(hook, fastdeploy_hooks.ClassHook)],
    ids=lambda hook: hook.target,
)
def test_wrappers_take_what_the_host_passes(
    hook: fastdeploy_hooks.Hook, symbols: dict[str, Any]
) -> None:
    recorded = symbols[hook.target]
    assert recorded["kind"] == "function"

    def original(*args: Any, **kwargs: Any) -> None: ...

    _accepts(hook.wrap(original), recorded)


def _bound_names(tree: ast.Module) -> dict[str, str]:
    """Names a module binds to the host's symbols."""
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastdeploy")
        for alias in node.names
    }


def _signature_of_call(call: ast.Call, bound: dict[str, str], symbols: dict[str, Any]) -> Any:
    """The recorded signature a call meets, without ``self``; None when it is not the host's."""
    if isinstance(call.func, ast.Name) and call.func.id in bound:
        known = symbols[bound[call.func.id]]
        if known["kind"] == "class":
            known = known["methods"].get("__init__")
        return known
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if isinstance(owner, ast.Name) and owner.id in bound and isinstance(call.func, ast.Attribute):
        known = symbols[bound[owner.id]]
        return known["methods"].get(call.func.attr) if known["kind"] == "class" else None
    return None


@pytest.mark.parametrize("caller", CALLERS)
def test_our_calls_fit_the_hosts_signatures(caller: str, symbols: dict[str, Any]) -> None:
    tree = ast.parse((PACKAGE / caller).read_text("utf-8"))
    bound, checked = _bound_names(tree), 0
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        known = _signature_of_call(call, bound, symbols)
        if known is None:
            continue
        checked += 1
        positional = known["positional"]
        if positional[:1] in (["self"], ["cls"]):
            positional = positional[1:]
        names = [keyword.arg for keyword in call.keywords]
        where = f"{caller}:{call.lineno}"
        unknown = set(names) - {*positional, *known["keyword_only"]}
        assert not unknown or known["takes_any_keyword"], f"{where} passes {unknown}"
        assert len(call.args) <= len(positional) or known["takes_any_positional"], where
        given = {*positional[: len(call.args)], *names}
        lacking = set(known["required"]) - {"self", "cls"} - given
        assert not lacking, f"{where} lacks {lacking}"
    assert checked >= CALLERS[caller]


def _own_method(name: str) -> tuple[list[str], bool]:
    """Parameters of a method of our model class, and whether it takes any keyword."""
    tree = ast.parse((PACKAGE / "model.py").read_text("utf-8"))
    (owner,) = (
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.ClassDef) and n.name == "MiniCPM41ForCausalLM"
    )
    for node in owner.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return [a.arg for a in node.args.args], node.args.kwarg is not None
    raise AssertionError(f"no method {name}")


def test_the_model_has_both_ways_to_be_called() -> None:
    """2.5 passes ids_remove_padding and forward_meta by name, later ones (inputs, forward_meta)."""
    names, _ = _own_method("forward")
    assert names[1:3] == ["inputs", "forward_meta"] and "ids_remove_padding" in names
    assert _own_method("compute_logits")[0] == ["self", "hidden_states", "forward_meta"]
    _own_method("clear_graph_opt_backend")
    text = (PACKAGE / "model.py").read_text("utf-8")
    assert "clear_grpah_opt_backend = clear_graph_opt_backend" in text


def test_the_layers_are_called_as_recorded(symbols: dict[str, Any]) -> None:
    """Calls of layer objects, which the calls above cannot see."""
    layers = "fastdeploy.model_executor.layers"
    norm = symbols[f"{layers}.normalization:RMSNorm"]["methods"]["forward"]["positional"]
    assert norm[:3] == ["self", "x", "residual_input"]
    embedding = symbols[f"{layers}.embeddings:VocabParallelEmbedding"]["methods"]["forward"]
    assert embedding["positional"] == ["self", "ids_remove_padding", "forward_meta"]
    attention = symbols[f"{layers}.attention.attention:Attention"]["methods"]["forward"]
    assert {"qkv", "forward_meta"} <= set(attention["positional"])


def test_the_abstract_methods_are_ours(symbols: dict[str, Any]) -> None:
    base = symbols["fastdeploy.model_executor.models.model_base:ModelForCasualLM"]["methods"]
    assert set(base) - {"__init__"} == {"set_state_dict", "forward", "compute_logits", "name"}
    for name in set(base) - {"__init__"}:
        _own_method(name)


@pytest.mark.parametrize(
    "owner, names",
    [
        ("FDConfig", ("model_config", "cache_config", "load_config", "parallel_config")),
        ("FDConfig", ("scheduler_config", "speculative_config", "tokenizer")),
        ("FDConfig", ("graph_opt_config", "quant_config")),
        ("ModelConfig", ("model", "max_model_len", "architectures", "pretrained_config")),
        ("CacheConfig", ("block_size",)),
        ("ParallelConfig", ("tensor_parallel_size",)),
        ("SchedulerConfig", ("splitwise_role",)),
        ("SpeculativeConfig", ("method",)),
    ],
)
def test_the_configurations_have_what_we_read(
    symbols: dict[str, Any], owner: str, names: tuple[str, ...]
) -> None:
    assert set(names) <= set(symbols[f"fastdeploy.config:{owner}"]["attributes"])


def test_the_forward_meta_has_what_we_read(symbols: dict[str, Any]) -> None:
    meta = symbols["fastdeploy.model_executor.forward_meta:ForwardMeta"]["attributes"]
    read = {"rotary_embs", "caches", "block_tables", "cu_seqlens_q", "seq_lens_decoder"}
    read |= {"batch_id_per_token", "seq_lens_this_time", "seq_lens_encoder"}
    read |= {"step_use_cudagraph", "exist_prefill"}
    assert read <= set(meta)


@pytest.mark.skipif("FASTDEPLOY_SRC" not in os.environ, reason="FASTDEPLOY_SRC is not set")
def test_the_checkout_is_one_of_the_recordings() -> None:
    found = record(Path(os.environ["FASTDEPLOY_SRC"]), "here")["symbols"]
    found = json.loads(json.dumps(found))
    assert any(found == recording(version) for version in VERSIONS), (
        "this FastDeploy differs from every recording: record it and see what the tests say"
    )
