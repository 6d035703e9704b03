"""Kill `errata serve` at random moments of continual editing: after each, a restart must serve exactly what was acknowledged.

    python scripts/kill_serve.py MODEL --kills 50 --out FOLDER [--edits 12] [--seed 0] [--set rank=2 …]

Once without a server, edits are made one after another; the states by logits are what must be found, the time sets the moments.  Then a
server in a child is sent one edit after another (POST /v1/edits, continual), each followed by its events until it is done, which is the
acknowledgement, while another client asks for answers under `live` all the time; the child is killed (SIGKILL) at a moment drawn evenly.
A new server on the same ledger must list a prefix of the edits that holds every acknowledged one and at most one more (committed, its
acknowledgement not read), have bit for bit that prefix's logits in its ledger, say under `live` what those logits say, and leave no torn
folder.  It goes on from there, until there were KILLS kills; a full ledger is followed by a new one.
Children are forked from a process that has loaded the model, so that moments fall into editing and not into the start of Python.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

from killing import begin, end

TOKEN = "kill-me-if-you-can"
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}


class Child:
    """A server in a forked process."""

    def __init__(self, lm: Any, folder: Path) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(reading)
            try:
                self._serve(lm, folder, writing)
            finally:
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading) as stream:
            self.port = int(stream.readline())

    def _serve(self, lm: Any, folder: Path, writing: int) -> None:
        from errata.serve.options import Options
        from errata.serve.server import ServerRunner
        from errata.serve.service import Service

        service = Service(lm, folder, Options(TOKEN, port=0))
        running = ServerRunner(service, lambda url: (os.write(writing, f"{url.rsplit(':', 1)[1]}\n".encode()), None)[1])
        os._exit(0 if running.run() else 1)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, None if body is None else json.dumps(body), HEADERS)
        response = connection.getresponse()
        document = json.loads(response.read())
        connection.close()
        if response.status >= 400:
            raise SystemExit(f"{method} {path}: {document}")
        return document

    def edit(self, request: dict[str, Any], settings: dict[str, Any]) -> bool:
        """Whether the edit was acknowledged."""
        how = {**request, "mode": "continual", "force": True, "settings": settings}
        job = self.ask("POST", "/v1/edits", how)["job"]["id"]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("GET", f"/v1/jobs/{job}/events")
        response, status = connection.getresponse(), ""
        while line := response.readline():
            if line.startswith(b"data: "):
                status = json.loads(line[6:])["status"]
        if status == "failed":
            raise SystemExit(f"the edit failed by itself: {self.ask('GET', f'/v1/jobs/{job}')}")
        return status == "done"

    def kill(self) -> bool:
        """Whether it was still alive."""
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return status == signal.SIGKILL

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGTERM)
        _, status = os.waitpid(self.pid, 0)
        if status:
            raise SystemExit(f"a server that was asked to stop ended with {status}")


def driven(child: Child, todo: list[dict[str, Any]], settings: dict[str, Any], after: float) -> tuple[int, bool]:
    """(edits acknowledged, whether the server was killed ``after`` seconds before it had made all)."""
    told, over = [0], threading.Event()

    def client(step: Any) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):  # the server is gone
            step()

    def edits() -> None:
        for request in todo:
            told[0] += child.edit(request, settings)
        over.set()

    def answers() -> None:
        while not over.is_set():
            child.ask("POST", "/v1/completions", {"model": "live", "prompt": todo[0]["prompt"], "max_tokens": 4, "temperature": 0})

    crew = [threading.Thread(target=client, args=(step,), daemon=True) for step in (edits, answers)]
    for thread in crew:
        thread.start()
    if over.wait(after):
        for thread in crew:
            thread.join()
        return told[0], False
    hit = child.kill()
    over.set()
    for thread in crew:
        thread.join()
    return told[0], hit


def says(child: Child, prompts: list[str], logits: Any) -> bool:
    """Whether the server's likeliest next tokens under `live` are those of logits [N, V] at the prompts' ends."""
    import torch

    likely = torch.log_softmax(logits.double(), -1).topk(5).values
    asked = {"model": "live", "prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 5}
    found = child.ask("POST", "/v1/completions", asked)["choices"]
    tops = [sorted(c["logprobs"]["top_logprobs"][0].values(), reverse=True) for c in found if c["logprobs"]["tokens"]]
    rows = [i for i, c in enumerate(found) if c["logprobs"]["tokens"]]  # an answer that is empty says nothing
    return all(abs(a - b) < 1e-3 for i, top in zip(rows, tops, strict=True) for a, b in zip(top, likely[i].tolist(), strict=False))


def main() -> None:
    import torch

    from errata.ledger import Ledger

    trial = begin(__doc__)
    args, lm, settings, wanted, encoded, states = trial.args, trial.lm, trial.settings, trial.wanted, trial.encoded, trial.states
    length, prompts = trial.length, [r.prompt for r in trial.wanted]
    drawn, done, wrong, unread, books = trial.drawn, 0, [], 0, 0
    folder, had, told, hit = args.out / "book-0", 0, 0, False
    while True:
        child = Child(lm, folder)
        found = child.ask("GET", "/v1/edits")["edits"]
        count = len(found)
        folders = sorted(p.name for p in (folder / "patches").iterdir())
        right = {
            "acknowledged": had + told <= count <= had + told + hit,
            "prefix": [e["prompt"] for e in found] == prompts[:count],
            "logits": torch.equal(lm.logits(encoded, [Ledger.open(folder, lm).stack()]), states[count]),
            "answers": says(child, prompts, states[count][:, -1]),
            "folders": folders == sorted(e["patch"] for e in found),
        }
        unread += count - had - told
        wrong += [] if all(right.values()) else [{"ledger": folder.name, "had": had, "told": told, "found": count, **right}]
        had = count
        if done >= args.kills:
            child.stop()
            break
        if count == len(wanted):
            child.stop()
            books += 1
            folder, had, told, hit = args.out / f"book-{books}", 0, 0, False
            continue
        todo = [r.to_dict() for r in wanted[count:]]
        told, hit = driven(child, todo, settings, drawn.uniform(0, length / 3))
        done += hit
        if not hit:
            child.stop()
    end(trial, done, wrong, unread, books + 1)


if __name__ == "__main__":
    main()
