"""The ledger: which edits are on, by whom, when and why; every change durable, every edit undoable.

`record` is the database, `shelf` the patch folders, `stacks` what runs, `book` the `Ledger` itself; the other files are its verbs.
"""

from errata.ledger.book import Ledger

__all__ = ["Ledger"]
