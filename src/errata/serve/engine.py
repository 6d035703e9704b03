"""The thread that answers: it alone runs its model, all rows that wait and run side by side.

Between two tokens it takes in what has come, lets go of what is done, given up or late, and puts batches together where they fit; so a
short answer never waits for a long one, and requests for different stacks share a batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence

import torch

from errata.core.decode import eos_token_ids
from errata.core.model import LM
from errata.serve.api_errors import APIError, late, stopping
from errata.serve.decode_batch import DecodeBatch, prompts_that_fit
from errata.serve.metrics import Metrics
from errata.serve.options import Limits
from errata.serve.plans import PlanCache
from errata.serve.rows import Row

LOG = logging.getLogger("errata.serve")
MAX_BATCHES = 8  # side by side, where they cannot be put together


class GenerationEngine:
    def __init__(self, lm: LM, limits: Limits, metrics: Metrics, threads: int = 1) -> None:
        self.lm, self.limits, self.metrics, self.threads = lm, limits, metrics, threads
        self.plans, self.ends = PlanCache(lm), eos_token_ids(lm)
        self._waiting: deque[Row] = deque()
        self._batches: list[DecodeBatch] = []
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="errata-answering", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Rows to answer; `APIError` where too many wait."""
        for row in rows:
            row.begin(self.lm.tokenizer)
        with self._news:
            if self._closing:
                raise stopping()
            if self.num_unfinished + len(rows) > self.limits.queue:
                raise APIError(
                    429,
                    f"{self.num_unfinished} answers wait or run, {self.limits.queue} may; try again later",
                    "queue_full",
                    headers={"Retry-After": "1"},
                )
            self._waiting.extend(rows)
            self._news.notify()

    @property
    def num_unfinished(self) -> int:
        """Answers that wait or run."""
        return len(self._waiting) + sum(len(c.running) for c in list(self._batches))

    def close(self) -> None:
        """No more rows; what waits or runs is told so, between two tokens."""
        with self._news:
            self._closing = True
            self._news.notify()
        if self._thread.ident is not None:
            self._thread.join(10)

    # -- in the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self.threads)  # of this thread only
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._batches or self._closing)
                if self._closing and not self._waiting and not self._batches:
                    return
                fresh = self._take()
            try:
                self._turn(fresh)
            except Exception as error:  # not of one batch: those are caught where they run
                LOG.exception("answering failed")
                for row in [*fresh, *(row for batch in self._batches for row in batch.running)]:
                    row.fail(error)
                self._batches = []

    def _take(self) -> list[Row]:
        """Rows that begin now.  Others wait on, but for those that nobody waits for any more or that took too long."""
        self._drop(self._waiting)
        self._waiting = deque(row for row in self._waiting if row.finish_reason is None)
        if len(self._batches) >= MAX_BATCHES:
            return []
        most = self.limits.batch
        count = prompts_that_fit(list(self._waiting)[:most], most, self.limits.width)
        return [self._waiting.popleft() for _ in range(count)]

    def _turn(self, fresh: list[Row]) -> None:
        """A token for every row."""
        self._drop(fresh)
        begun = self._begin([row for row in fresh if row.finish_reason is None])
        for batch in list(self._batches):
            self._drop(batch.running)
            batch.leave([row for row in batch.rows if row.finish_reason is not None])
            if batch.running:
                self._step(batch)
        self._batches = [batch for batch in (*self._batches, *begun) if batch.running]
        self._put_together()

    def _begin(self, rows: list[Row]) -> list[DecodeBatch]:
        """New batches after their first step.  Where one cannot run, its rows are tried one by one: only the wrong ones fail."""
        if not rows:
            return []
        try:
            batch = DecodeBatch(self.lm, self.plans, rows)
            self._step(batch, whole=len(rows) == 1)
            return [batch]
        except Exception as error:
            if len(rows) == 1:
                LOG.exception("an answer could not begin")
                rows[0].fail(error)
                return []
            LOG.warning("a batch of %d could not begin; its rows run one by one", len(rows))
            return [batch for row in rows if row.finish_reason is None for batch in self._begin([row])]

    def _step(self, batch: DecodeBatch, whole: bool = True) -> None:
        """``whole``: an error ends all rows, instead of being raised."""
        rows = batch.running
        self.metrics.batch.observe(len(rows))
        before = [row.count for row in rows]
        try:
            done = batch.step(self.ends)
        except Exception as error:
            if not whole and all(row.count == n for row, n in zip(rows, before, strict=True)):
                raise
            LOG.exception("a batch failed")
            for row in rows:
                row.fail(error)
            batch.rows = []
            return
        self.metrics.tokens.inc(len(rows))
        for row, n in zip(rows, before, strict=True):
            if n == 0 and row.first is not None:
                self.metrics.first.observe(row.first)
        self.metrics.answers.inc(len(done))

    def _drop(self, rows: Iterable[Row]) -> None:
        """End rows that nobody waits for, or that took too long."""
        now = time.monotonic()
        for row in rows:
            if row.cancelled:
                row.finish_reason = "cancelled"
            elif self._closing:
                row.fail(stopping())
            elif now > row.deadline:
                row.fail(late(self.limits.seconds, "; ask for fewer tokens"))

    def _put_together(self) -> None:
        together: list[DecodeBatch] = []
        for batch in self._batches:
            host = next((c for c in together if c.fits(batch, self.limits.batch, self.limits.width)), None)
            if host is None:
                together.append(batch)
            else:
                host.join(batch)
        self._batches = together
