"""One exception tree.  Every message says where, what, and what to do next.

ErrataError                exit code 1
├── InputError             2   a file or record the user gave: file:line
│   └── WindowError        2   a text that is longer than the model's window
├── ConfigError            2   an unknown or ill-typed setting
├── UnknownNameError            2   a method, benchmark, metric … that is not registered
├── ModelError             3   a model that cannot be loaded or does not fit
├── JudgeError             3   a judge of answers that could not be asked, or gave no verdict
├── PatchError             4   a patch that is broken or belongs to another model
├── FitError               5   an optimisation that went to NaN
├── StorageError           6   a place that is taken, or a file that is damaged
│   └── DiskError          6   a disk that is full or cannot be written
└── LedgerError            7   a ledger that refuses: busy, an edit others build on, a fact it has already

Beside it stands one warning, `EditWarning`: an edit that was made and did not take.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection


class EditWarning(UserWarning):
    """An edit that was made and does not do what was asked."""


class ErrataError(Exception):
    """Base of every error errata raises on purpose."""

    exit_code = 1


class InputError(ErrataError):
    """Bad input from a file or an argument."""

    exit_code = 2


class WindowError(InputError):
    """A text that is longer than the model's window."""


class ConfigError(ErrataError):
    """A setting that does not exist or has the wrong type."""

    exit_code = 2


class UnknownNameError(ErrataError):
    """A name the registry does not hold."""

    exit_code = 2


class ModelError(ErrataError):
    """A model that cannot be used as asked."""

    exit_code = 3


class JudgeError(ErrataError):
    """A judge that failed; no other takes its place."""

    exit_code = 3


class PatchError(ErrataError):
    """A patch that cannot be read or does not belong to this model."""

    exit_code = 4


class FitError(ErrataError):
    """An optimisation that failed."""

    exit_code = 5


class StorageError(ErrataError):
    """Nothing could be written; whatever was there before is untouched."""

    exit_code = 6


class DiskError(StorageError):
    """The disk is full or cannot be written: what is tried next would not be kept either."""


class LedgerError(ErrataError):
    """A ledger that does not do what was asked; its state is as before."""

    exit_code = 7


def near(name: str, known: Collection[str], words: str) -> str:
    """What to say of a name that is not known: the one it comes nearest to, or ``words`` and all of them."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {found[0]!r}?" if found else f"{words} {', '.join(known)}"


def shortened(value: object) -> str:
    """A value as messages show it: what someone put in a file may be of any length."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def first_line(error: BaseException) -> str:
    """The first line of what an error says, which may be nothing."""
    return (str(error).splitlines() or [""])[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, the machine's or (told by its name, so that torch need not be loaded) the device's."""
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
