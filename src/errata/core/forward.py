"""What runs of a forward pass: a pass that is stopped once everything asked for was seen, and a pass that no hook sees."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StopForward(Exception):
    """Raised by a hook that has seen what it was there for; whoever began the pass catches it."""


@contextmanager
def hooks_disabled(hf: Any) -> Iterator[None]:
    """Inside, no hook of any module of ``hf`` runs, of patches or watchers: the base, unseen by who reads the pass around it."""
    kept = [(m, name, getattr(m, name)) for m in hf.modules() for name in ("_forward_hooks", "_forward_pre_hooks") if getattr(m, name)]
    for module, name, _ in kept:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)
