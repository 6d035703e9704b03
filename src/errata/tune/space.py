"""What a search tries: values of a method's settings, blocks as parts of the model's depth.

``Editor.TUNES`` says it: {setting: values}, in the order in which settings are looked at.  A value of ``layers``, ``layer`` and ``block``
is the relative depth of the last block that is edited (a method that edits several side by side by its rule edits as many here), or
"trace": the block on whose MLP the facts hang most by a causal trace.  A value that is a mapping sets several settings at once; its name is
then only a heading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from errata.errors import ConfigError

_TRACE: Final = "trace"
_BLOCKS: Final = ("layers", "layer", "block")


def _nearest_block(part: float, depth: int) -> int:
    """The block at a relative depth."""
    return min(depth - 1, int(depth * part + 0.5))


def blocks_at(value: Any, rule: Any, depth: int) -> Any:
    """A value of ``layers`` or ``layer`` from a relative depth, or a block's number: as many blocks side by side as the rule's, the last
    of them there."""
    last = _nearest_block(value, depth) if isinstance(value, float) else int(value)
    if not isinstance(rule, list | tuple):
        return last
    count = min(len(rule), last + 1)
    return list(range(last - count + 1, last + 1))


def values_of(name: str, tries: Any, now: Any, depth: int, traced: int | None) -> list[Any]:
    """What to try for a setting whose value is ``now``, without that and without one value twice."""
    out: list[Any] = []
    for value in tries:
        if isinstance(value, Mapping):
            out.append(dict(value))
            continue
        if name in _BLOCKS:
            if value == _TRACE and traced is None:
                continue
            value = blocks_at(traced if value == _TRACE else value, now, depth)
        if value != now and value not in out:
            out.append(value)
    return out


def carried(settings: Mapping[str, Any], depth: int, to: int) -> dict[str, Any]:
    """Settings of a model of ``depth`` blocks for one of ``to``: blocks at the same relative depths, all else as it is."""
    if depth < 1 or to < 1:
        raise ConfigError("a model has at least one block")

    def moved(block: int) -> int:
        return min(to - 1, int(block / depth * to + 0.5))

    out = dict(settings)
    for name in _BLOCKS:
        value = out.get(name)
        if isinstance(value, list | tuple) and value:
            last = moved(max(value))
            side_by_side = list(value) == list(range(min(value), max(value) + 1))
            out[name] = list(range(max(0, last - len(value) + 1), last + 1)) if side_by_side else sorted({moved(b) for b in value})
        elif isinstance(value, int):
            out[name] = moved(value)
    return out
