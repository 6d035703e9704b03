"""What docs/architecture.md shows of the code itself: the picture of the rooms, from the imports, and a line a file, from the docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import house

PICTURE = "assets/house.svg"
NAMES = ("", "no torch", "the engine", "text", "editors and scorers", "what is done with them", "to the outside", "the command")
TOP = 26  # of a band above its boxes
BOX, GAP, BAND, LEFT, WIDTH = 30, 12, 84, 150, 1180
FONT = "font-family='system-ui, sans-serif'"


def reduced(graph: Mapping[str, Iterable[str]]) -> dict[str, set[str]]:
    """Arrows that no longer way round says already (the transitive reduction of a graph without circles)."""
    below: dict[str, set[str]] = {}

    def reach(node: str) -> set[str]:
        if node not in below:
            own = set(graph.get(node, ()))
            below[node] = own.union(*(reach(n) for n in own)) if own else set()
        return below[node]

    out = {}
    for node in graph:
        own = set(graph[node])
        out[node] = {n for n in own if not any(n in reach(other) for other in own - {n})}
    return out


def halls() -> dict[str, set[str]]:
    """{room: rooms it imports from}, the wings of ``methods`` as one."""
    out: dict[str, set[str]] = {}
    for room, targets in house.rooms(house.imports()).items():
        own = out.setdefault(room.split("/")[0], set())
        own |= {t.split("/")[0] for t in targets}
    return {room: targets - {room} for room, targets in out.items()}


def wings() -> list[str]:
    return sorted(p.name for p in (house.SOURCE / house.PACKAGE / "methods").iterdir() if (p / "__init__.py").exists())


def _widths(names: Iterable[str]) -> list[tuple[str, int]]:
    return [(name, 280 if name == "methods" else 26 + 8 * len(name)) for name in names]


def places() -> dict[str, tuple[float, float, float, float]]:
    """{room: (left, top, width, height)}; the highest floor on top, each floor's rooms spread over the width."""
    out = {}
    for floor, names in enumerate(house.FLOORS):
        boxes = _widths(names)
        y = TOP + (len(house.FLOORS) - 1 - floor) * BAND
        free = (WIDTH - LEFT - 20 - sum(w for _, w in boxes)) / (len(boxes) + 1)
        x = LEFT + free
        for name, w in boxes:
            out[name] = (x, float(y), float(w), float(BOX + (16 if name == "methods" else 0)))
            x += w + free
    return out


def picture() -> str:
    """The SVG: a band a floor, a box a room, an arrow where one imports from another and no longer way round says so."""
    at, height = places(), TOP + len(house.FLOORS) * BAND
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' {FONT} font-size='13' role='img'>",
        "<title>Rooms of errata on their floors; arrows point to what is imported</title>",
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0 0L8 4L0 8z' fill='#777'/></marker></defs>",
        f"<rect width='{WIDTH}' height='{height}' fill='#fff'/>",
    ]
    for floor in range(len(house.FLOORS)):
        y = (len(house.FLOORS) - 1 - floor) * BAND
        shade = "#f6f6f8" if floor % 2 else "#fff"
        parts.append(f"<rect y='{y}' width='{WIDTH}' height='{BAND}' fill='{shade}'/>")
        parts.append(f"<text x='12' y='{y + TOP + 20}' fill='#666'>{floor}  {escape(NAMES[floor + 1])}</text>")
    for room, targets in sorted(reduced(halls()).items()):
        parts += [_arrow(at[room], at[target]) for target in sorted(targets)]
    for room, (x, y, w, h) in at.items():
        parts.append(f"<rect x='{x:.0f}' y='{y:.0f}' width='{w:.0f}' height='{h:.0f}' rx='5' fill='#fff' stroke='#334'/>")
        parts.append(f"<text x='{x + w / 2:.0f}' y='{y + 20:.0f}' text-anchor='middle' fill='#112'>{room}</text>")
        if room == "methods":
            inside = " ".join(wings())
            parts.append(f"<text x='{x + w / 2:.0f}' y='{y + 37:.0f}' text-anchor='middle' font-size='8.5' fill='#445'>{inside}</text>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _arrow(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> str:
    """From the lower edge of a box to the upper edge of one below; between boxes of one floor, over their tops."""
    (x, y, w, h), (u, v, s, _) = one, other
    a, b = x + w / 2, u + s / 2
    if v == y:
        rise = 8 + 0.022 * abs(a - b)
        path = f"M{a:.0f} {y:.0f}C{a:.0f} {y - rise:.0f} {b:.0f} {v - rise:.0f} {b:.0f} {v - 1:.0f}"
    else:
        path = f"M{a:.0f} {y + h:.0f}C{a:.0f} {y + h + 40:.0f} {b:.0f} {v - 40:.0f} {b:.0f} {v - 1:.0f}"
    return f"<path d='{path}' fill='none' stroke='#777' stroke-width='1.1' marker-end='url(#tip)'/>"


def sentence(path: Path) -> str:
    """The first sentence of a file's docstring, as Markdown in a table's cell."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    first = re.split(r"(?<=[.;:])\s{1,2}(?=[A-Z`\"*])", text)[0] if len(text) > 150 else text
    return re.sub(r"``(.+?)``", r"`\1`", first).replace("|", "\\|").replace("<", "&lt;").rstrip(":;")


def files() -> str:
    """A line a file, floor by floor from the top, room by room."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for module, path in house.modules().items():
        found.setdefault(house.room(module), []).append((module, path))
    out = []
    for floor in reversed(range(len(house.FLOORS))):
        rows = ["| file | what it is |", "| --- | --- |"]
        for top in house.FLOORS[floor]:
            for room in sorted(r for r in found if r.split("/")[0] == top):
                for _, path in sorted(found[room], key=lambda pair: (pair[1].name != "__init__.py", pair[1].name)):
                    shown = path.relative_to(house.SOURCE / house.PACKAGE)
                    name = f"**{shown.parent}/**" if path.name == "__init__.py" else str(shown)
                    rows.append(f"| {name} | {sentence(path)} |")
        out.append(f"### Floor {floor}: {NAMES[floor + 1]}\n\n" + "\n".join(rows))
    return "\n\n".join(out)


def parts() -> dict[str, str]:
    alt = "The rooms of errata on their floors, with an arrow from each room to those it imports from"
    return {"house": f"![{alt}]({PICTURE})", "files": files()}
