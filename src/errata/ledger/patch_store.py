"""The patch folders of a ledger: on the disk before the database speaks of them, read when they are run."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from errata import storage
from errata.core.patch import Patch
from errata.errors import PatchError
from errata.ledger.stacks import Entry

NAME = "patches"


class PatchStore:
    """``folder/patches/<id>``, and what of it was read already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / NAME
        self._read: dict[str, Patch] = {}
        self._lock = threading.Lock()

    def load(self, entries: Iterable[Entry]) -> tuple[Patch, ...]:
        """Their patches; `PatchError` names the edit whose folder is damaged."""
        return tuple(map(self._load, entries))

    def _load(self, entry: Entry) -> Patch:
        with self._lock:
            if entry.id in self._read:
                return self._read[entry.id]
        try:
            patch = self.read(entry.id)
        except PatchError as error:
            whose = "a merge (`errata ledger compact`)" if entry.edit is None else f"edit {entry.edit}"
            raise PatchError(
                f"{whose} cannot run: {error}; `errata ledger check --repair` makes it again from the record, "
                "`errata ledger apply --patch` takes a whole copy of it"
            ) from None
        with self._lock:
            self._read[entry.id] = patch
        return patch

    def read(self, name: str) -> Patch:
        """From the disk; `PatchError` also for the folder of another patch."""
        patch = Patch.load(self.folder / name)
        if patch.id != name:
            raise PatchError(f"{self.folder / name} holds patch {patch.id}")
        return patch

    def keep(self, running: Iterable[str]) -> None:
        """Only these stay in memory."""
        with self._lock:
            wanted = set(running)
            self._read = {k: v for k, v in self._read.items() if k in wanted}

    def save(self, patches: Sequence[Patch]) -> None:
        """On the disk when this returns, folder names too.

        One that is there and whole stays, but is flushed as well: a writer that was killed before it flushed may have left it.
        """
        folders = []
        for patch in {p.id: p for p in patches}.values():
            folder = self.folder / patch.id
            try:
                self.read(patch.id)
            except PatchError:  # not there, or damaged
                if folder.exists() and not (folder / "patch.json").exists():
                    shutil.rmtree(folder, ignore_errors=True)
                patch.save(folder, overwrite=True, sync=False)
            folders.append(folder)
        storage.flush(folders)

    def sweep(self, stored: set[str]) -> list[str]:
        """Remove what no committed change speaks of (a kill between the folder and the commit leaves it); their names."""
        gone = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in stored:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
                gone.append(path.name)
        return sorted(gone)
