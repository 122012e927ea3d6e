"""What Graft's own files touch of a library, to compare with its contract (tests/contracts/contract.py)."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from tests.contracts.contract import Contract, parsed


def undeclared(files: Iterable[Path], package: str, contract: Contract) -> list[str]:
    """What Graft's own files import from `package`, or override in a class of it, and the contract doesn't name."""
    return [
        f"{file.name} uses {name}"
        for file in files
        for name in _imports(file, package) | _overrides(file, package)
        if not any(entry == name or entry.startswith(f"{name}.") for entry in contract)
    ]


def texts(files: Iterable[Path], prefix: str) -> set[str]:
    """The strings in Graft's own files that begin like that."""
    return {
        node.value
        for file in files
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(prefix)
    }


def importing(files: Iterable[Path], *packages: str) -> list[Path]:
    """Those of the files that import something from one of the packages."""
    return [file for file in files if any(_imports(file, package) for package in packages)]


def undeclared_attributes(files: Iterable[Path], *contracts: Contract) -> list[str]:
    """Attributes that Graft's own files assign on somebody else's object, or read of it though their names begin with
    an underscore, and that no contract names."""
    declared = {name for contract in contracts for parts in contract.values() for name in parts}
    declared |= {entry.rpartition(".")[2] for contract in contracts for entry in contract}
    return [
        f"{file.name}:{node.lineno} touches `{ast.unparse(node)}`"
        for file in files
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Attribute) and _is_foreign(node) and node.attr not in declared
    ]


def _is_foreign(node: ast.Attribute) -> bool:
    is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    is_dunder = node.attr.startswith("__")
    is_changed = isinstance(node.ctx, ast.Store | ast.Del)
    return not is_own and not is_dunder and (is_changed or node.attr.startswith("_"))


def _imports(file: Path, package: str) -> set[str]:
    """As `module:name`."""
    return {
        f"{node.module}:{alias.name}"
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package
        for alias in node.names
    }


def _overrides(file: Path, package: str) -> set[str]:
    """Methods, as `module:Base.method`, of classes whose base was imported from the package."""
    bases = {name.rpartition(":")[2]: name for name in _imports(file, package)}
    return {
        f"{bases[base.id]}.{method.name}"
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if isinstance(base, ast.Name) and base.id in bases
        for method in node.body
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
    }
