"""Patches changed by hand and signed again, so that what is wrong of them is not found by their checksums."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from errata.core.patch_file import content_id


def forged(good: Path, folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """A copy of the patch ``good`` at ``folder`` with ``change(head, tensors)`` made to it; sums and id are as if errata had saved it."""
    shutil.copytree(good, folder)
    head = json.loads((folder / "patch.json").read_text())
    tensors = load((folder / "patch.safetensors").read_bytes())
    change(head, tensors)
    sign(folder, head, {name: t.contiguous() for name, t in tensors.items()})
    return folder


def sign(folder: Path, head: Any, tensors: dict[str, Any]) -> None:
    """Write both files with the sums that belong to them."""
    blob = save(tensors)
    if isinstance(head, dict):
        head["sha256"] = hashlib.sha256(blob).hexdigest()
        head["id"] = content_id({k: v for k, v in head.items() if k not in ("id", "sha256", "notes")}, tensors)
    (folder / "patch.safetensors").write_bytes(blob)
    (folder / "patch.json").write_text(json.dumps(head))
