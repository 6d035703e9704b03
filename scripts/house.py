"""Which file of the package imports which, read with `ast`: what the import test judges and the picture in docs/architecture.md shows.

All imports count: those at the top, those inside functions, those under ``if TYPE_CHECKING``.  What is named by a string (`errata.registry`)
does not: that is how a lower floor reaches what is registered above it.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = "errata"
# From the bottom up.  A room imports from rooms below it or on its own floor, and no circle of rooms is allowed either.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "errors",
        "writing",
        "subjects",
        "documents",
        "request",
        "registry",
        "config",
        "storage",
        "endpoint",
        "published",
        "benchmarks",
        "report",
    ),
    ("core",),
    ("text", "contrast"),
    ("methods", "score", "trace"),
    ("editing", "run", "tune", "ledger", "export", "almanac", "analyse"),
    ("serve", "commands"),
    ("cli", "__main__"),
)
LIGHT = FLOORS[0]
# A wing of ``methods/`` imports no other; what two need is in ``core/``.  REP wraps a method of the locate-then-edit family.
EXCEPTIONS = {("methods/rep", "methods/locate")}


def modules(source: Path = SOURCE, package: str = PACKAGE) -> dict[str, Path]:
    """{dotted name: file} of every module of the package."""
    out = {}
    for path in sorted((source / package).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def public(source: Path = SOURCE, package: str = PACKAGE) -> dict[str, str]:
    """{name: module} of what the package's face loads on first use."""
    tree = ast.parse((source / package / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == "_PUBLIC" for t in targets) and node.value is not None:
                return dict(ast.literal_eval(node.value))
    return {}


@functools.cache
def _statements(text: str) -> tuple[ast.AST, ...]:
    """The import statements of a file, wherever they stand."""
    return tuple(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom))


def imports(source: Path = SOURCE, package: str = PACKAGE) -> dict[str, dict[str, int]]:
    """{module: {module of the package it imports: the line of the first import}}.  Importing a name counts as its module."""
    known, face = modules(source, package), public(source, package)
    out: dict[str, dict[str, int]] = {name: {} for name in known}
    for name, path in known.items():
        for node in _statements(path.read_text(encoding="utf-8")):
            for target in _targets(node, known, face, package, path):
                if target != name and name != package:  # the face names what it offers for type checkers; it runs nothing
                    out[name].setdefault(target, node.lineno)
    return out


def _targets(node: ast.AST, known: Mapping[str, Path], face: Mapping[str, str], package: str, path: Path) -> Iterable[str]:
    if isinstance(node, ast.Import):
        names = asked = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        if node.level:
            raise SystemExit(f"{path}:{node.lineno}: a relative import; write the whole name")
        names, asked = [f"{node.module}.{alias.name}" for alias in node.names], [node.module or ""]
    else:
        return
    if gone := [name for name in asked if name.split(".")[0] == package and name not in known]:
        raise SystemExit(f"{path}:{node.lineno}: there is no module {gone[0]}")
    for name in (n for n in names if n.split(".")[0] == package):
        if name.startswith(f"{package}.") and (own := face.get(name.removeprefix(f"{package}."))):
            yield own
            continue
        while name not in known:
            name = name.rpartition(".")[0]
        yield name


def room(module: str) -> str:
    """``core``, ``methods/wise``, ``cli`` …: the part of the house a module is in; "" for the package itself."""
    parts = module.split(".")[1:]
    if not parts:
        return ""
    return "/".join(parts[:2]) if parts[0] == "methods" and len(parts) > 1 else parts[0]


def floor(room: str) -> int:
    """`KeyError` for a room that has none."""
    return {name: i for i, names in enumerate(FLOORS) for name in names}[room.split("/")[0]]


def rooms(found: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """{room: rooms it imports from}."""
    out: dict[str, set[str]] = {}
    for module, targets in found.items():
        own = out.setdefault(room(module), set())
        own |= {room(t) for t in targets} - {room(module), ""}
    out.pop("", None)
    return out


def cycles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Every set of two or more nodes that all reach each other (Tarjan 1972), sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    out: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                out.append(sorted(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(out)


def faults(source: Path = SOURCE, package: str = PACKAGE) -> list[str]:
    """What is wrong with the imports of a tree, a sentence each."""
    found = imports(source, package)
    out = [f"a circle of files: {' , '.join(c)}" for c in cycles(found)]
    out += [f"a circle of rooms: {' , '.join(c)}" for c in cycles(rooms(found))]
    paths = modules(source, package)
    for module, targets in found.items():
        for target, line in targets.items():
            here, there = room(module), room(target)
            where = f"{paths[module].relative_to(source)}:{line}"
            if not here or not there:
                continue
            try:
                up = floor(there) > floor(here)
            except KeyError as error:
                out.append(f"{where}: {error.args[0]} has no floor; add it to FLOORS in scripts/house.py")
                continue
            if up:
                out.append(f"{where}: {here} (floor {floor(here)}) imports from {there} (floor {floor(there)})")
            if here.startswith("methods/") and there in ("score", "benchmarks"):
                out.append(f"{where}: an editor must not see {there}")
            both = here.startswith("methods/") and there.startswith("methods/") and here != there
            if both and _wing(source, package, here) and _wing(source, package, there) and (here, there) not in EXCEPTIONS:
                out.append(f"{where}: {here} imports from another wing, {there}; what two wings need belongs in core/")
    return out


def _wing(source: Path, package: str, name: str) -> bool:
    """A folder of methods; ``methods/base.py`` is one file that all share."""
    return (source / package / name).is_dir()
