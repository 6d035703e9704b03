"""The files of a patch as they lie in its folder: what ``patch.json`` holds, and the tensors it speaks of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata import registry, storage
from errata.config import build
from errata.documents import parse_json
from errata.errors import ConfigError, PatchError, UnknownNameError

FORMAT = 1
_COPY = "copy the patch again from where it was made"


@dataclass(frozen=True)
class OpHead:
    """An op without its numbers; ``tensors`` names those of ``patch.safetensors``."""

    kind: str
    block: int
    point: str
    settings: Mapping[str, Any]
    tensors: tuple[str, ...]

    def __post_init__(self) -> None:
        registry.get("op", self.kind)


@dataclass(frozen=True)
class Head:
    """``patch.json``."""

    format: int
    id: str
    sha256: str
    method: str
    settings: Mapping[str, Any]
    base: str
    requests: tuple[Mapping[str, Any], ...]
    ops: tuple[OpHead, ...]
    replaces: tuple[str, ...]
    notes: Mapping[str, Any]


def content_id(head: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of what a patch is: its head without id, sha256 and notes, and all its numbers."""
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(name.encode())
        digest.update(str((tuple(flat.shape), str(flat.dtype))).encode() + flat.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def members(folder: Path) -> list[Path]:
    """The patch folders that an index names, in the order they stack; without an index the folder itself."""
    path = folder / storage.INDEX
    if not path.is_file():
        return [folder]
    try:
        index: Any = parse_json(path.read_text(encoding="utf-8"))
        names = [str(p["id"]) for p in index["patches"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchError(f"{path}: cannot be read ({type(error).__name__}); name the patch folders in it one by one") from None
    if wrong := [n for n in names if not n or Path(n).name != n]:
        raise PatchError(f"{path}: {wrong[0]!r} is not the id of a patch; name the patch folders one by one")
    return [folder / name for name in dict.fromkeys(names)]


def read(folder: Path) -> tuple[Head, dict[str, Tensor]]:
    """(head, tensors by name); `PatchError` for files that are not there, damaged, of another format, or do not speak of each other."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / "patch.json"
    try:
        found, blob = parse_json(path.read_text(encoding="utf-8")), (folder / "patch.safetensors").read_bytes()
        json.dumps(found, ensure_ascii=False).encode()  # half a character, written as an escape, could not be saved again
    except FileNotFoundError as error:
        raise PatchError(
            f"{folder}: {Path(error.filename).name} is missing; a patch is a folder with patch.json and patch.safetensors"
        ) from None
    except OSError as error:
        raise PatchError(f"{folder}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, not JSON, a key twice, a number with more digits than Python reads
        raise PatchError(f"{path}: not valid JSON ({error}); {_COPY}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        given = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise PatchError(f"{path}: format {given!r}, this errata reads format {FORMAT}")
    if hashlib.sha256(blob).hexdigest() != found.get("sha256"):
        raise PatchError(f"{folder / 'patch.safetensors'}: damaged or truncated ({len(blob)} bytes); {_COPY}")
    try:
        head, tensors = build(Head, found, "patch"), load(blob)
    except UnknownNameError as error:
        raise PatchError(f"{path}: {error}") from None
    except ConfigError as error:
        raise PatchError(f"{path}: incomplete or edited by hand ({error})") from None
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a dtype that torch does not have
        raise PatchError(f"{folder / 'patch.safetensors'}: cannot be read ({error}); {_COPY}") from None
    told = {f"{i}.{name}" for i, op in enumerate(head.ops) for name in op.tensors}
    if odd := sorted(told ^ {name for name in tensors if not name.startswith("state.")}):
        raise PatchError(f"{path}: tensor {odd[0]!r} is {'missing' if odd[0] in told else 'of no op'}; {_COPY}")
    return head, tensors
