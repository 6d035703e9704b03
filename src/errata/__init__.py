"""errata edits what a language model knows.

Everything a user needs is here; what stands deeper may change from version to version, but for what docs/extending.md says of methods,
benchmarks and families of one's own.  Public names are loaded on first use: ``import errata`` brings in neither torch nor transformers and
changes nothing.

    lm = errata.load("almanac")
    patch = errata.edit(lm, "The capital of France is", "Lyon", subject="France")
    with lm.under(patch):
        lm.complete("The capital of France is")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "LM": "errata.core.model",
    "edit": "errata.editing",
    "load": "errata.core.loading",
    "load_patch": "errata.core.patch_source",
    "Patch": "errata.core.patch",
    "Case": "errata.request",
    "EditRequest": "errata.request",
    "Probe": "errata.request",
    "Ledger": "errata.ledger",
    "ConfigError": "errata.errors",
    "DiskError": "errata.errors",
    "EditWarning": "errata.errors",
    "ErrataError": "errata.errors",
    "FitError": "errata.errors",
    "InputError": "errata.errors",
    "JudgeError": "errata.errors",
    "LedgerError": "errata.errors",
    "ModelError": "errata.errors",
    "PatchError": "errata.errors",
    "StorageError": "errata.errors",
    "UnknownNameError": "errata.errors",
}
__all__ = [
    "LM",
    "Case",
    "ConfigError",
    "DiskError",
    "EditRequest",
    "EditWarning",
    "ErrataError",
    "FitError",
    "InputError",
    "JudgeError",
    "Ledger",
    "LedgerError",
    "ModelError",
    "Patch",
    "PatchError",
    "Probe",
    "StorageError",
    "UnknownNameError",
    "__version__",
    "edit",
    "load",
    "load_patch",
]

if TYPE_CHECKING:
    from errata.core.loading import load
    from errata.core.model import LM
    from errata.core.patch import Patch
    from errata.core.patch_source import load_patch
    from errata.editing import edit
    from errata.errors import (
        ConfigError,
        DiskError,
        EditWarning,
        ErrataError,
        FitError,
        InputError,
        JudgeError,
        LedgerError,
        ModelError,
        PatchError,
        StorageError,
        UnknownNameError,
    )
    from errata.ledger import Ledger
    from errata.request import Case, EditRequest, Probe


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'errata' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
