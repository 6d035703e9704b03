"""Scripts and benchmarks run for hours, and rarely: what they use of errata must be there before they begin."""

from __future__ import annotations

import ast
import importlib
import types
from pathlib import Path

import pytest

from errata.errors import ConfigError

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")])


def used(tree: ast.Module) -> list[tuple[str, str]]:
    """(module, name) of everything that is taken from errata: imported, or asked of an imported module."""
    out: list[tuple[str, str]] = []
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "errata":
            for each in node.names:
                out.append((node.module or "", each.name))
                modules[each.asname or each.name] = f"{node.module}.{each.name}"
        elif isinstance(node, ast.Import):
            own = [each for each in node.names if each.name.split(".")[0] == "errata"]
            modules.update({each.asname or "errata": each.name if each.asname else "errata" for each in own})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            out.append((modules[node.value.id], node.attr))
    return out


def found(path: str) -> object:
    """A module, or what a module holds."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_what_a_script_takes_from_errata_is_there(path: Path) -> None:
    for module, name in used(ast.parse(path.read_text(encoding="utf-8"))):
        try:
            owner = found(module)
        except ConfigError as error:  # an extra that is not installed here
            assert "pip install 'errata[" in str(error)
            continue
        if isinstance(owner, types.ModuleType):  # of a class or a value, types say more
            assert hasattr(owner, name) or found(f"{module}.{name}"), f"{module} has no {name}"


def test_a_name_that_is_gone_is_noticed() -> None:
    with pytest.raises(AttributeError):
        ((module, name),) = used(ast.parse("import errata.run as r\nr.gone()"))
        found(f"{module}.{name}")
