"""`import errata` is light and changes nothing; every module imports only from its own floor or lower ones."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import errata

ROOT = Path(errata.__file__).parent
HEAVY = ("torch", "transformers", "numpy", "tokenizers", "safetensors")
FLOORS = {
    **dict.fromkeys(("errors", "request", "registry", "config", "storage", "endpoint", "benchmarks", "report", "published"), 0),
    **dict.fromkeys(("families", "texts", "tokens", "decode", "patch", "weights", "offload"), 1),
    **dict.fromkeys(("bank", "context", "embed", "model", "tail", "fit", "lanes", "problems", "read", "stats", "surfaces"), 2),
    **dict.fromkeys(("methods", "trace", "score"), 3),
    **dict.fromkeys(("run", "ledger", "export", "almanac", "analyse"), 4),
    **dict.fromkeys(("__main__", "cli", "commands", "serve"), 5),
}
MODULES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def fresh(code: str) -> dict[str, object]:
    """What a new interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_light_and_changes_nothing() -> None:
    code = """
import json, logging, os, signal, sys, warnings
def state():
    return [dict(os.environ), len(logging.root.handlers), logging.root.level, list(map(str, warnings.filters)), str(sys.excepthook),
            str(signal.getsignal(signal.SIGINT)), list(sys.path)]
before = state()
import errata
names = dir(errata)
print(json.dumps({"same": state() == before, "modules": sorted(sys.modules), "names": names}))
"""
    found = fresh(code)
    assert found["same"]
    assert not [m for m in found["modules"] if m.partition(".")[0] in (*HEAVY, "rich", "yaml")]
    assert {"load", "edit", "Patch", "LM"} <= set(found["names"])


@pytest.mark.parametrize(
    "argument",
    [
        "--help",
        "--version",
        "edit --help",
        "score --help",
        "report --help",
        "patch show --help",
        "patch bake --help",
        "surfaces --help",
        "serve --help",
    ],
)
def test_help_and_version_load_no_torch(argument: str) -> None:
    code = f"""
import contextlib, io, json, sys
import errata.cli
out = io.StringIO()
with contextlib.redirect_stdout(out):
    code = errata.cli.main({argument.split()!r})
print(json.dumps({{"code": code, "text": out.getvalue(), "modules": sorted(sys.modules)}}))
"""
    found = fresh(code)
    assert found["code"] == 0 and "errata" in found["text"]
    assert not [m for m in found["modules"] if m.partition(".")[0] in HEAVY]


def test_public_names_resolve() -> None:
    for name in errata.__all__:
        assert getattr(errata, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = errata.lod


def component(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


def runtime_nodes(tree: ast.AST) -> list[ast.AST]:
    """All nodes that run: what stands under ``if TYPE_CHECKING`` is left out."""
    out: list[ast.AST] = []
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        out.append(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            todo += node.orelse
        else:
            todo += ast.iter_child_nodes(node)
    return out


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, component of errata) of each import, also those inside functions."""
    found: list[tuple[int, str]] = []
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [node.module or ""] if node.module != "errata" else [f"errata.{a.name}" for a in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "errata" and rest:
                target = errata._PUBLIC.get(rest, f"errata.{rest}")  # ``from errata import load`` means errata.model
                found.append((node.lineno, target.split(".")[1]))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_floors(path: Path) -> None:
    own = component(path.relative_to(ROOT).parts)
    assert own in FLOORS, f"{own} has no floor; add it to FLOORS in this test"
    for line, other in imported(path):
        if other == "__version__":
            continue
        assert other in FLOORS, f"{path}:{line}: imports errata.{other}, which has no floor"
        assert FLOORS[other] <= FLOORS[own], f"{path}:{line}: floor {FLOORS[own]} ({own}) imports from floor {FLOORS[other]} ({other})"
        if own == "methods":
            assert other not in ("score", "benchmarks"), f"{path}:{line}: an editor must not see {other}"


def test_the_floor_test_sees_lazy_imports(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from errata.cli import main\n"
        "def f():\n    from errata.score import metrics\n    from errata import load, registry\n    import errata.patch\n"
    )
    assert sorted(name for _, name in imported(path)) == ["model", "patch", "registry", "score"]
