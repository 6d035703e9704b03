"""Names of models to stacks: what the field ``model`` of a request may say.

A stack is a tuple of patches in memory: a request that has begun goes on under what it began with, whatever is applied, undone or
dropped meanwhile.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from errata.core.bank import Stack, active_patches
from errata.errors import LedgerError, PatchError
from errata.ledger import Ledger
from errata.ledger.stacks import Entries
from errata.serve.api_errors import APIError

KEPT = 64  # stacks by name and state of the ledger
_FORMS = "base, live, edit:N, edits:N,M…, event:N, or the name of a patch the server was started with"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
TAKEN = ("base", "live")
_NUMBER = r"[1-9][0-9]{0,8}"


@dataclass(frozen=True)
class ServedModel:
    """What `GET /v1/models` says of one."""

    id: str
    about: str
    edits: tuple[int, ...] = ()


class ServedModels:
    """``own``: the name of the loaded model, which stands for ``live``; ``given``: patches by name, as the server was started with."""

    def __init__(self, ledger: Ledger, own: str, given: Mapping[str, Stack]) -> None:
        self.ledger, self.own, self.given = ledger, own, dict(given)
        self._kept: OrderedDict[tuple[str, int], Stack] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def head(self) -> int:
        """The ledger's last event, whoever wrote it."""
        with self.ledger.database.read_transaction() as view:
            return view.head()

    def find(self, name: str) -> Stack:
        """`APIError` (404) for a name of nothing, with what there is."""
        if name == "base":
            return ()
        if name in self.given:
            return self.given[name]
        if name == self.own:
            name = "live"
        with self._lock:
            head = self.head
            kept = self._kept.get((name, head))
            if kept is None:
                kept = self._kept[name, head] = self._read(name, head)
            self._kept.move_to_end((name, head))
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return kept

    def _read(self, name: str, head: int) -> Stack:
        kind, _, rest = name.partition(":")
        try:
            if name == "live":
                return self.ledger.stack()
            if kind == "event" and re.fullmatch(f"0|{_NUMBER}", rest):
                return self.ledger.stack(int(rest))
            if kind in ("edit", "edits") and re.fullmatch(_NUMBER if kind == "edit" else f"{_NUMBER}(,{_NUMBER})*", rest):
                return self._edits(name, {int(n) for n in rest.split(",")}, head)
        except LedgerError as error:
            raise missing(name, str(error)) from None
        except PatchError as error:
            raise APIError(500, str(error), "patch", "model") from None
        raise missing(name, f"the field says {_FORMS}; GET /v1/models lists them")

    def _edits(self, name: str, numbers: set[int], head: int) -> Stack:
        entries = self.ledger.entries(head)
        there = {e.edit for e in entries}
        if gone := sorted(numbers - there):
            self.ledger.show(gone[0])  # says so where there never was one
            raise missing(name, f"edit {gone[0]} is undone; event:N is the state after event N, when it was on (GET /v1/log)")
        chosen: Entries = tuple(e for e in entries if e.edit in numbers)
        return self.ledger.load(self.ledger.running(active_patches(chosen)))

    def list(self) -> list[ServedModel]:
        """The names that stand for something now; ``edits:…`` and ``event:…`` go without saying."""
        edits = self.ledger.edits()
        out = [
            ServedModel("base", "the model as it was loaded"),
            ServedModel("live", "with the ledger's live edits", tuple(e.number for e in edits)),
        ]
        out += [ServedModel(name, f"with {len(stack)} saved patch{'' if len(stack) == 1 else 'es'}") for name, stack in self.given.items()]
        out += [
            ServedModel(f"edit:{e.number}", f"with edit {e.number} alone: {e.requests[0].prompt} -> {e.requests[0].target}", (e.number,))
            for e in edits
        ]
        return out


def missing(name: str, why: str) -> APIError:
    return APIError(404, f"there is no model {name!r}: {why}", "model_not_found", "model")
