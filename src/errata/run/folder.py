"""What a run leaves on disk, such that it can be killed at any moment: parts, and a journal that says which of them are whole.

    journal.jsonl        a line a part that is on disk, with the hash of its records; a torn last line is cut off
    parts/*.jsonl        records of parts, each written beside and renamed; gone when the cell is complete
    patches/<T>/         what is on at the end of the last part or at a mark; the rest is removed as later edits take its place
    times.jsonl          seconds of each part; the last line of a part counts
    records.jsonl        all records, when the cell is complete

A part counts when the journal names it and its hash is right.  What a stop left half done is found and done again, never trusted.
Journal, records and patches hold no time: a run that was killed and one that was not end with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from errata import storage
from errata.errors import PatchError, StorageError

Records = list[dict[str, Any]]
_JOURNAL, RECORDS, TIMES, _LOCK = "journal.jsonl", "records.jsonl", "times.jsonl", ".lock"
DONE = "done"


def line(value: Any) -> bytes:
    """One JSON value as a line; keys in the order they have."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"


def lines(values: Sequence[Any]) -> bytes:
    return b"".join(map(line, values))


def records(path: Path) -> Records:
    """The inverse of `lines`.  Not by `str.splitlines`: a model may say U+2028, and other characters that it splits at."""
    return [json.loads(text) for text in path.read_bytes().split(b"\n")[:-1]]


def document(path: Path, value: Any) -> None:
    """One JSON value as a file of its own, all of it or nothing."""
    storage.write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False).encode("utf-8", "replace") + b"\n")


def read_document(path: Path) -> dict[str, Any]:
    """The inverse of `document`."""
    return storage.read_document(path, advice="; give another --out")


def complete(folder: Path) -> bool:
    """Whether a cell is done; looks only."""
    return folder.is_dir() and Journal(folder, repair=False).complete


class Journal:
    """The parts of one folder that are done, in the order they were.

    ``repair``: make the folder, and cut off what is torn; for who holds the lock.  Who does not may only look: what looks torn may be
    half written.
    """

    def __init__(self, folder: Path, repair: bool = True) -> None:
        self.folder = folder
        self.entries: list[dict[str, Any]] = []
        if repair:
            with storage.disk_errors(folder):
                (folder / "parts").mkdir(parents=True, exist_ok=True)
        raw = self._read()
        if repair and lines(self.entries) != raw:
            self.cut(len(self.entries))

    @property
    def complete(self) -> bool:
        return bool(self.entries) and self.entries[-1]["part"] == DONE

    def _file(self, part: str) -> Path:
        return self.folder / RECORDS if part == DONE else self.folder / "parts" / f"{part.replace(' ', '-')}.jsonl"

    def _read(self) -> bytes:
        """The file; entries become what the journal names and the disk holds whole; everything behind the first gap is forgotten."""
        path = self.folder / _JOURNAL
        raw = path.read_bytes() if path.exists() else b""
        found: list[dict[str, Any]] = []
        for text in raw.split(b"\n")[:-1]:  # what stands behind the last line break was torn
            try:
                entry = json.loads(text)
                found.append({**entry, "part": str(entry["part"]), "sha256": str(entry["sha256"])})
            except (ValueError, KeyError, TypeError, RecursionError):
                break
        if found and found[-1]["part"] == DONE and self._whole(found[-1]):
            self.entries = found
        else:
            found = [e for e in found if e["part"] != DONE]
            self.entries = found[: next((i for i, e in enumerate(found) if not self._whole(e)), len(found))]
        return raw

    def _whole(self, entry: dict[str, Any]) -> bool:
        try:
            return hashlib.sha256(self._file(entry["part"]).read_bytes()).hexdigest() == str(entry["sha256"])
        except OSError:
            return False

    def cut(self, length: int) -> None:
        """Forget all parts but the first ``length``."""
        self.entries = self.entries[:length]
        storage.write_atomic(self.folder / _JOURNAL, lines(self.entries))

    def add(self, part: str, records: Records, **more: Any) -> None:
        """A part that is done: its records first, then the line that vouches for them."""
        content = lines(records)
        storage.write_atomic(self._file(part), content)
        entry = {"part": part, "sha256": hashlib.sha256(content).hexdigest(), **more}
        storage.append(self.folder / _JOURNAL, line(entry))
        self.entries.append(entry)

    def records(self, part: str) -> Records:
        return records(self._file(part))

    def sweep(self) -> None:
        """Remove what no line of the journal vouches for."""
        kept = {self._file(e["part"]).name for e in self.entries} if not self.complete else set()
        for path in (self.folder / "parts").iterdir():
            if path.name not in kept:
                path.unlink()
        for path in self.folder.glob(".*"):
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def time(self, part: str, seconds: dict[str, float]) -> None:
        """Not worth waiting for the disk: a time that is lost is lost."""
        with storage.disk_errors(self.folder / TIMES), open(self.folder / TIMES, "ab") as stream:
            stream.write(line({"part": part, **{k: round(v, 4) for k, v in seconds.items()}}))

    def times(self) -> dict[str, float]:
        """Seconds by what they were spent on; of a part that was done twice, the last time."""
        by_part: dict[str, dict[str, float]] = {}
        path = self.folder / TIMES
        for text in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
            with contextlib.suppress(ValueError, KeyError, AttributeError):
                entry = json.loads(text)
                by_part[entry.pop("part")] = entry
        total: dict[str, float] = {}
        for spent in by_part.values():
            for what, seconds in spent.items():
                total[what] = round(total.get(what, 0.0) + seconds, 4)
        return total


class PatchFolder:
    """The patches of a growing stack (or of single edits) on disk, by the T they were made at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int) -> Path:
        return self.folder / f"{number:07d}"

    def there(self) -> list[int]:
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit()) if self.folder.is_dir() else []

    def save(self, patches: Sequence[tuple[int, Any]]) -> None:
        """All of them, on the disk when this returns."""
        with storage.disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for number, patch in patches:
            patch.save(self.path(number), overwrite=True, sync=False)
        storage.flush([self.path(number) for number, _ in patches])

    def load(self, numbers: Sequence[int]) -> list[Any] | None:
        """As they were made; None where one is missing or torn."""
        from errata.core.patch import Patch
        from errata.run.parts import settled

        try:
            return [settled(Patch.load(self.path(number))) for number in numbers]
        except PatchError:
            return None

    def keep(self, numbers: set[int]) -> None:
        """Remove all others, and what a stop left of one."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if not (path.name.isdigit() and int(path.name) in numbers):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else works in this folder meanwhile; the lock goes with the process that holds it."""
    with storage.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / _LOCK, "w")  # noqa: SIM115
    with stream:
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows: on one's own responsibility
            pass
        except OSError:
            raise StorageError(f"{folder}: another process works in it; wait for it, or give another --out") from None
        yield
