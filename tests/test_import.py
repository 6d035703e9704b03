"""`import errata` is light and changes nothing; every module imports only from its own floor or lower ones."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import house
import pytest

import errata

ROOT = Path(errata.__file__).parent

HEAVY = ("torch", "transformers", "numpy", "tokenizers", "safetensors")


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


def test_imports_keep_to_the_house() -> None:
    """Down only, no circle of files or rooms anywhere, no wing of methods from another wing.  See `house.FLOORS`."""
    assert house.faults() == []


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("core/tail.py", "from errata.score import metrics", "core (floor 1) imports from score (floor 3)"),
        ("core/tail.py", "def f():\n    from errata.cli import main", "core (floor 1) imports from cli (floor 6)"),
        ("core/tail.py", "if TYPE_CHECKING:\n    import errata.ledger", "core (floor 1) imports from ledger (floor 4)"),
        ("core/patch.py", "from errata import load", "a circle of files: errata.core.bank"),
        ("core/tokens.py", "import errata.core.decode", "a circle of files: errata.core.decode , errata.core.tokens"),
        ("ledger/state.py", "if TYPE_CHECKING:\n    from errata.ledger.ledger import Ledger", "a circle of files: errata.ledger"),
        ("run/executors.py", "from errata.export import bake\nfrom errata import ledger", None),
        ("export/engines.py", "from errata.ledger import undo", "a circle of rooms: export , ledger"),
        ("methods/wise/op.py", "from errata.methods.locate import values", "methods/wise imports from another wing, methods/locate"),
        ("methods/rep/op.py", "from errata.methods.locate import values", None),  # the one exception
        ("methods/wise/op.py", "from errata.methods import base", None),
        ("methods/wise/op.py", "from errata.benchmarks import facts", "an editor must not see benchmarks"),
        ("attic/__init__.py", "from errata import errors", "attic has no floor"),
    ],
)
def test_what_is_put_in_wrongly_is_found(tmp_path: Path, file: str, line: str, said: str | None) -> None:
    shutil.copytree(ROOT, tmp_path / "errata", ignore=lambda folder, names: [n for n in names if "." in n and not n.endswith(".py")])
    path = tmp_path / "errata" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + f"\n{line}\n", encoding="utf-8")
    found = house.faults(tmp_path)
    assert not found if said is None else any(said in fault for fault in found), found


def test_the_lowest_floor_needs_no_torch() -> None:
    """Its files import nothing heavy at the top."""
    for module, path in house.modules().items():
        if house.room(module) in house.LIGHT:
            heavy = [
                n
                for node in ast.parse(path.read_text(encoding="utf-8")).body
                for n in ([a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""])
                if n.partition(".")[0] in ("torch", "transformers", "tokenizers", "safetensors")
            ]
            assert not heavy, f"{path}: imports {heavy}"
