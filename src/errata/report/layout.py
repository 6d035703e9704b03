"""A table as text: for a terminal, Markdown and LaTeX.  What stands in it is said elsewhere (`errata.report.tables`, `contents`)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

UNHOLDABLE: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_LATEX: Final = {
    **{c: "\\" + c for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
}


@dataclass(frozen=True)
class Table:
    """``words``: leading columns that hold words, set flush left; ``pinned``: first lines that stay first however one sorts.

    key  the protocol, or what else the table is about
    """

    title: str
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str = ""
    words: int = 1
    pinned: int = 0
    key: str = ""

    @property
    def turned(self) -> Table:
        """Lines as columns; only of a table with one column of words."""
        heads = ["metric", *(line[0] for line in self.lines)]
        body = [[name, *cells] for name, *cells in zip(self.headings[1:], *(line[1:] for line in self.lines), strict=True)]
        return Table(self.title, heads, body, self.note, 1, 0, self.key)


def plain(text: object) -> str:
    """One line without what a file, a page or a terminal cannot hold: control characters and lone surrogates become "�"."""
    return " ".join(UNHOLDABLE.sub("�", str(text)).split())


def width(text: str) -> int:
    """Terminal columns: wide East Asian characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, to: int, right: bool) -> str:
    gap = " " * (to - width(text))
    return gap + text if right else text + gap


def _joined(tables: Iterable[Table], one: Callable[[Table], str]) -> str:
    blocks = [one(table) for table in tables]
    return "\n\n".join(blocks) + ("\n" if blocks else "")


def terminal(tables: Iterable[Table]) -> str:
    """Plain text with aligned columns; "" without tables."""
    return _joined(tables, _terminal)


def _terminal(table: Table) -> str:
    every = [[plain(part) for part in line] for line in (table.headings, *table.lines)]
    widths = [max(width(line[i]) for line in every) for i in range(len(table.headings))]
    text = ["  ".join(_pad(part, widths[i], right=i >= table.words) for i, part in enumerate(line)).rstrip() for line in every]
    text.insert(1, "  ".join("─" * w for w in widths))
    return "\n".join([plain(table.title), "", *text, *(["", plain(table.note)] if table.note else [])])


def markdown(tables: Iterable[Table]) -> str:
    """The same as Markdown tables."""
    return _joined(tables, _markdown)


def _markdown(table: Table) -> str:
    rule = ["---"] * table.words + ["---:"] * (len(table.headings) - table.words)
    text = ["| " + " | ".join(map(cell, line)) + " |" for line in (table.headings, rule, *table.lines)]
    return "\n".join([f"**{cell(table.title)}**", "", *text, *(["", cell(table.note)] if table.note else [])])


def cell(text: object) -> str:
    """A text in Markdown: a bar would end the cell, a line break the row, and a tag would be read as one."""
    return plain(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def latex(tables: Iterable[Table]) -> str:
    """`table` environments with booktabs rules, to be \\input; intervals are set small below their values."""
    return _joined(tables, _latex)


def escaped(text: object) -> str:
    """A text for LaTeX: nothing in it is a command."""
    return "".join(_LATEX.get(c, c) for c in plain(text))


def _latex(table: Table) -> str:
    if table.words == 1 and 2 <= len(table.lines) < len(table.headings):  # a page is narrow
        table = table.turned
    columns = "l" * table.words + "r" * (len(table.headings) - table.words)
    head, *body = (" & ".join(map(_latex_cell, line)) + r" \\" for line in (table.headings, *table.lines))
    note = [rf"\par\smallskip{{\footnotesize {escaped(table.note)}}}"] if table.note else []
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering\small\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{escaped(table.title)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            *note,
            r"\end{table}",
        ]
    )


def _latex_cell(text: str) -> str:
    value, bracket, interval = plain(text).partition(" [")
    if bracket and interval.rstrip(" *").endswith("]"):
        return rf"\shortstack[r]{{{escaped(value)}\\{{\tiny {escaped('[' + interval)}}}}}"
    # A bracket at the beginning of a line would be read as an argument of the \\ before it.
    return ("{}" if text.startswith("[") else "") + escaped(text)
