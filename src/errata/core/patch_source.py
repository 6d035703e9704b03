"""Where patches are read from: their folders, folders of `errata edit --out` and `errata ledger export`, the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from errata.core import hub, patch_file
from errata.core.patch import Patch
from errata.errors import PatchError, StorageError


def load_patch(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Patch:
    """A patch by its folder, by a folder that holds it alone, or by OWNER/NAME of a repository of the hub; a folder comes first.

    `PatchError` where there is none, more than one (it names them), or a damaged one; `StorageError` where the hub does not answer.
    """
    if _is_of_hub(source):
        return _from_hub(str(source), revision, token)
    return Patch.load(Path(source).expanduser())


def load_patches(sources: Sequence[str | Path]) -> tuple[Patch, ...]:
    """The stack that the places make, in order; a folder of `errata edit --out` stands for all its patches."""
    found: list[Patch] = []
    for source in sources:
        if _is_of_hub(source):
            found.append(_from_hub(str(source)))
        else:
            found += map(Patch.load, patch_file.members(Path(source).expanduser()))
    twice = [p.id for i, p in enumerate(found) if p.id in {q.id for q in found[:i]}]
    if twice:
        raise PatchError(f"patch {twice[0]} is given twice; name each once")
    return tuple(found)


def _is_of_hub(source: str | Path) -> bool:
    return isinstance(source, str) and hub.NAME.fullmatch(source) is not None and not Path(source).expanduser().exists()


def _from_hub(source: str, revision: str | None = None, token: str | None = None) -> Patch:
    """Whoever mistypes a folder is told that it is not there, too."""
    try:
        return Patch.from_hub(source, revision=revision, token=token)
    except StorageError as error:
        raise StorageError(f"there is no folder {source}, and {error}") from None
