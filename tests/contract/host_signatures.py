"""Signatures of the host symbols that we touch, read from a checkout without running it.

    python tests/contract/host_signatures.py CHECKOUT VERSION

writes ``host_VERSION.json`` beside this file: no code, only what a caller has to know. What is
recorded is what the package imports from FastDeploy, what its ledgers replace, and :data:`EXTRA`.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "src" / "fd_minicpm41"
HOST = "fastdeploy"

# Touched through objects and not by import: "module:Name" or "module:Class.member".
EXTRA = (
    "fastdeploy.config:CacheConfig",
    "fastdeploy.config:GraphOptimizationConfig",
    "fastdeploy.config:LoadConfig",
    "fastdeploy.config:ModelConfig",
    "fastdeploy.config:ParallelConfig",
    "fastdeploy.config:SchedulerConfig",
    "fastdeploy.config:SpeculativeConfig",
    "fastdeploy.model_executor.layers.linear:LinearBase",
    "fastdeploy.model_executor.models.model_base:ModelCategory",
    "fastdeploy.plugins.model_register:load_model_register_plugins",
    "fastdeploy.plugins.utils:load_plugins_by_group",
)


def imports_of(source: Path) -> Iterator[tuple[str, bool]]:
    """``module:name`` of every import from FastDeploy, and whether it stands in a ``try``."""

    def walk(node: ast.AST, in_try: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == HOST:
            for alias in node.names:
                yield f"{node.module}:{alias.name}", in_try
        for child in ast.iter_child_nodes(node):
            yield from walk(child, in_try or isinstance(node, ast.Try))

    yield from walk(ast.parse(source.read_text("utf-8")), False)


def package_imports() -> dict[str, bool]:
    """Every symbol the package imports from FastDeploy; True where a fall-back stands beside it."""
    found: dict[str, bool] = {}
    for source in sorted(PACKAGE.rglob("*.py")):
        for symbol, in_try in imports_of(source):
            found[symbol] = found.get(symbol, True) and in_try
    return found


def hook_targets() -> list[str]:
    """``target`` of every ledger entry, in whichever module it stands."""
    targets = []
    for source in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                for keyword in node.keywords:
                    value = keyword.value
                    if keyword.arg == "target" and isinstance(value, ast.Constant):
                        targets.append(value.value)
    return [t for t in targets if isinstance(t, str) and t.startswith(HOST)]


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, Any]:
    arguments = function.args
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    num_optional = len(arguments.defaults)
    decorators = [d.id for d in function.decorator_list if isinstance(d, ast.Name)]
    return {
        "kind": "function",
        "positional": positional,
        "required": positional[: len(positional) - num_optional],
        "keyword_only": [a.arg for a in arguments.kwonlyargs],
        "takes_any_positional": arguments.vararg is not None,
        "takes_any_keyword": arguments.kwarg is not None,
        "decorators": [d for d in decorators if d in ("classmethod", "staticmethod", "property")],
    }


def _class(node: ast.ClassDef) -> dict[str, Any]:
    methods, attributes = {}, set()
    for item in node.body:
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
            methods[item.name] = _signature(item)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            attributes.add(item.target.id)
        elif isinstance(item, ast.Assign):
            attributes |= {t.id for t in item.targets if isinstance(t, ast.Name)}
    for inner in ast.walk(node):
        is_own = isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
        if is_own and isinstance(inner.value, ast.Name) and inner.value.id == "self":
            attributes.add(inner.attr)
    return {
        "kind": "class",
        "bases": [ast.unparse(base) for base in node.bases],
        "methods": methods,
        "attributes": sorted(attributes),
    }


class Checkout:
    """The Python sources of a FastDeploy checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def module(self, name: str) -> tuple[ast.Module, bool]:
        """The parsed module, and whether it is a package."""
        path = self.root.joinpath(*name.split("."))
        is_package = path.is_dir()
        source = path / "__init__.py" if is_package else path.with_suffix(".py")
        return ast.parse(source.read_text("utf-8")), is_package

    def record(self, symbol: str) -> dict[str, Any] | None:
        """What is known of ``module:Name`` or ``module:Class.member``; None if it is not there."""
        module_name, _, path = symbol.partition(":")
        name, *members = path.split(".")
        try:
            module, is_package = self.module(module_name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef) and node.name == name:
                if not members:
                    return _class(node)
                for item in node.body:
                    if isinstance(item, ast.FunctionDef) and item.name == members[0]:
                        return _signature(item)
                return None
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
                return _signature(node)
            if isinstance(node, ast.Assign) and name in [
                t.id for t in node.targets if isinstance(t, ast.Name)
            ]:
                return {"kind": "value"}
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        base = module_name.split(".")
                        up = node.level - 1 if is_package else node.level
                        base = base[: len(base) - up] if node.level else []
                        origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
                        return self.record(f"{origin}:{'.'.join([alias.name, *members])}")
        return None


def touched_symbols() -> list[str]:
    return sorted({*package_imports(), *hook_targets(), *EXTRA})


def record(root: Path, version: str) -> dict[str, Any]:
    checkout = Checkout(root)
    symbols = {symbol: checkout.record(symbol) for symbol in touched_symbols()}
    return {"version": version, "symbols": symbols}


def main() -> None:
    root, version = Path(sys.argv[1]), sys.argv[2]
    recorded = record(root, version)
    lines = [
        f"  {json.dumps(symbol)}: {json.dumps(known, sort_keys=True)}"
        for symbol, known in recorded["symbols"].items()
    ]
    head = f'{{"version": {json.dumps(version)}, "symbols": {{\n'
    (HERE / f"host_{version}.json").write_text(head + ",\n".join(lines) + "\n}}\n", "utf-8")


if __name__ == "__main__":
    main()
