"""Folders on disk: all of it or nothing, and what was there before is never lost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from errata.errors import StorageError


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` at the end of the ``with`` block; on any error, or Ctrl-C, it vanishes.

    `StorageError` when the disk is full or cannot be written; what stood at ``out`` is then as before.
    """
    final = out.resolve()
    temporary: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        temporary.chmod(0o755)
        yield temporary
        _swap(temporary, final)
    except StorageError as error:  # something in it that could not be saved names the folder in passing; the user knows ``out``
        raise StorageError(str(error).replace(str(temporary), str(out))) from None
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise StorageError(f"{out}: nothing was written ({why}); free space or choose another place, then try again") from None
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


def write(path: Path, content: bytes) -> None:
    """A file that is on the disk when this returns."""
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def replace(path: Path, content: bytes) -> None:
    """A file that is whole or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary, content)
        os.replace(temporary, path)
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise StorageError(f"{path}: nothing was written ({why}); free space or choose another place, then try again") from None
    finally:
        temporary.unlink(missing_ok=True)
