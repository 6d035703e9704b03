"""A job: an edit (or the taking back of one) that waits, runs in the background and ends; who watches it is told of every change."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from errata.ledger.findings import Finding
from errata.request import EditRequest

_ENDED = ("done", "failed", "cancelled")


class JobCancelled(BaseException):
    """Raised in the thread that edits, out of whatever runs there; the transaction is rolled back."""


@dataclass(frozen=True)
class EditSpec:
    """What to apply: see `errata.ledger.Ledger.iter_apply`."""

    requests: tuple[EditRequest, ...]
    method: str
    settings: dict[str, Any]
    mode: str
    author: str
    reason: str
    force: bool
    size: int | None = None


@dataclass(eq=False)
class Job:
    """``work``: what is done, in the thread that edits; its result is of an undo.  Everything else is what is told of it."""

    plan: EditSpec | None
    work: Callable[[Job], Any]
    id: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex[:16]}")
    status: str = "queued"
    stage: str | None = None
    step: int = 0
    steps: int = 0
    loss: float | None = None
    edits: list[int] = field(default_factory=list)
    error: dict[str, Any] | None = None
    findings: list[dict[str, Any]] = field(default_factory=list)
    result: Any = None
    failure: BaseException | None = None
    cancelled: bool = False
    version: int = 0
    _watchers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def ended(self) -> bool:
        return self.status in _ENDED

    def document(self) -> dict[str, Any]:
        """As plain JSON values."""
        plan = self.plan
        return {
            "id": self.id,
            "status": self.status,
            "method": "undo" if plan is None else plan.method,
            "mode": None if plan is None else plan.mode,
            "requests": [] if plan is None else [r.to_dict() for r in plan.requests],
            "stage": self.stage,
            "step": self.step,
            "steps": self.steps,
            "loss": self.loss if self.loss is not None and math.isfinite(self.loss) else None,
            "edits": list(self.edits),
            "error": self.error,
            "findings": list(self.findings),
        }

    def change(self, **values: Any) -> None:
        """New values, and everyone who watches is woken."""
        with self._lock:
            for name, value in values.items():
                setattr(self, name, value)
            self.version += 1
            watchers = list(self._watchers)
        for loop, event in watchers:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    def progress(self, stage: str, done: int, of: int) -> None:
        """As editors and the ledger tell it."""
        if stage != "edits":  # that comes after a commit, which is told of before anything stops
            self.check()
        self.change(status="editing", stage=stage, step=done, steps=of)

    def losses(self, loss: float) -> None:
        self.check()
        self.loss = loss

    def check(self) -> None:
        """`JobCancelled` if it is."""
        if self.cancelled:
            raise JobCancelled

    def watch(self) -> asyncio.Event:
        """Set at every change, until `unwatch`."""
        event = asyncio.Event()
        with self._lock:
            self._watchers.append((asyncio.get_running_loop(), event))
        return event

    def unwatch(self, event: asyncio.Event) -> None:
        with self._lock:
            self._watchers = [pair for pair in self._watchers if pair[1] is not event]


def finding_document(finding: Finding) -> dict[str, Any]:
    """A finding as plain JSON values."""
    return {**dataclasses.asdict(finding), "request": finding.request.to_dict()}
