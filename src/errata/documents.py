"""JSON and YAML that others wrote, or that lay on a disk: read as `json` and `yaml` do, without what surprises later.

A key that stands twice in one object would silently be the last one's.  What is nested a thousand deep, or grows to millions of values by
aliases, would end or stall whatever looks at it next.  Each is a `ValueError` here, as is all that is not valid in the first place.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any

_DEEPEST = 64  # lists and objects inside each other
_MOST = 100_000  # values of a YAML text, aliases counted as often as they stand there
_LONGEST = 1 << 17  # characters of a YAML text, which are read at some 100 a millisecond
_BITS = 4096  # of a whole number: above it Python refuses to write the number down


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's ``object_pairs_hook``: `ValueError` for a key that stands twice in one object."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(names) if key in names[:i])
        raise ValueError(f"key {twice!r} stands twice in one object; leave one of them out")
    return out


def parse_json(text: str | bytes, **how: Any) -> Any:
    """`json.loads` with ``how``; `ValueError` also for a key that stands twice, and for what is nested deeper than `_DEEPEST`."""
    try:
        found = json.loads(text, object_pairs_hook=once, **how)
    except RecursionError:
        raise ValueError(f"nested deeper than {_DEEPEST} lists and objects") from None
    check_depth(found)
    return found


def check_depth(value: Any) -> None:
    """`ValueError` for what is nested deeper than `_DEEPEST`."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [v for inner in level for v in _inside(inner)]
        if not level:
            return
    raise ValueError(f"nested deeper than {_DEEPEST} lists and objects")


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def parse_yaml(text: str) -> Any:
    """`yaml.safe_load`; `ValueError` with line and column, also for a key that stands twice, for nesting deeper than `_DEEPEST`, for
    aliases that grow, and for a value that is not what its tag says (``!!bool maybe``)."""
    import yaml

    if len(text) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST} characters")
    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        mark, said = getattr(error, "problem_mark", None), [getattr(error, part, None) for part in ("context", "problem")]
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ValueError(where + (", ".join(filter(None, said)) or " ".join(str(error).split()))) from None


@functools.cache
def _loader() -> Any:
    """yaml's safe loader with what `parse_yaml` adds; made on first use, as yaml is loaded then."""
    import yaml

    def wrong(node: Any, what: str) -> yaml.YAMLError:
        return yaml.constructor.ConstructorError(None, None, what, node.start_mark)

    class Loader(yaml.SafeLoader):
        depth = 0

        def get_single_node(self) -> Any:
            node = super().get_single_node()
            if node is not None:
                _weigh(node, wrong)
            return node

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > _DEEPEST + 1:
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.composer.ComposerError(None, None, f"nested deeper than {_DEEPEST} lists and objects", mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                found = super().construct_object(node, deep)
            except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
                raise wrong(node, f"{str(node.value)[:40]!r} is no {node.tag.rpartition(':')[2]}") from None
            if isinstance(found, int) and found.bit_length() > _BITS:
                raise wrong(node, "a number of so many digits cannot be used")
            return found

        def flatten_mapping(self, node: Any) -> None:
            keys: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in keys:
                        raise wrong(key, f"key {key.value!r} stands twice in one mapping; leave one of them out")
                    keys.add((key.tag, key.value))
            super().flatten_mapping(node)

    return Loader


def _weigh(root: Any, wrong: Any) -> None:
    """Refuse a composed text whose values, with aliases written out, are too many or too deep.  Anchors stand before their aliases, so what
    an alias names was weighed already; one that is not names a list it is in."""
    weights: dict[int, tuple[int, int] | None] = {}

    def weigh(node: Any) -> tuple[int, int]:
        if id(node) in weights:
            if (known := weights[id(node)]) is None:
                raise wrong(node, "an alias stands inside what it names")
            return known
        weights[id(node)] = None
        inner = [weigh(part) for part in _parts(node)]
        count, depth = 1 + sum(c for c, _ in inner), bool(node.id != "scalar") + max((d for _, d in inner), default=0)
        if count > _MOST:
            raise wrong(node, f"more than {_MOST} values, aliases written out")
        if depth > _DEEPEST:
            raise wrong(node, f"nested deeper than {_DEEPEST} lists and objects, aliases written out")
        weights[id(node)] = count, depth
        return count, depth

    weigh(root)


def _parts(node: Any) -> Iterator[Any]:
    if node.id == "mapping":
        for pair in node.value:
            yield from pair
    elif node.id == "sequence":
        yield from node.value
