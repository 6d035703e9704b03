"""Editors at work for a ledger: a new edit on what runs, and the same edit once more on something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from errata import config, registry
from errata.core.bank import Stack
from errata.core.model import LM
from errata.core.patch import Patch
from errata.errors import LedgerError
from errata.ledger.database import Edit, Reader
from errata.request import EditRequest

Progress = Callable[[str, int, int], None]  # (stage, done, of)
MODES = {"single": 64, "batched": 10, "continual": 1}  # requests of one transaction, where not given


@dataclass(frozen=True)
class ConfiguredEditor:
    """A method with every hyper-parameter, ready for a model."""

    name: str
    editor: Any

    @classmethod
    def new(cls, lm: LM, method: str, settings: dict[str, Any], progress: Progress | None = None) -> ConfiguredEditor:
        """By name, from the method's preset for this model with ``settings`` on top."""
        editor = registry.get("method", method).for_model(lm, **settings)
        if hasattr(editor, "prepare"):
            editor.prepare(lm, lambda done, of: progress and progress("statistics, tokens", done, of))
        return cls(method, editor)

    @classmethod
    def again(cls, lm: LM, edit: Edit) -> ConfiguredEditor:
        """The one that made an edit."""
        if edit.settings is None:
            raise LedgerError(
                f"edit {edit.number} was brought in as a saved patch and cannot be made again; undo it as well, "
                "then give its requests anew (`errata ledger show` lists them)"
            )
        return cls.new(lm, edit.method, edit.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """All of them, as plain values."""
        return config.to_dict(self.editor)

    def make(
        self,
        lm: LM,
        requests: Sequence[EditRequest],
        mode: str,
        on: Stack,
        progress: Progress | None = None,
        losses: Callable[[float], None] | None = None,
    ) -> list[Patch]:
        """One patch a request on the bare base (single), or one for all on the stack ``on``.  ``losses``: told after each step."""
        joint = mode != "single" and len(requests) > 1
        steps = max(int(getattr(self.editor, "batched_steps" if joint else "steps", getattr(self.editor, "steps", 1))), 1)

        def told(step: int, running: int, loss: float) -> None:
            if losses is not None:
                losses(loss)
            if progress is not None:
                progress("steps", min(step, steps), steps)

        if mode != "single":
            return [self.editor.edit(lm, list(requests), on=on, progress=told)]
        return list(self.editor.edit_each(lm, list(requests), progress=told))


class SingleEditReplayer:
    """Edits made alone, once more, bit for bit: each with the batch it was made in, as its last bits may depend on what was trained beside
    it.  A batch is made once, for all its edits that are asked for."""

    def __init__(self, lm: LM, view: Reader) -> None:
        self.lm, self.view = lm, view
        self._made: dict[int, Patch] = {}

    def again(self, edit: Edit) -> Patch:
        """The patch of one."""
        if edit.number not in self._made:
            batch = [e for e in self.view.edits(live=False) if e.applied.id == edit.applied.id]
            patches = ConfiguredEditor.again(self.lm, edit).make(self.lm, [e.requests[0] for e in batch], "single", ())
            self._made |= {e.number: patch for e, patch in zip(batch, patches, strict=True)}
        return self._made[edit.number]
