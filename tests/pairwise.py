"""A few rows of a large product in which everything that can meet does meet: what is tested by default where the product takes minutes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

Row = tuple[str, ...]
Columns = Sequence[tuple[int, ...]]


def meetings(row: Row, columns: Columns) -> Iterator[tuple[tuple[int, ...], Row]]:
    """(columns, the row's values there) for each of the named tuples of columns."""
    for which in columns:
        yield which, tuple(row[c] for c in which)


def covering(rows: Sequence[Row], columns: Columns) -> list[Row]:
    """Rows, in their order, that show each tuple of values that ``rows`` show in each of the named tuples of columns.

    Greedy and always the same: what the fewest rows show comes first, by the row that shows most that is not shown yet; of equal ones the
    row whose values were taken least often.
    """
    showing: dict[tuple[tuple[int, ...], Row], list[Row]] = {}
    for row in rows:
        for one in meetings(row, columns):
            showing.setdefault(one, []).append(row)
    left, taken, used = dict.fromkeys(showing), set[Row](), Counter[tuple[int, str]]()
    for one, candidates in sorted(showing.items(), key=lambda item: len(item[1])):  # stable
        if one in left:
            best = max(
                candidates, key=lambda row: (sum(m in left for m in meetings(row, columns)), -sum(used[at] for at in enumerate(row)))
            )
            taken.add(best)
            used.update(enumerate(best))
            for shown in meetings(best, columns):
                left.pop(shown, None)
    return [row for row in rows if row in taken]


def some(rows: Iterable[Row], columns: Columns = ((0,), (1,))) -> list[Any]:
    """Parameters of a test: a covering of ``rows`` by default (of two columns, each value of either), the others when slow tests run."""
    rows = list(rows)
    few = set(covering(rows, columns))
    return [pytest.param(*row, marks=() if row in few else pytest.mark.slow) for row in rows]
