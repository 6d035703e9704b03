"""Result folders: all of it or nothing, and nobody else's folder is touched."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.errors import PatchError, StorageError

if TYPE_CHECKING:
    from errata.patch import Patch

INDEX = "edit.json"  # of `errata edit --out`: the patches in the order they stack
RESULTS = frozenset({INDEX, "patches", "records.jsonl", "summary.json", "report.html", "report.md"})
PATCH = frozenset({"patch.json", "patch.safetensors", "README.md"})


def ours(folder: Path) -> bool:
    """Whether errata wrote everything in this folder, so that it may be replaced."""
    if not folder.is_dir():
        return False
    entries = list(folder.iterdir())
    if (folder / "patch.json").is_file():
        return all(e.name in PATCH for e in entries)
    return all(
        (e.name == "patches" and ours(e)) or (e.name in RESULTS and e.is_file()) or ((e / "patch.json").is_file() and ours(e))
        for e in entries
    )


def check(out: Path, force: bool) -> None:
    """`StorageError` now rather than after an hour of work: the place is taken, or cannot be written."""
    if out.is_symlink() and not out.exists():
        raise StorageError(f"{out} is a link to nowhere; remove it or give another name")
    if out.exists():
        if not ours(out):
            raise StorageError(f"{out} exists and is not a result of errata; it is left alone, give another name")
        if not force and any(out.iterdir()):
            raise StorageError(f"{out} exists already; give another name, or --force to replace it")
    above = next(p for p in out.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise StorageError(f"{out}: {above} is not a folder that can be written; choose another place")


@contextlib.contextmanager
def staged(out: Path, force: bool) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` at the end of the ``with`` block; on any error, or Ctrl-C, it vanishes."""
    check(out, force)
    final = out.resolve()
    temporary: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        temporary.chmod(0o755)
        yield temporary
        _swap(temporary, final)
    except StorageError as error:  # a patch that could not be saved names the folder in passing; the user knows ``out``
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


def write(path: Path, text: str) -> None:
    """A text file, on the disk when this returns; lone surrogates, which UTF-8 cannot hold, as "?"."""
    with open(path, "wb") as stream:
        stream.write(text.encode("utf-8", "replace"))
        stream.flush()
        os.fsync(stream.fileno())


def save_patches(folder: Path, patches: Sequence[Patch]) -> None:
    """Each as ``folder/<id>``; equal patches once."""
    folder.mkdir(exist_ok=True)
    for patch in {p.id: p for p in patches}.values():
        patch.save(folder / patch.id)


def load_patches(paths: Sequence[str]) -> tuple[Patch, ...]:
    """The stack that the folders make, in order: patches, or results of ``errata edit --out`` (all their patches)."""
    from errata.patch import Patch

    found: list[Patch] = []
    for path in map(Path, paths):
        found += [Patch.load(p) for p in ([path / name for name in _index(path)] if (path / INDEX).is_file() else [path])]
    twice = [p.id for i, p in enumerate(found) if p.id in {q.id for q in found[:i]}]
    if twice:
        raise PatchError(f"patch {twice[0]} is given twice; name each once")
    return tuple(found)


def _index(folder: Path) -> list[str]:
    try:
        index: Any = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = [str(p["id"]) for p in index["patches"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PatchError(f"{folder / INDEX}: cannot be read ({type(error).__name__}); name the patch folders in it one by one") from None
    if wrong := [n for n in names if not n or Path(n).name != n]:
        raise PatchError(f"{folder / INDEX}: {wrong[0]!r} is not the id of a patch; name the patch folders one by one")
    return list(dict.fromkeys(names))
