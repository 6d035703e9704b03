"""The thread that edits: one job after another, on a replica of the model that shares its weights, so that answers go on meanwhile.

A job is stopped at the model's next forward pass, whatever runs there (a hook on the replica asks), and the ledger's transaction is rolled
back; what was acknowledged before stays.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch

from errata.errors import ErrataError
from errata.ledger import Ledger
from errata.ledger.findings import FindingsError
from errata.ledger.undo import UndoResult
from errata.serve.api_errors import APIError, stopping, to_api_error
from errata.serve.jobs import EditSpec, Job, JobCancelled, finding_document
from errata.serve.metrics import Metrics
from errata.serve.options import Limits

LOG = logging.getLogger("errata.serve")


class EditWorker:
    """``ledger``: with a model of its own, which nothing else runs."""

    def __init__(self, ledger: Ledger, limits: Limits, metrics: Metrics, threads: int = 1) -> None:
        self.ledger, self.limits, self.metrics, self.threads = ledger, limits, metrics, threads
        self.jobs: OrderedDict[str, Job] = OrderedDict()
        self._queue: deque[Job] = deque()
        self._news = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="errata-editor", daemon=True)
        current = self._current = [Job(None, lambda job: None)]

        def asked(
            *_: Any,
        ) -> None:  # before every pass of the replica; a plain function, which the replicas it is lent to in lanes take along
            current[0].check()

        ledger.lm.hf.register_forward_pre_hook(asked)

    @property
    def current(self) -> Job | None:
        """The job in work."""
        job = self._current[0]
        return job if job.status in ("checking", "editing") else None

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._queue)

    def apply(self, plan: EditSpec) -> Job:
        """A job that applies; `APIError` where too many wait."""
        return self._submit(Job(plan, self._apply))

    def undo(self, number: int, remake: bool, author: str | None, reason: str) -> Job:
        """A job that takes an edit back; its result is an `UndoResult`."""

        def work(job: Job) -> UndoResult:
            with _author(self.ledger, author):
                done = self.ledger.undo(number, remake=remake, reason=reason, progress=job.progress)
            self.metrics.edits.labels("undone").inc()
            LOG.info("edit %d is undone", number)
            return done

        return self._submit(Job(None, work))

    def _submit(self, job: Job) -> Job:
        with self._news:
            if self._closing:
                raise stopping()
            if len(self._queue) >= self.limits.edits:
                raise APIError(
                    429, f"{len(self._queue)} edits wait, no more may; try again later", "queue_full", headers={"Retry-After": "5"}
                )
            self._queue.append(job)
            self.jobs[job.id] = job
            ended = [name for name, j in self.jobs.items() if j.ended]
            for name in ended[: max(0, len(ended) - self.limits.jobs)]:
                del self.jobs[name]
            self._news.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Stop a job; one that has ended stays as it is."""
        with self._news:
            job.cancelled = True
            if job in self._queue:
                self._queue.remove(job)
                self._end(job, status="cancelled")

    def close(self, grace: Callable[[], float]) -> bool:
        """No more jobs: what waits is cancelled, the one in work may go on for ``grace()`` seconds (asked again and again) and is then
        stopped and rolled back.

        Returns whether the thread has ended; one that has not is in a long step, and a kill rolls it back as well.
        """
        with self._news:
            self._closing = True
            for job in list(self._queue):
                self.cancel(job)
            self._news.notify()
        began = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - began < grace():
            self._thread.join(0.05)
        if (late := self.current) is not None:
            LOG.warning("%s took too long: it is stopped, the ledger stays as it was", late.id)
            late.cancelled = True
        if self._thread.ident is not None:
            self._thread.join(5.0)
        return not self._thread.is_alive()

    # -- in the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self.threads)  # of this thread, and of the lanes it makes
        while True:
            with self._news:
                self._news.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                job = self._current[0] = self._queue.popleft()
                job.change(status="checking")
            try:
                job.change(result=job.work(job))
                self._end(job, status="done")
            except JobCancelled:
                self._end(job, status="cancelled")
            except BaseException as error:
                self._failed(job, error)

    def _apply(self, job: Job) -> None:
        plan = job.plan
        assert plan is not None
        how: dict[str, Any] = {"method": plan.method, "settings": plan.settings, "mode": plan.mode, "size": plan.size}
        how |= {"reason": plan.reason, "force": plan.force}
        with _author(self.ledger, plan.author):
            making = self.ledger.iter_apply(plan.requests, **how, progress=job.progress, losses=job.losses)
            done = 0  # facts; a joint edit has several
            for part in making:
                job.change(edits=[*job.edits, *(e.number for e in part)])
                self.metrics.edits.labels("made").inc(len(part))
                LOG.info("edits %s are live", ", ".join(str(e.number) for e in part))
                done += sum(len(e.requests) for e in part)
                if done < len(plan.requests):
                    job.check()

    def _failed(self, job: Job, error: BaseException) -> None:
        if not isinstance(error, ErrataError | APIError):
            LOG.error("%s failed", job.id, exc_info=error)
        found = [finding_document(f) for f in error.findings] if isinstance(error, FindingsError) else []
        self._end(job, status="failed", findings=found, failure=error, error=to_api_error(error).document["error"])

    def _end(self, job: Job, **values: Any) -> None:
        if job.plan is not None and values["status"] in ("failed", "cancelled"):
            self.metrics.edits.labels(values["status"]).inc()
        job.change(stage=None, **values)


class _author:
    """Changes inside are by this author."""

    def __init__(self, ledger: Ledger, author: str | None) -> None:
        self.ledger, self.author = ledger, author or ledger.author

    def __enter__(self) -> None:
        self.before, self.ledger.author = self.ledger.author, self.author

    def __exit__(self, *_: object) -> None:
        self.ledger.author = self.before
