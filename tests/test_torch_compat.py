"""The private names of torch: which there are, and that this torch has them."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from private_names import PRIVATE_NAMES, Name

import lpln_autopatch
from lpln_autopatch._torch_compat import TORCH_VERSION

PACKAGE = Path(lpln_autopatch.__file__).parent
SOURCES = {path: path.read_text() for path in PACKAGE.rglob("*.py") if path.parent.name != "bench"}
TREES = [ast.parse(source) for source in SOURCES.values()]

# Keys of dictionaries and attributes that this package or Python gives its own meaning.
NOT_OF_TORCH = {
    "_activate_when_torch_is_imported",
    "_asked",
    "_initializing",
    "_lpln_autopatch_exempt",
    "_lpln_autopatch_not_by_name",
    "_lpln_autopatch_",
    "_lpln_autopatch_forward_",
    "_original",
    "_StandIn",
    "_args_from_interpreter_flags",  # of Python
    "_replace",  # of a named tuple
}


NAMES = [name for names in PRIVATE_NAMES.values() for name in names]


def is_used(name: Name) -> bool:
    return name.since <= TORCH_VERSION and (name.until is None or name.until > TORCH_VERSION)


def has(holder: Any, attribute: str) -> bool:
    """Return True if `holder` has the name, declares it, or sets it on an argument."""
    if attribute in getattr(holder, "__annotations__", {}) or hasattr(holder, attribute):
        return True
    return attribute in getattr(getattr(holder, "__code__", None), "co_names", ())


def exists(path: str) -> bool:
    holder: Any = importlib.import_module("torch")
    above = "torch"
    *parents, last = path.split(".")[1:]
    for part in parents:
        above = f"{above}.{part}"
        with contextlib.suppress(ImportError):
            importlib.import_module(above)
        if not hasattr(holder, part):
            return False
        holder = getattr(holder, part)
    return has(holder, last)


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def dotted(node: ast.expr) -> str:
    """Return the source of a chain of attributes, with "?" for a part that is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def defined_here() -> set[str]:
    """Return the names of the package's modules, functions, classes, arguments and variables."""
    names = {part for path in SOURCES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    for node in (node for tree in TREES for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and dotted(node) == f"self.{node.attr}":
            names.add(node.attr)
    return names


def private_uses() -> Iterator[str]:
    """Return the private names that the package reads: attributes, imports, and strings."""
    for node in (node for tree in TREES for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
        elif isinstance(node, ast.Constant) and re.fullmatch(r"[\w.]+", str(node.value)):
            names = [str(node.value)]
        else:
            continue
        yield from (name for name in names if any(map(is_private, name.split("."))))


@pytest.mark.parametrize("path", [name.path for name in NAMES if is_used(name)])
def test_torch_has_the_private_name(path):
    """The name exists in every torch for which the package uses it."""
    assert exists(path)


@pytest.mark.parametrize(
    "path",
    [
        "torch._C._no_such_name",
        "torch._no_such_module.name",
        "torch.nn.Module._no_such_attribute",
        "torch.utils.checkpoint.CheckpointFunction.forward.no_such_attribute",
    ],
)
def test_missing_name_is_noticed(path):
    """The check can fail: at a module, a class and a function."""
    assert not exists(path)


def test_every_private_name_in_the_source_is_in_the_table():
    """Attributes, imports and strings that begin with an underscore, and are not ours."""
    table = [name.path.split(".") for name in NAMES]
    known = {part for row in table for part in row} | defined_here() | NOT_OF_TORCH
    unknown = set()
    for use in private_uses():
        parts = use.strip(".").split(".")
        if parts[0] != "torch":
            unknown |= set(filter(is_private, parts)) - known
        elif not any(row[: len(parts)] == parts[: len(row)] for row in table):
            unknown.add(use)
    assert not unknown


def test_every_name_in_the_table_is_in_the_source():
    """A row goes when its last use goes."""
    source = "\n".join(SOURCES.values())
    last = {name.path: name.path.split(".")[-2:] for name in NAMES}
    assert not {
        path
        for path, (holder, name) in last.items()
        if not (re.search(rf"\b{name}\b", source) and re.search(rf"\b{holder}\b", source))
    }
