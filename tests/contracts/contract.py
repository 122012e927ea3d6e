"""Checks that an installed library still has the names that Graft touches, without importing the library.

A contract is a table, declared beside the code that touches the library:

    {
        "vllm.v1.engine.async_llm:AsyncLLM": ("errored", "vllm_config"),             # attributes of a class
        "vllm.v1.engine.async_llm:AsyncLLM.encode": ("prompt", "/", "lora_request"),  # parameters of a function
        "vllm.entrypoints.anthropic.api_router": ("create_error_response",),         # names in a module
        "vllm.entrypoints.anthropic.api_router:POST /v1/messages": (),               # a route of a FastAPI router
        "vllm.v1.engine.async_llm:uses self.add_request": (),                        # an expression in a module
        "vllm.utils.argparse_utils:text --config": (),                               # a string in a module
    }

Parameters before "/" are passed by position and must be the first ones, in that order; "*" and "**" ask for variable
arguments. A function may have more parameters than the table names, but only optional ones.

The library's source is parsed and not run: importing vLLM takes eight seconds, reading a dozen of its files a tenth of
one. So an attribute counts as present if the class, or a base class, assigns or annotates it anywhere.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

Contract: TypeAlias = Mapping[str, Collection[str]]
Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
Definition: TypeAlias = ast.Module | ast.ClassDef | Function | ast.Assign | ast.AnnAssign


class Library:
    """The sources of one installed distribution and of what it depends on."""

    def __init__(self, *distributions: str, overlay: Path | None = None) -> None:
        """`distributions`: names under which the library may be installed, the first one found counts. `overlay`: a
        directory whose modules replace the installed ones. Raises PackageNotFoundError."""
        installed = next(filter(None, map(_distribution, distributions)), None)
        if installed is None:
            raise metadata.PackageNotFoundError(" or ".join(distributions))
        self.name = f"{installed.metadata['Name']} {installed.version}"
        installed_here = (Path(str(installed.locate_file(""))), Path(ast.__file__).parent)
        self._roots = (overlay, *installed_here) if overlay else installed_here

    def broken(self, contract: Contract) -> list[str]:
        """What the library doesn't keep of the contract, one sentence for each name, with the library's version."""
        return [
            f"{self._version_of(name)}: {problem}"
            for name, parts in contract.items()
            for problem in self._check(name, parts)
        ]

    def file_of(self, module: str) -> Path | None:
        """The source of a module, or the stub of a compiled one."""
        path = Path(*module.split("."))
        candidates = (
            root / file
            for root in self._roots
            for file in (path.with_suffix(".py"), path / "__init__.py", path.with_suffix(".pyi"), path / "__init__.pyi")
        )
        return next((file for file in candidates if file.is_file()), None)

    def _version_of(self, name: str) -> str:
        """Of what the name is in, which may be a dependency."""
        package = _distribution(name.partition(":")[0].partition(".")[0])
        return f"{package.metadata['Name']} {package.version}" if package else self.name

    def _check(self, name: str, parts: Collection[str]) -> Iterator[str]:
        module, _, qualified = name.partition(":")
        if self.file_of(module) is None:
            yield f"there is no module {module}"
        elif qualified.split(" ")[0] in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            if qualified not in self._routes(module):
                yield f"{module} has no route {qualified}"
        elif qualified.startswith("uses "):
            if not self._uses(module, qualified.removeprefix("uses ")):
                yield f"{module} no longer uses {qualified.removeprefix('uses ')}"
        elif qualified.startswith("text "):
            if not self._has_text(module, qualified.removeprefix("text ")):
                yield f"{module} no longer has the text {qualified.removeprefix('text ')}"
        elif (resolved := self._resolve(module, qualified)) is None:
            yield f"{module} has no {qualified}"
        else:
            definition, where = resolved
            if isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _parameter_problems(name, definition, parts)
            else:
                known = self._members(definition, where)
                yield from (
                    f"{name} has no `{part}`"
                    for part in parts
                    if part not in known and self._imported(resolved, part) is None
                )

    def _resolve(self, module: str, qualified: str) -> tuple[Definition, str] | None:
        """The definition, and the module that it stands in."""
        if (file := self.file_of(module)) is None:
            return None
        current: tuple[Definition, str] | None = (parsed(file), module)
        for part in qualified.split(".") if qualified else ():
            if current is None:
                return None
            current = self._members(*current).get(part) or self._imported(current, part)
        return current

    def _imported(self, scope: tuple[Definition, str], name: str) -> tuple[Definition, str] | None:
        """What a module got under that name by an import."""
        definition, module = scope
        if not isinstance(definition, ast.Module):
            return None
        for statement in _statements(definition):
            if not isinstance(statement, ast.ImportFrom):
                continue
            source = self._absolute(statement, module)
            for alias in statement.names:
                if alias.name == "*" and (exported := self._resolve(source, name)):
                    return exported
                if (alias.asname or alias.name) == name:
                    return self._resolve(source, alias.name) or self._resolve(f"{source}.{alias.name}", "")
        return self._resolve(f"{module}.{name}", "")

    def _absolute(self, statement: ast.ImportFrom, module: str) -> str:
        if not statement.level:
            return statement.module or ""
        file = self.file_of(module)
        is_package = file is not None and file.stem == "__init__"
        parents = module.split(".")
        parents = parents[: len(parents) - statement.level + is_package]
        return ".".join([*parents, *([statement.module] if statement.module else [])])

    def _members(self, definition: Definition, module: str) -> dict[str, tuple[Definition, str]]:
        """What is defined or assigned in a module, or in a class and its base classes."""
        if not isinstance(definition, ast.Module | ast.ClassDef):
            return {}
        members: dict[str, tuple[Definition, str]] = {}
        if isinstance(definition, ast.ClassDef):
            for base in reversed(definition.bases):
                name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
                resolved = self._resolve(module, name)
                if resolved and resolved[0] is not definition:
                    members |= self._members(*resolved)
            members |= {name: (node, module) for name, node in _assigned_to_self(definition)}
        return members | {name: (node, module) for name, node in _definitions(definition)}

    def _uses(self, module: str, expression: str) -> bool:
        file = self.file_of(module)
        assert file is not None
        nodes = (node for node in ast.walk(parsed(file)) if isinstance(node, ast.Name | ast.Attribute))
        return any(isinstance(node.ctx, ast.Load) and ast.unparse(node) == expression for node in nodes)

    def _has_text(self, module: str, text: str) -> bool:
        file = self.file_of(module)
        assert file is not None
        return any(isinstance(node, ast.Constant) and node.value == text for node in ast.walk(parsed(file)))

    def _routes(self, module: str) -> set[str]:
        file = self.file_of(module)
        assert file is not None
        calls = (
            call
            for node in ast.walk(parsed(file))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for call in node.decorator_list
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args
        )
        return {
            f"{call.func.attr.upper()} {call.args[0].value}"
            for call in calls
            if isinstance(call.func, ast.Attribute) and isinstance(call.args[0], ast.Constant)
        }


def _parameter_problems(name: str, function: Function, wanted: Collection[str]) -> Iterator[str]:
    given = function.args
    by_position = [parameter.arg for parameter in (*given.posonlyargs, *given.args)]
    required = set(by_position[: len(by_position) - len(given.defaults)])
    keyword_only = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    required |= {parameter.arg for parameter, default in keyword_only if default is None}
    if by_position[:1] in (["self"], ["cls"]):
        required -= {by_position.pop(0)}
    names = {*by_position, *(parameter.arg for parameter in given.kwonlyargs)}
    names |= {"*"} if given.vararg else set()
    names |= {"**"} if given.kwarg else set()
    wanted = list(wanted)
    leading = wanted[: wanted.index("/")] if "/" in wanted else []
    has = f"it has ({ast.unparse(given)})"
    yield from (f"{name} has no parameter `{part}`; {has}" for part in wanted if part != "/" and part not in names)
    yield from (f"{name} requires `{part}`, which is never passed; {has}" for part in sorted(required - set(wanted)))
    if by_position[: len(leading)] != leading and names.issuperset(leading):
        yield f"{name} doesn't begin with ({', '.join(leading)}); {has}"


def _definitions(scope: ast.Module | ast.ClassDef) -> Iterator[tuple[str, Definition]]:
    for statement in _statements(scope):
        match statement:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                yield statement.name, statement
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name, statement
            case ast.Assign(targets=targets):
                yield from ((target.id, statement) for target in targets if isinstance(target, ast.Name))


def _assigned_to_self(scope: ast.ClassDef) -> Iterator[tuple[str, Definition]]:
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                match target:
                    case ast.Attribute(value=ast.Name(id="self"), attr=name):
                        yield name, node


def _statements(scope: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """Those of the scope itself, also under `if` and `try`."""
    waiting = list(scope.body)
    while waiting:
        statement = waiting.pop(0)
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            inner = [*statement.body, *statement.orelse]
            if isinstance(statement, ast.Try):
                inner += [nested for handler in statement.handlers for nested in handler.body]
            waiting = [*inner, *waiting]


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
