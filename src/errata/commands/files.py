"""Result folders: all of it or nothing, and nobody else's folder is touched."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from errata import storage
from errata.errors import StorageError

if TYPE_CHECKING:
    from errata.core.patch import Patch

INDEX = storage.INDEX  # of `errata edit --out`, `errata ledger export`
RESULTS = frozenset({INDEX, "patches", "records.jsonl", "summary.json", "report.html", "report.md"})
_ANALYSES = re.compile(  # of `errata trace`, `errata analyse`, `errata reproduce` and `errata demo theorem`
    r"(trace|keys|gates|reproduce|theorem)\.json|reproduce\.md"
    r"|(trace-(average|\d+)|keys|gates-(weights|balance|locality)|reproduce-(marks|weights|redundancy)|theorem)\.(png|svg)"
)
PATCH = frozenset({"patch.json", "patch.safetensors", "README.md"})


def ours(folder: Path) -> bool:
    """Whether errata wrote everything in this folder, so that it may be replaced."""
    if not folder.is_dir():
        return False
    entries = list(folder.iterdir())
    if (folder / "patch.json").is_file():
        return all(e.name in PATCH for e in entries)
    return all(
        (e.name == "patches" and ours(e))
        or ((e.name in RESULTS or _ANALYSES.fullmatch(e.name)) and e.is_file())
        or ((e / "patch.json").is_file() and ours(e))
        for e in entries
    )


def check(out: Path | None, force: bool) -> None:
    """`StorageError` now rather than after an hour of work: the place is taken, or cannot be written.  None: nothing will be saved."""
    if out is None:
        return
    storage.no_dangling_link(out)
    if out.exists():
        if not ours(out):
            raise StorageError(f"{out} exists and is not a result of errata; it is left alone, give another name")
        if not force and any(out.iterdir()):
            raise StorageError(f"{out} exists already; give another name, or --force to replace it")
    storage.within_reach(out)


@contextlib.contextmanager
def staged(out: Path, force: bool) -> Iterator[Path]:
    """`check`, then `errata.storage.atomic_folder`."""
    check(out, force)
    with storage.atomic_folder(out) as temporary:
        yield temporary


def write(path: Path, text: str) -> None:
    """A text file; lone surrogates, which UTF-8 cannot hold, as "?"."""
    storage.write(path, text.encode("utf-8", "replace"))


def save_patches(folder: Path, patches: Sequence[Patch]) -> None:
    """Each as ``folder/<id>``; equal patches once."""
    folder.mkdir(exist_ok=True)
    for patch in {p.id: p for p in patches}.values():
        patch.save(folder / patch.id)


def load_patches(sources: Sequence[str]) -> tuple[Patch, ...]:
    """The stack that the places make (`errata.core.patch_source.load_patches`, which brings torch in)."""
    from errata.core import patch_source

    return patch_source.load_patches(sources)
