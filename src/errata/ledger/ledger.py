"""`Ledger`: the durable record of which edits are on, and its verbs.

Reading the record is safe in any thread; what runs the model (`apply`, `blame`, `diff`, `check`, remaking) must be the only one that
runs it.  A verb's file says what it does; here they are only offered as methods.
"""

from __future__ import annotations

import getpass
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from errata import storage
from errata.core.model import LM
from errata.core.patch import Patch
from errata.errors import LedgerError, StorageError
from errata.ledger import apply, blame, check, compact, diff, export, findings, undo
from errata.ledger.database import WAIT, Edit, LedgerDatabase
from errata.ledger.editors import Progress
from errata.ledger.state import LedgerState, as_text
from errata.request import EditRequest


class Ledger(LedgerState):
    """Made by `Ledger.open`."""

    @classmethod
    def open(cls, folder: str | Path, lm: LM | None = None, *, author: str | None = None, wait: float = WAIT) -> Ledger:
        """The ledger in ``folder``, a new one where there is none (which needs ``lm``).

        Without ``lm`` the record can be read and edits taken back; what runs the model needs it.  ``author``: of the changes made
        through this object; the login name where not given.  ``wait``: seconds to wait for another writer.
        """
        folder, record = Path(folder), LedgerDatabase(Path(folder), wait)
        if not record.exists():
            if lm is None:
                raise LedgerError(f"{folder} holds no ledger; `errata ledger apply {folder} --model MODEL …` begins one")
            taken = [p.name for p in folder.iterdir()] if folder.is_dir() else []
            if folder.exists() and (not folder.is_dir() or any(not n.startswith(record.path.name) and n != "patches" for n in taken)):
                raise StorageError(f"{folder} exists and is not a ledger; it is left alone, give another name")
            if "patches" in taken and any((folder / "patches").iterdir()):  # beginning anew would sweep them away
                raise StorageError(
                    f"{folder} holds patches and no {record.path.name}, or an empty one; bring it back from a "
                    "copy, or take the patches into a new ledger (`errata ledger apply NEW --patch …`)"
                )
            with storage.disk_errors(folder):
                (folder / "patches").mkdir(parents=True, exist_ok=True)
            record.create({"base": lm.fingerprint, "model": lm.name})
            storage.flush([folder])
        ledger = cls(folder, record, lm, author or _login())
        as_text("author", ledger.author)
        if lm is not None and (base := ledger.meta("base")) != lm.fingerprint:
            raise LedgerError(
                f"{folder} is of base {base}, this model is {lm.fingerprint}; load {ledger.meta('model')!r}, or begin another"
            )
        with record.read_transaction() as view:
            view.check()
        ledger.recover()
        return ledger

    def apply(
        self,
        requests: Sequence[EditRequest],
        *,
        method: str = "baft",
        settings: dict[str, Any] | None = None,
        mode: str = "single",
        size: int | None = None,
        reason: str = "",
        force: bool = False,
        progress: Progress | None = None,
    ) -> list[Edit]:
        """Make edits now; see `errata.ledger.apply.iter_apply`."""
        parts = self.iter_apply(
            requests, method=method, settings=settings, mode=mode, size=size, reason=reason, force=force, progress=progress
        )
        return [edit for part in parts for edit in part]

    def iter_apply(
        self,
        requests: Sequence[EditRequest],
        *,
        method: str = "baft",
        settings: dict[str, Any] | None = None,
        mode: str = "single",
        size: int | None = None,
        reason: str = "",
        force: bool = False,
        progress: Progress | None = None,
        losses: Callable[[float], None] | None = None,
    ) -> Iterator[list[Edit]]:
        """As `apply`, yielding the edits of each transaction once they are on the disk; ``losses`` is told the loss after each step."""
        return apply.iter_apply(
            self, requests, method=method, settings=settings, mode=mode, size=size, reason=reason, force=force, progress=progress,
            losses=losses,
        )  # fmt: skip

    def apply_patches(self, patches: Sequence[Patch], *, reason: str = "", force: bool = False) -> list[Edit]:
        """Apply saved patches; see `errata.ledger.apply.apply_patches`."""
        return apply.apply_patches(self, patches, reason, force)

    def findings(self, requests: Sequence[EditRequest]) -> list[findings.Finding]:
        """What is odd about requests, against what is live now."""
        return apply.find_oddities(self, requests)

    def undo(self, number: int, *, remake: bool = False, reason: str = "", progress: Progress | None = None) -> undo.UndoResult:
        """Take an edit back; see `errata.ledger.undo`."""
        as_text("reason", reason)
        return undo.undo(self, number, remake, reason, progress)

    def compact(self, *, merge: bool = True, lean: bool = False, reason: str = "") -> compact.CompactResult:
        """Merge weight-like patches, drop folders; see `errata.ledger.compact`."""
        as_text("reason", reason)
        return compact.compact(self, merge, lean, reason)

    def blame(self, prompt: str, *, tokens: int = 12) -> blame.Blame:
        """Which live edits change the answer; see `errata.ledger.blame`."""
        return blame.blame(self, prompt, tokens)

    def diff(
        self, prompts: Sequence[str], before: str | int = "base", after: str | int = "live", *, tokens: int = 12
    ) -> list[diff.AnswerDiff]:
        """Answers in two states; see `errata.ledger.diff`."""
        return diff.diff(self, prompts, before, after, tokens)

    def check(self, *, repair: bool = False, progress: Progress | None = None) -> check.CheckResult:
        """Ask every live edit again; see `errata.ledger.check`."""
        return check.check(self, repair, progress)

    def export(
        self, out: str | Path, *, rank: int | None = None, every_block: bool = False, checkpoint: bool = False, gguf: bool = False
    ) -> export.ExportResult:
        """The live stack as folders for others; see `errata.ledger.export`."""
        return export.export(self, Path(out), rank, every_block, checkpoint, gguf)


def _login() -> str:
    try:
        return getpass.getuser().encode("utf-8", "replace").decode()
    except (KeyError, OSError, ImportError):  # a user without a name, as in some containers
        return "unknown"
