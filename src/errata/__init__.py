"""errata edits what a language model knows.

Public names are loaded on first use: ``import errata`` brings in neither torch nor transformers and changes nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "errata.core.model",
    "edit": "errata.core.model",
    "LM": "errata.core.model",
    "Patch": "errata.core.patch",
    "EditRequest": "errata.request",
    "Probe": "errata.request",
    "Case": "errata.request",
    "ErrataError": "errata.errors",
}
__all__ = ["LM", "Case", "EditRequest", "ErrataError", "Patch", "Probe", "__version__", "edit", "load"]

if TYPE_CHECKING:
    from errata.core.model import LM, edit, load
    from errata.core.patch import Patch
    from errata.errors import ErrataError
    from errata.request import Case, EditRequest, Probe


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'errata' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
