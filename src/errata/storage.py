"""Folders and files on disk: all of it or nothing, and what was there before is never lost."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from errata.documents import parse_json
from errata.errors import DiskError, ErrataError, StorageError

INDEX = "edit.json"  # of a folder of patches: which, in the order they stack
FEW = 8  # files that are put on the disk one after another


def cache_folder() -> Path:
    """``$ERRATA_CACHE``, else ``~/.cache/errata``."""
    return Path(os.environ.get("ERRATA_CACHE") or Path.home() / ".cache" / "errata")


@contextlib.contextmanager
def turn(path: Path) -> Iterator[bool]:
    """One at a time with this lock file, others wait; the lock goes with the process that holds it.  False where the system has none."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a")  # noqa: SIM115
    with stream:
        try:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows; a file system without locks
            alone = False
        else:
            alone = True
        yield alone


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` at the end of the ``with`` block; on any error, or Ctrl-C, it vanishes.

    `DiskError` when the disk is full or cannot be written; what stood at ``out`` is then as before.
    """
    final = out.resolve()
    temporary: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        name = final.parent / f".{final.name}.{secrets.token_hex(4)}"
        name.mkdir()  # open to whom the user's umask says; mkdtemp would not ask it
        temporary = name
        yield temporary
        if final.is_dir():
            shutil.copymode(final, temporary)
        _swap(temporary, final)
    except StorageError as error:  # something in it that could not be saved names the folder in passing; the user knows ``out``
        raise type(error)(str(error).replace(str(temporary), str(out))) from None
    except OSError as error:
        raise DiskError(f"{out}: nothing was written ({_why(error)}); {advice(error)} or choose another place, then try again") from None
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, final: Path) -> None:
    """Rename into place; what was there before comes back if that fails."""
    if not final.exists():
        os.rename(temporary, final)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
    try:
        os.rename(final, aside / "old")
        os.rename(temporary, final)
    except BaseException:
        if (aside / "old").exists() and not final.exists():
            os.rename(aside / "old", final)
        raise
    finally:
        if final.exists():  # else the old result lies in ``aside``: better there than gone
            shutil.rmtree(aside, ignore_errors=True)


def write(path: Path, content: bytes, sync: bool = True) -> None:
    """A file that is on the disk when this returns (``sync=False``: that the system will put there; see `flush`)."""
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        if sync:
            os.fsync(stream.fileno())


def write_atomic(path: Path, content: bytes) -> None:
    """`put`, with `DiskError` when the disk is full."""
    with disk_errors(path):
        put(path, content)


def put(path: Path, content: bytes) -> None:
    """One file, all of it or nothing: written beside, put on the disk, renamed.  The system's errors as they are."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary, content)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def no_dangling_link(out: Path) -> None:
    """`StorageError` where something is to be written at a link whose end is gone."""
    if out.is_symlink() and not out.exists():
        raise StorageError(f"{out} is a link to nowhere; remove it or give another name")


def within_reach(out: Path) -> None:
    """`StorageError` where the folder that ``out`` would be made in cannot be written."""
    above = next(p for p in out.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(f"{out}: {above} is not a folder that can be written; choose another place")


def read_document(path: Path, kind: type[ErrataError] = StorageError, advice: str = "") -> dict[str, Any]:
    """A file that holds one JSON object; else an error of ``kind`` that ends with ``advice``."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise kind(f"{path}: not valid JSON ({error}); it was damaged or changed by hand{advice}") from None
    if not isinstance(found, dict):
        raise kind(f"{path}: not what errata writes there{advice}")
    return found


def append(path: Path, line: bytes) -> None:
    """One line more, on the disk when this returns.  What a stop tears is the reader's to find."""
    with disk_errors(path), open(path, "ab") as stream:
        before = stream.tell()
        try:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):  # a full disk may have taken half of it
                stream.truncate(before)
            raise


def flush(folders: Sequence[Path]) -> None:
    """Everything in these folders is on the disk when this returns.

    Where there are many files, the whole system's buffers are written first, once: a file that is clean then costs next to nothing
    to make sure of, while making sure of many small dirty files one after another takes 4 to 8 ms each (measured on ext4).
    """
    if not folders:
        return
    with disk_errors(folders[0].parent):
        paths = [path for folder in folders for path in (*folder.iterdir(), folder)]
        if len(paths) > FEW and hasattr(os, "sync"):
            os.sync()
        for path in (*paths, folders[0].parent):
            _sync(path)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """The system's errors as a `DiskError` that names ``path`` and says what to do."""
    try:
        yield
    except OSError as error:
        what = f"could not be written ({_why(error)}); what was saved before is whole"
        raise DiskError(f"{path}: {what}; {advice(error)}, then go on") from None


def _why(error: OSError) -> str:
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)


def advice(error: OSError) -> str:
    """What to do about what could not be written."""
    return "get the right to write there" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else "free space"


def _sync(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folder, and syncs no file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
