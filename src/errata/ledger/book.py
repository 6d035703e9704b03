"""`Ledger`: the durable record of which edits are on, and its verbs.

    folder/ledger.db       SQLite: events, edits, what stands on the stack since and until when (`errata.ledger.record`)
    folder/patches/<id>/   patch folders, on the disk before a transaction speaks of them (`errata.ledger.shelf`)

A change holds SQLite's write lock from reading the stack to the commit, the training between them included: no edit is made on a stack
that is no longer there, a kill lets the lock go, and readers see the last committed state meanwhile.  Reading the record is safe in any
thread; what runs the model (`apply`, `blame`, `diff`, `check`, remaking) must be the only one that runs it.
"""

from __future__ import annotations

import contextlib
import getpass
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from errata import storage
from errata.core.bank import Stack, live
from errata.core.model import LM
from errata.core.patch import Patch
from errata.errors import ConfigError, ErrataError, InputError, LedgerError, PatchError, StorageError
from errata.ledger import blame, check, compact, diff, export, findings, undo
from errata.ledger.making import MODES, Maker, Progress
from errata.ledger.record import WAIT, Edit, Event, Record, Writer
from errata.ledger.shelf import Shelf
from errata.ledger.stacks import Entries, holders, unmerged
from errata.request import EditRequest


class Ledger:
    """Made by `Ledger.open`."""

    def __init__(self, folder: Path, record: Record, lm: LM | None, author: str) -> None:
        self.folder, self.record, self.author = folder, record, author
        self.shelf = Shelf(folder)
        self._lm = lm

    @classmethod
    def open(cls, folder: str | Path, lm: LM | None = None, *, author: str | None = None, wait: float = WAIT) -> Ledger:
        """The ledger in ``folder``, a new one where there is none (which needs ``lm``).

        Without ``lm`` the record can be read and edits taken back; what runs the model needs it.  ``author``: of the changes made
        through this object; the login name where not given.  ``wait``: seconds to wait for another writer.
        """
        folder, record = Path(folder), Record(Path(folder), wait)
        if not record.exists():
            if lm is None:
                raise LedgerError(f"{folder} holds no ledger; `errata ledger apply {folder} --model MODEL …` begins one")
            taken = [p.name for p in folder.iterdir()] if folder.is_dir() else []
            if folder.exists() and (not folder.is_dir() or any(not n.startswith(record.path.name) and n != "patches" for n in taken)):
                raise StorageError(f"{folder} exists and is not a ledger; it is left alone, give another name")
            with storage.complaining(folder):
                (folder / "patches").mkdir(parents=True, exist_ok=True)
            record.create({"base": lm.fingerprint, "model": lm.name})
            storage.flush([folder])
        ledger = cls(folder, record, lm, author or _login())
        as_text("author", ledger.author)
        if lm is not None and (base := ledger.meta("base")) != lm.fingerprint:
            raise LedgerError(
                f"{folder} is of base {base}, this model is {lm.fingerprint}; load {ledger.meta('model')!r}, or begin another"
            )
        ledger.recover()
        return ledger

    # -- reading -----------------------------------------------------------------------------------------------

    @property
    def lm(self) -> LM:
        """`LedgerError` where the ledger was opened without a model."""
        if self._lm is None:
            raise LedgerError("this needs the model; open the ledger with it")
        return self._lm

    def meta(self, key: str) -> str:
        """``base`` (the fingerprint) or ``model`` (its name)."""
        with self.record.reading() as view:
            return view.meta(key)

    def log(self, last: int | None = None) -> list[Event]:
        """What was done, oldest first."""
        with self.record.reading() as view:
            return view.events(last)

    def edits(self, live: bool = True) -> list[Edit]:
        """Edits that are on (or all that ever were), by number."""
        with self.record.reading() as view:
            return view.edits(live)

    def show(self, number: int) -> Edit:
        """One edit; `LedgerError` for a number that there is not."""
        with self.record.reading() as view:
            return view.edit(number)

    def entries(self, at: int | None = None) -> Entries:
        """What stands on the stack now, or stood there after event ``at``."""
        with self.record.reading() as view:
            if at is not None and not 0 <= at <= view.head():
                raise LedgerError(f"there is no event {at}; the last is {view.head()} (`errata ledger log`)")
            return view.entries(at)

    def stack(self, at: int | None = None) -> Stack:
        """The patches that run now (`errata.core.bank.live`), or ran after event ``at``."""
        running = self.running(self.entries(at))
        if at is None:
            self.shelf.keep(e.id for e in running)
        return self.load(running)

    def running(self, entries: Entries) -> Entries:
        """Those that run; `LedgerError` where the folder of one is dropped."""
        out = live(entries)
        if gone := [e for e in out if not e.stored]:
            raise LedgerError(
                f"the files of patch {gone[0].id} (edit {gone[0].edit}) were dropped by compact; that state cannot run any more"
            )
        return out

    def load(self, entries: Entries) -> Stack:
        """The patches of entries, checked against the model where there is one."""
        patches = self.shelf.load(entries)
        if self._lm is not None:
            for patch in patches:
                self._lm.check(patch)
        return patches

    # -- changing ----------------------------------------------------------------------------------------------

    def apply(self, requests: Sequence[EditRequest], **how: Any) -> list[Edit]:
        """Make edits now; see `applying`."""
        return [edit for part in self.applying(requests, **how) for edit in part]

    def applying(
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
        """Make edits now; yields those of each transaction once they are on the disk.

        mode   "single": each alone on the bare base, so that any can be taken back as if it had never been; "continual": one after
               another on what is live; "batched": joint edits of ``size``
        force  go on although a fact is there already, contradicts a live edit or is known to the model (`errata.ledger.findings`)
        losses told the mean loss after each step of training
        """
        if mode not in MODES or (size is not None and size < 1):
            raise ConfigError(f"mode is one of {', '.join(MODES)} and size at least 1, not {mode!r} and {size}")
        if not requests:
            raise ConfigError("no request to apply")
        as_text("reason", reason)
        maker = Maker.new(self.lm, method, settings or {}, progress)
        own: set[int] = set()
        if not force:
            findings.refuse(self.look(requests))
        step = MODES[mode] if size is None or mode != "batched" else size
        for start in range(0, len(requests), step):
            part = list(requests[start : start + step])
            with self.changing() as writer:
                others = [e for e in writer.edits() if e.number not in own] if not force else []
                findings.refuse(list(findings.among(part, others)))  # what another wrote since
                on = () if mode == "single" else self.load(self.running(unmerged(writer.entries())))
                patches = maker.make(self.lm, part, mode, on, progress, losses)
                members = [[r] for r in part] if mode == "single" else [part]
                made = self.put(writer, list(zip(patches, members, strict=True)), maker, mode == "single", reason)
            own |= {e.number for e in made}
            if progress is not None:
                progress("edits", start + len(part), len(requests))
            yield made

    def take(self, patches: Sequence[Patch], *, reason: str = "", force: bool = False) -> list[Edit]:
        """Apply saved patches, in order, in one transaction.  One that is live already and damaged on the disk is put right."""
        if not patches:
            raise ConfigError("no patch to apply")
        as_text("reason", reason)
        out: list[Edit] = []
        with self.changing() as writer:
            standing = {e.id: e.edit for e in writer.entries()}
            for patch in patches:
                self.lm.check(patch)
            repaired = [p for p in patches if p.id in standing and self.damaged(p.id)]
            self.shelf.save(repaired)
            if repaired:
                writer.note("repair", self.author, reason, {"patches": [p.id for p in repaired]})
                out += [writer.edit(n) for p in repaired if (n := standing[p.id]) is not None]
            new = [p for p in patches if p not in repaired]
            pairs = self._with_added(writer, new)
            if not force:
                findings.refuse(self.look([r for _, requests in pairs for r in requests]) if pairs else [])
            out += self.put(writer, pairs, None, False, reason) if pairs else []
        return out

    def undo(self, number: int, *, remake: bool = False, reason: str = "", progress: Progress | None = None) -> undo.Undone:
        """Take an edit back; see `errata.ledger.undo`."""
        as_text("reason", reason)
        return undo.undo(self, number, remake, reason, progress)

    def compact(self, *, merge: bool = True, lean: bool = False, reason: str = "") -> compact.Compacted:
        """Merge weight-like patches, drop folders; see `errata.ledger.compact`."""
        as_text("reason", reason)
        return compact.compact(self, merge, lean, reason)

    # -- questions to the model --------------------------------------------------------------------------------

    def look(self, requests: Sequence[EditRequest]) -> list[findings.Finding]:
        """What is odd about requests, against what is live now."""
        with self.record.reading() as view:
            live_edits = view.edits()
        found = list(findings.among(requests, live_edits))
        seen = {f.request.id for f in found}
        rest = [r for r in requests if r.id not in seen]
        return found + (list(findings.known(self.lm, rest, self.stack())) if rest else [])

    def blame(self, prompt: str, *, tokens: int = 12) -> blame.Blame:
        """Which live edits change the answer; see `errata.ledger.blame`."""
        return blame.blame(self, prompt, tokens)

    def diff(
        self, prompts: Sequence[str], before: str | int = "base", after: str | int = "live", *, tokens: int = 12
    ) -> list[diff.Difference]:
        """Answers in two states; see `errata.ledger.diff`."""
        return diff.diff(self, prompts, before, after, tokens)

    def check(self, *, repair: bool = False, progress: Progress | None = None) -> check.Checked:
        """Ask every live edit again; see `errata.ledger.check`."""
        return check.check(self, repair, progress)

    def export(self, out: str | Path, *, rank: int | None = None, every_block: bool = False, checkpoint: bool = False) -> export.Exported:
        """The live stack as folders for others; see `errata.ledger.export`."""
        return export.export(self, Path(out), rank, every_block, checkpoint)

    # -- parts of a change -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def changing(self) -> Iterator[Writer]:
        """One transaction; where it fails, or Ctrl-C comes, patch folders saved inside vanish with it."""
        try:
            with self.record.writing() as writer:
                yield writer
        except BaseException:
            self.recover()  # asks the database what to keep: Ctrl-C may come just after the commit
            raise

    def put(
        self,
        writer: Writer,
        pairs: Sequence[tuple[Patch, Sequence[EditRequest]]],
        maker: Maker | None,
        alone: bool,
        reason: str,
    ) -> list[Edit]:
        """Save patches, then write their edits down; ``maker`` None: they were brought in."""
        entries = writer.entries()
        for i, (patch, requests) in enumerate(pairs):
            if patch.id in {e.id for e in entries} | {p.id for p, _ in pairs[:i]}:
                raise LedgerError(f"patch {patch.id} ({requests[0].prompt!r} …) is live already; nothing was changed")
            if holders(entries, [patch.id]) or any(patch.id in p.replaces for p, _ in pairs[:i]):
                raise LedgerError(f"patch {patch.id} would change nothing: one before it went on from it and holds it already")
        self.shelf.save([p for p, _ in pairs])
        event = writer.note("apply", self.author, reason, {})
        numbers = []
        for patch, requests in pairs:
            method, settings = (patch.method, None) if maker is None else (maker.name, maker.settings)
            writer.add_patch(patch.id, patch.method, patch.replaces, patch.parameters)
            numbers.append(writer.add_edit(requests, method, settings, alone, event))
            writer.put(patch.id, numbers[-1], event)
        writer.detail(event, {"edits": numbers, "patches": [p.id for p, _ in pairs]})
        return [writer.edit(n) for n in numbers]

    def _with_added(self, writer: Writer, patches: Sequence[Patch]) -> list[tuple[Patch, list[EditRequest]]]:
        """Each with its requests beyond those that what it replaces has brought: live edits, and patches before it."""
        brought = {e.id: list(writer.edit(e.edit).requests) for e in writer.entries() if e.edit is not None}
        out = []
        for patch in patches:
            held = {r.id for old in patch.replaces for r in brought.get(old, [])}
            brought[patch.id] = [r for r in patch.requests if r.id not in held] or list(patch.requests)
            out.append((patch, brought[patch.id]))
        return out

    def damaged(self, patch: str) -> bool:
        """Whether its folder cannot be read."""
        try:
            self.shelf.read(patch)
        except PatchError:
            return True
        return False

    def recover(self) -> list[str]:
        """Remove what a torn change has left, unless another is writing now; the names of what went."""
        try:
            with self.record.writing(wait=0.0) as writer:
                return self.shelf.sweep(writer.stored())
        except ErrataError:  # busy, or a disk that cannot be written: the next open does it
            return []


def as_text(name: str, value: str) -> None:
    """`InputError` for what the database cannot hold, said before any work: bytes of a terminal that are not UTF-8 come as such."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the {name} {value!r} is not UTF-8 at character {error.start}; write it in UTF-8") from None


def _login() -> str:
    try:
        return getpass.getuser().encode("utf-8", "replace").decode()
    except (KeyError, OSError, ImportError):  # a user without a name, as in some containers
        return "unknown"
