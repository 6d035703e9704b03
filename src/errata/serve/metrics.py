"""What is counted, in Prometheus' exposition format.  Each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("errata_requests", "HTTP requests answered", ["route", "method", "code"], registry=own)
        self.answers = Counter("errata_answers", "Answers that ended", registry=own)
        self.tokens = Counter("errata_tokens", "Tokens said", registry=own)
        self.batch = Histogram("errata_batch_rows", "Rows of a batch at each step", buckets=ROWS, registry=own)
        self.first = Histogram("errata_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=own)
        self.edits = Counter("errata_edits", "Edits", ["outcome"], registry=own)  # made, failed, cancelled, undone
        for outcome in ("made", "failed", "cancelled", "undone"):
            self.edits.labels(outcome)

    def watch(self, name: str, about: str, read: Callable[[], float]) -> None:
        """A number that is read when it is asked for."""
        Gauge(name, about, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        return generate_latest(self.registry)
