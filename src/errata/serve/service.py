"""One server's parts: a model three times over (to answer, to edit, to be asked) around the same weights, and the ledger."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.core.bank import Stack
from errata.core.lanes import replicate
from errata.core.model import LM
from errata.errors import ConfigError
from errata.ledger import Ledger
from errata.ledger.database import WAIT
from errata.serve.analysis_worker import AnalysisWorker
from errata.serve.edit_worker import EditWorker
from errata.serve.engine import GenerationEngine
from errata.serve.metrics import Metrics
from errata.serve.options import Options
from errata.serve.served_models import NAME, TAKEN, ServedModels
from errata.serve.texts import TextReader

LOG = logging.getLogger("errata.serve")


class Service:
    def __init__(
        self,
        lm: LM,
        folder: str | Path,
        options: Options,
        patches: Mapping[str, Stack] | None = None,
        watched: Sequence[tuple[str, str | None]] = (),
        author: str | None = None,
        wait: float = WAIT,
    ) -> None:
        """``folder``: of the ledger, begun where there is none.  ``patches``: stacks by name.  ``watched``: (prompt, subject or None)."""
        self.lm, self.options, self.metrics = lm, options, Metrics()
        for name, stack in (patches or {}).items():
            if not NAME.fullmatch(name) or name in (*TAKEN, lm.name):
                raise ConfigError(f"a patch cannot be named {name!r}; use letters, digits, . _ and -, and none of {', '.join(TAKEN)}")
            for patch in stack:
                lm.check(patch)
        limits = options.limits
        threads = max(1, options.threads // 2)  # answering and editing go on at once, and each would take all cores
        book, editing, asking = (Ledger.open(folder, model, author=author, wait=wait) for model in (lm, replicate(lm), replicate(lm)))
        self.models = ServedModels(book, lm.name, patches or {})
        self.engine = GenerationEngine(lm, limits, self.metrics, max(1, options.threads - threads))
        self.editor = EditWorker(editing, limits, self.metrics, threads)
        self.analysis = AnalysisWorker(asking, limits, watched, threads)
        self.texts = TextReader(lm, limits)
        self.began, self.stopping = time.time(), False
        self.metrics.watch("errata_queue_answers", "Answers that wait or run", lambda: self.engine.num_unfinished)
        self.metrics.watch("errata_queue_edits", "Edit jobs that wait", lambda: self.editor.waiting)
        self.metrics.watch("errata_live_edits", "Edits that are on", self._live)

    @property
    def ledger(self) -> Ledger:
        """To read the record."""
        return self.models.ledger

    def _live(self) -> float:
        with self.ledger.database.read_transaction() as view:
            return view.count()

    def start(self) -> None:
        self.texts.start()
        self.engine.start()
        self.editor.start()

    def health(self) -> dict[str, Any]:
        job = self.editor.current
        with self.ledger.database.read_transaction() as view:
            live, event = view.count(), view.head()
        return {
            "status": "stopping" if self.stopping else "ok",
            "model": self.lm.name,
            "base": self.lm.fingerprint,
            "live": live,
            "event": event,
            "queue": {"answers": self.engine.num_unfinished, "edits": self.editor.waiting},
            "editing": None if job is None else job.document(),
        }
