"""The budgets of the house: what is private is visibly so, and no file or function is too long to read at once."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import house
from pages import ROOT

import errata
from errata import registry

FILE, FUNCTION, METHOD = 350, 60, 150  # lines at most: of a file, of a function of the package, of a file named after a method
READERS = ("src/errata/**/*.py", "tests/*.py", "scripts/*.py", "benchmarks/*.py", "docs/*.md", "README.md", "CONTRIBUTING.md")


def python_files() -> list[Path]:
    return sorted(p for folder in ("src", "tests", "scripts", "benchmarks") for p in (ROOT / folder).rglob("*.py"))


def defined(tree: ast.Module) -> list[str]:
    """Functions and constants at a module's top.  Classes and types may be met as what a public function returns, by no name."""
    out: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            out.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            out += [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return [name for name in out if name.islower() or name.isupper()]


def careless(texts: dict[str, str]) -> list[str]:
    """Names that only their own file uses and that do not say so, and underscored names that another file of the package imports."""
    words = {name: set(re.findall(r"\w+", text)) for name, text in texts.items()}
    out = []
    for name, text in texts.items():
        if not name.startswith("src/"):
            continue
        tree = ast.parse(text)
        alone = [n for n in defined(tree) if not n.startswith("_") and not any(n in words[other] for other in texts if other != name)]
        out += [f"{name}: {n} is used here alone; call it _{n}" for n in alone]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("errata"):
                hidden = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
                out += [f"{name}:{node.lineno}: {n} of {node.module} is private" for n in hidden]
    return out


def readable() -> dict[str, str]:
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for pattern in READERS for p in sorted(ROOT.glob(pattern))}


def test_what_is_private_is_visibly_so() -> None:
    assert careless(readable()) == []


def test_a_careless_name_is_found() -> None:
    own = {"src/errata/a.py": "LIMIT = 1\ndef used(): ...\ndef alone(): ...\ndef _quiet(): ...", "tests/t.py": "used()"}
    assert [line.split()[1] for line in careless(own)] == ["LIMIT", "alone"]
    assert careless({"src/errata/b.py": "from errata.a import _quiet"}) == ["src/errata/b.py:1: _quiet of errata.a is private"]


def test_nothing_is_too_long_to_read() -> None:
    methods = {name.replace("-", "") for name in registry.names("method")}
    out = []
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        name, lines = str(path.relative_to(ROOT)), text.count("\n")
        most = METHOD if name.startswith("src/errata/methods/") and path.stem in methods else FILE
        out += [f"{name}: {lines} lines, {most} at most"] if lines > most else []
        if name.startswith("src/"):
            nodes = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
            long = [(n.name, (n.end_lineno or n.lineno) - n.lineno + 1) for n in nodes]
            out += [f"{name}: {function} has {count} lines, {FUNCTION} at most" for function, count in long if count > FUNCTION]
    assert out == []


@functools.cache
def held(path: Path) -> set[str]:
    """Names that a module defines or imports."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    out = {n.name for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)}
    out |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return out | {(n.asname or n.name).split(".")[0] for n in nodes if isinstance(n, ast.alias)}


def nowhere(text: str) -> list[str]:
    """Dotted names of the package in a text that lead nowhere."""
    known, face, out = house.modules(), house.public(), []
    for name in re.findall(r"(?<![\w/.-])errata(?:\.(?!example|json\b|__)[A-Za-z_]\w*)+", text):
        parts = name.split(".")
        deep = max(i for i in range(1, len(parts) + 1) if ".".join(parts[:i]) in known)
        module, rest = ".".join(parts[:deep]), parts[deep:]
        if rest and rest[0] not in held(known[face.get(rest[0], module) if deep == 1 else module]):
            out.append(name)
    return out


def test_dotted_names_lead_somewhere() -> None:
    """Docstrings and pages speak of things that are there, under the names they have now."""
    found = {name: nowhere(text) for name, text in readable().items() if not name.startswith("tests/") and name != "docs/renames.md"}
    assert {name: names for name, names in found.items() if names} == {}
    assert nowhere("`errata.core.tail.Whole`, `errata.stats`") == ["errata.core.tail.Whole", "errata.stats"]
    assert nowhere("`errata.core.bank.Bank`, `errata.Ledger`, `errata.load`, `errata.score.harness.HarnessLM`") == []


def test_every_file_says_what_it_is() -> None:
    """The first line of its docstring stands beside it in docs/architecture.md."""
    silent = [str(path) for path in house.modules().values() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert silent == []


def test_the_public_face_is_thin() -> None:
    assert sorted(errata.__all__) == sorted({*house.public(), "__version__"}) == dir(errata)
    assert len(errata.__all__) <= 24 and {"load", "LM", "edit", "EditRequest", "Probe", "Case", "Patch", "Ledger"} <= set(errata.__all__)
