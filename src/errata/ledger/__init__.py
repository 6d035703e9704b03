"""The ledger: which edits are on, by whom, when and why; every change durable, every edit undoable.

`database` is the record, `patch_store` the patch folders, `stacks` what runs, `state` all of them with the model; `apply`, `undo`, `blame`
… are the verbs, which work on a state, and `ledger` offers them as methods of `Ledger`.
"""

from errata.ledger.ledger import Ledger

__all__ = ["Ledger"]
