"""The unedited model, as a method: a row in every table that says what the others must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from errata.core.bank import Stack
from errata.core.lanes import Progress
from errata.core.model import LM
from errata.core.patch import Patch
from errata.core.tail import Tail
from errata.methods.base import Editor
from errata.request import EditRequest


@dataclass(frozen=True)
class Unedited(Editor):
    """A patch that names its requests and holds no op: under it the model is the base, bit for bit.  It stands on its own on a stack."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = "the unedited model"
    needs: ClassVar[frozenset[str]] = frozenset()

    def edit(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> Patch:
        """One patch for all requests."""
        self.require_requests([requests])
        if progress is not None:
            progress(1, 0, 0.0)
        return Patch(self.name, {}, lm.fingerprint, tuple(requests), ())

    def edit_each(
        self, lm: LM, requests: Sequence[EditRequest], *, on: Stack = (), runner: Any = Tail, progress: Progress | None = None
    ) -> list[Patch]:
        """A patch for each request."""
        if progress is not None and requests:
            progress(1, 0, 0.0)
        return [self.edit(lm, [r], on=on) for r in requests]
