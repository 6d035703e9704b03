"""What tests of the page share: a server in a process of its own, and the page as a user of it sees it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from browser import View

FRANCE = {"prompt": "The capital of France is", "target": "Lyon", "subject": "France"}
SPAIN = {"prompt": "The capital of Spain is", "target": "Seville", "subject": "Spain"}
WATCHED = ("The language of France is", "The currency of Japan is", "Romania is located in the continent")

# every text that the places of the job and of notes ever show: what flashes by counts too
RECORD = """addEventListener("DOMContentLoaded", () => {
  window.seen = [];
  new MutationObserver(() => { for (const id of ["stage", "loss", "said"]) {
    const text = document.getElementById(id)?.textContent;
    if (text && window.seen.at(-1) !== id + ": " + text) { window.seen.push(id + ": " + text); }
  } }).observe(document.body, { subtree: true, childList: true, characterData: true });
});"""


@dataclass
class Server:
    """``address``: with the token; ``root``: without."""

    address: str

    @property
    def root(self) -> str:
        return self.address.partition("#")[0]

    @property
    def token(self) -> str:
        return self.address.partition("#token=")[2]

    def call(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.root + path, data, headers, method=method), timeout=60) as answer:
            return json.load(answer)

    def edits(self) -> list[dict[str, Any]]:
        """Those that are live."""
        return self.call("GET", "v1/edits")["edits"]

    def edit(self, **request: Any) -> dict[str, Any]:
        """Edit past the page; the ended job."""
        name = self.call("POST", "v1/edits", request)["job"]["id"]
        with urllib.request.urlopen(f"{self.root}v1/jobs/{name}/events", timeout=60) as events:
            last = [line for line in events if line.startswith(b"data:")][-1]
        job = json.loads(last.removeprefix(b"data:"))
        assert job["status"] == "done", job
        return job


class Desk:
    """The page as a user of it sees it."""

    def __init__(self, opened: View) -> None:
        self.view, self.page = opened, opened.page
        self.answers, self.history = self.page.get_by_role("region", name="Answers"), self.page.get_by_role("complementary", name="History")
        self.moved = self.page.get_by_role("region", name="What else moved")
        self.trouble, self.said = self.page.locator("#trouble"), self.page.locator("#said")

    def fill(self, prompt: str, target: str = "", subject: str = "") -> None:
        for name, text in (("Prompt", prompt), ("New answer", target), ("Subject", subject)):
            self.page.get_by_role("textbox", name=name, exact=True).fill(text)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def write(self, prompt: str, target: str, subject: str) -> int:
        """Edit; its number."""
        self.fill(prompt, target, subject)
        self.press("Edit")
        return self.number("is live")

    def number(self, what: str) -> int:
        """Of the edit of which the page says that it ``what``."""
        note = self.said.get_by_text(re.compile(rf"^Edit \d+ {what}"))
        note.wait_for()
        return int(note.inner_text().split()[1])

    def side(self, name: str) -> tuple[str, list[str], dict[str, float]]:
        """The answer of a side (Before, After), its marked words, and the probabilities under it."""
        self.page.locator("#result:not([aria-busy])").wait_for()
        side = self.answers.get_by_role("group", name=name)
        read = "(side) => ['.said', '.said :is(del, ins)', 'dt', 'dd'].map(s => [...side.querySelectorAll(s)].map(e => e.innerText))"
        (said,), marked, names, values = side.evaluate(read)  # at once: between two calls the page may draw anew
        odds = {n: float(re.sub("[<>%]", "", v)) / 100 for n, v in zip(names, values, strict=True)}
        return said, marked, odds

    def rows(self) -> dict[str, tuple[str, str, float]]:
        """What else moved: (before, after, moved) of each prompt."""
        self.moved.locator("table").wait_for()
        cells = "rows => rows.map(r => [...r.children].map(c => c.innerText.trim()))"
        found = self.moved.locator("tbody tr:not(.group)").evaluate_all(cells)
        return {p: (before, after, float(re.sub("[<>%]", "", moved)) / 100) for p, before, after, moved in found}


@pytest.fixture(scope="module")
def running(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    (folder / "watch.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in WATCHED))
    more = ["--ledger", str(folder / "book"), "--watch", str(folder / "watch.jsonl"), "--port", "0", "--author", "ada"]
    command = [sys.executable, "-m", "errata", "serve", "almanac", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        errors: list[str] = []
        threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True).start()
        line = process.stdout.readline() if process.stdout else ""
        found = re.search(r"http://127\.0\.0\.1:\d+/#token=\S+", line)
        assert found, (line, errors)
        yield Server(found[0])
        process.terminate()
        assert process.wait(60) == 0, errors


@pytest.fixture
def server(running: Server) -> Server:
    """With no edit live."""
    for edit in reversed(running.edits()):
        running.call("DELETE", f"v1/edits/{edit['number']}")
    return running


@pytest.fixture
def desk(server: Server, view: Callable[..., View]) -> Callable[..., Desk]:
    """desk(**how): the page opened with its token; see `browser.view`."""
    return lambda address=server.address, **how: Desk(view(address, script=RECORD, **how))
