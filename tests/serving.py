"""Servers of the tiny trained llama, in this process; and what a plain client of HTTP needs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from families import lm as trained
from ledgers import SETTINGS
from made import made
from tiny import FRANCE

from errata.core.bank import Stack
from errata.serve.options import Limits, Options
from errata.serve.server import ServerRunner
from errata.serve.service import Service

TOKEN = "a-token-for-tests"
LIMITS = Limits(body=20_000, prompt=30, tokens=40, rows=6, requests=3)  # of `limited`
HOSTS = ("localhost", "127.0.0.1", "::1")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"


class Site:
    """A running server and a client of it, which may edit."""

    def __init__(self, service: Service) -> None:
        self.service, self.running = service, ServerRunner(service)
        self.running.start()
        self.url = self.running.url
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)

    def close(self, grace: float = 0.0) -> None:
        self.http.close()
        self.running.stop(grace)
        assert not self.running.thread.is_alive()

    def text(self, prompt: str, model: str = "live", **how: Any) -> str:
        """One greedy answer up to the full stop."""
        body = {"model": model, "prompt": prompt, "temperature": 0, "stop": ".", "max_tokens": 8, **how}
        response = self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"]).strip()

    def edit(self, prompt: str, target: str, **more: Any) -> dict[str, Any]:
        """The document of an edit's job once it has ended."""
        body = {"prompt": prompt, "target": target, "settings": {**SETTINGS, "rank": 4}, "force": True, **more}
        response = self.http.post("/v1/edits", json=body)
        assert response.status_code == 202, response.text
        return self.ended(response.json()["job"]["id"])

    def ended(self, job: str) -> dict[str, Any]:
        """By its events."""
        *_, last = self.events(job)
        return last

    def events(self, job: str) -> Iterator[dict[str, Any]]:
        import json

        with self.http.stream("GET", f"/v1/jobs/{job}/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line[6:])


@contextlib.contextmanager
def serving(
    folder: Path, patches: Mapping[str, Stack] | None = None, limits: Limits | None = None, template: bool = False, **how: Any
) -> Iterator[Site]:
    """A server on a free port, with a ledger in ``folder``."""
    lm = trained("llama")
    if template:
        import copy

        lm.tokenizer = copy.deepcopy(lm.tokenizer)
        lm.tokenizer.chat_template = TEMPLATE
    options = Options(TOKEN, port=0, hosts=HOSTS, grace=5.0, limits=limits or Limits())
    site = Site(Service(lm, folder, options, patches, **how))
    try:
        yield site
    finally:
        site.close()


@contextlib.contextmanager
def limited(folder: Path) -> Iterator[Site]:
    """A server that takes little of anything, which has made one edit and knows a patch by name."""
    with serving(folder / "book", {"mine": (made(trained("llama"), 1),)}, LIMITS) as out:
        out.edit(FRANCE, "Rome", subject="France")
        yield out


def refused(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """The error that an answer holds, which has to be of this status and to say these words."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and all(w in error["message"] for w in words), error
    return error


def until(true: Callable[[], bool]) -> None:
    """Wait for it, not for ever."""
    late = time.monotonic() + 30
    while not true():
        assert time.monotonic() < late
        time.sleep(0.01)
