"""Hyper-parameters out of docstrings: the lines that describe fields, and what is left of the text."""

from __future__ import annotations

import dataclasses
import inspect
import re

ENTRY = re.compile(r"([a-z_0-9]+(?:, [a-z_0-9]+)*)(?:\s{2,}(.+))?$")


def described(method: type) -> tuple[dict[str, str], list[str]]:
    """(field -> what it means, other paragraphs) of a method's own docstring and those of the classes it builds on.

    A description starts at the margin with the names of fields and two spaces, or with names alone on their line, and goes on
    indented.  Several names share one.  A ``name`` inside another's description is described by it, if it has no line of its own.
    Paragraphs of a method that this one is made from stay on that method's page.
    """
    names = {f.name for f in dataclasses.fields(method)}
    meanings: dict[str, str] = {}
    prose: list[str] = []
    for cls in (c for c in reversed(method.__mro__) if dataclasses.is_dataclass(c)):
        another = "name" in vars(cls) and cls is not method
        open_fields: list[str] = []
        paragraph: list[str] = []
        for line in [*inspect.cleandoc(cls.__doc__ or "").splitlines(), ""]:
            found = ENTRY.match(line)
            entry = found is not None and set(found[1].split(", ")) <= names
            if entry and found is not None:
                _close(prose, paragraph, another)
                open_fields = found[1].split(", ")
                meanings.update(dict.fromkeys(open_fields, (found[2] or "").strip()))
            elif line.startswith("  ") and open_fields:
                meanings.update({f: f"{meanings[f]} {line.strip()}".strip() for f in open_fields})
            elif line.strip():
                open_fields = []
                paragraph.append(line)
            else:
                open_fields = []
                _close(prose, paragraph, another)
    return {**_mentioned(meanings, names), **meanings}, prose


def _close(prose: list[str], paragraph: list[str], another: bool) -> None:
    if paragraph and not another:
        prose.append("\n".join(paragraph))
    paragraph.clear()


def _mentioned(meanings: dict[str, str], names: set[str]) -> dict[str, str]:
    """Fields without a line of their own that another's line explains."""
    out = {}
    for text in meanings.values():
        for name in re.findall(r"``([a-z_0-9]+)``", text):
            if name in names and name not in meanings:
                out.setdefault(name, text)
    return out
