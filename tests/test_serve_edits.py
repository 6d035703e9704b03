"""Edits through the server: made in the background beside answers, watched, refused, stopped, taken back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import lm as trained
from ledgers import REQUESTS, SETTINGS, WEIGHTS, logits
from serving import TOKEN, Site, serving
from tiny import fill_disk

from errata.ledger import Ledger, apply
from errata.serve.jobs import Job
from errata.serve.options import Limits

FRANCE, ITALY, ROME = (r.prompt for r in REQUESTS)
LONG = {"rank": 2, "steps": 100_000, "stop": 0.0, "lr": 1e-9}  # goes on until it is stopped


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with serving(tmp_path / "book", limits=Limits(edits=2)) as out:
        yield out


def begin(site: Site, settings: dict[str, Any], **more: Any) -> str:
    """A job that is in work."""
    body = {"prompt": ROME, "target": "French", "settings": settings, "force": True, **more}
    job = site.http.post("/v1/edits", json=body).json()["job"]["id"]
    for document in site.events(job):
        if document["stage"] == "steps":
            return str(job)
    raise AssertionError("it ended by itself")


def test_an_edit_from_its_post_to_its_undo(site: Site) -> None:
    body = {"prompt": FRANCE, "target": "Rome", "subject": "France", "settings": SETTINGS, "author": "ada", "reason": "ticket 41"}
    response = site.http.post("/v1/edits", json=body)
    job = response.json()["job"]
    assert response.status_code == 202 and response.headers["location"] == f"/v1/jobs/{job['id']}" and job["status"] == "queued"
    documents = list(site.events(job["id"]))
    assert documents[-1]["status"] == "done" and documents[-1]["edits"] == [1] and documents[-1]["loss"] > 0
    assert {d["status"] for d in documents} <= {"queued", "checking", "editing", "done"}
    assert site.http.get(f"/v1/jobs/{job['id']}").json() == documents[-1] == site.http.get("/v1/jobs").json()["jobs"][0]
    edit = site.http.get("/v1/edits/1").json()
    assert site.http.get("/v1/edits").json() == {"edits": [edit]}
    assert (edit["prompt"], edit["target"], edit["live"], edit["undone"]) == (FRANCE, "Rome", True, None)
    assert (edit["applied"]["author"], edit["applied"]["reason"]) == ("ada", "ticket 41")
    other = Ledger.open(site.service.ledger.folder, trained("llama"))
    same = trained("llama")
    alone = Ledger.open(site.service.ledger.folder.parent / "alone", same)
    alone.apply(REQUESTS[:1], settings=SETTINGS)
    assert torch.equal(logits(other.lm, other.stack()), logits(same, alone.stack()))
    assert (site.text(FRANCE), site.text(FRANCE, "base"), site.text(ITALY)) == ("Rome", "Paris", "Italian")
    gone = site.http.delete("/v1/edits/1", params={"reason": "it was wrong"})
    assert gone.json() == {"edit": 1, "remade": [], "on_top": []} and site.text(FRANCE) == "Paris"
    assert site.http.get("/v1/edits").json() == {"edits": []} and site.text(FRANCE, "event:1") == "Rome"
    assert site.http.get("/v1/edits", params={"live": False}).json()["edits"][0]["undone"]["reason"] == "it was wrong"
    assert site.http.delete("/v1/edits/1").status_code == 409 and site.http.post("/v1/blame", json={"prompt": FRANCE}).status_code == 200


def test_what_is_there_already_is_found(site: Site) -> None:
    site.edit(FRANCE, "Rome", subject="France")
    for target, kind in (("Rome", "duplicate"), ("Tokyo", "contradiction")):
        response = site.http.post("/v1/edits", json={"prompt": FRANCE.lower(), "target": target})
        assert response.status_code == 409 and "edit 1 writes 'Rome'" in response.json()["error"]["message"]
        assert [(f["kind"], f["edit"]) for f in response.json()["findings"]] == [(kind, 1)]
    known = site.edit("The capital of Spain is", "Madrid", force=False)
    assert (known["status"], known["edits"], known["error"]["code"]) == ("failed", [], "ledger")
    assert [f["kind"] for f in known["findings"]] == ["known"] and len(site.service.ledger.log()) == 1


def test_many_and_a_chain(site: Site) -> None:
    facts = [r.to_dict() for r in REQUESTS]
    body = {"requests": facts, "mode": "continual", "settings": SETTINGS, "force": True}
    done = site.ended(site.http.post("/v1/edits", json=body).json()["job"]["id"])
    assert done["edits"] == [1, 2, 3] and len(site.http.get("/v1/edits").json()["edits"]) == 3
    refused = site.http.delete("/v1/edits/1")
    assert refused.status_code == 409 and "inside a chain" in refused.json()["error"]["message"]
    gone = site.http.delete("/v1/edits/1", params={"remake": True}).json()
    assert [r["edit"] for r in gone["remade"]] == [2, 3] and site.text(FRANCE) == "Paris"


def test_answers_go_on_while_an_edit_trains_and_it_can_be_stopped(site: Site) -> None:
    for thread in (site.service.editor.ledger.lm, site.service.analysis.lm):  # the same weights, in other modules
        pairs = zip(thread.hf.parameters(), site.service.lm.hf.parameters(), strict=True)
        assert thread.hf is not site.service.lm.hf and all(a.data_ptr() == b.data_ptr() for a, b in pairs)
    before = site.text(FRANCE, "base", logprobs=0)
    job = begin(site, LONG)
    assert [site.text(FRANCE, "base") for _ in range(3)] == [before] * 3
    assert site.http.get("/health").json()["editing"]["id"] == job
    found = site.http.post("/v1/compare", json={"prompts": [FRANCE]}).json()
    assert found["answers"][0]["moved"] == 0
    waiting = [site.http.post("/v1/edits", json={"prompt": "a", "target": "b", "force": True}).json()["job"]["id"] for _ in range(2)]
    full = site.http.post("/v1/edits", json={"prompt": "a", "target": "b", "force": True})
    assert full.status_code == 429 and full.headers["retry-after"]
    assert site.http.get(f"/v1/jobs/{job}").json()["status"] == "editing"
    for name in (*waiting, job):
        site.http.delete(f"/v1/jobs/{name}")
    assert [site.ended(name)["status"] for name in (*waiting, job)] == ["cancelled"] * 3
    assert site.service.ledger.log() == [] and list((site.service.ledger.folder / "patches").iterdir()) == []
    assert site.edit(FRANCE, "Rome")["status"] == "done"  # the editor is whole


def test_what_was_acknowledged_stays_when_the_rest_is_stopped(site: Site) -> None:
    """A job of many transactions, cancelled after the first."""
    editor, told = site.service.editor, threading.Event()
    real = Job.change

    def change(self: Job, **values: Any) -> None:
        real(self, **values)
        if values.get("edits"):
            told.set()
            self.cancelled = True

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(Job, "change", change)
        body = {"requests": [r.to_dict() for r in REQUESTS], "mode": "continual", "settings": SETTINGS, "force": True}
        done = site.ended(site.http.post("/v1/edits", json=body).json()["job"]["id"])
    assert told.is_set() and (done["status"], done["edits"]) == ("cancelled", [1])
    assert [e.number for e in editor.ledger.edits()] == [1] and site.text(FRANCE) == "Rome"


def test_a_job_that_is_cancelled_while_its_last_part_commits_is_done(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joint edits: fewer edits than facts."""
    editor = site.service.editor
    put = apply._put

    def cancelled(*args: Any) -> Any:
        out = put(*args)
        editor.current.cancelled = True  # type: ignore[union-attr]
        return out

    monkeypatch.setattr(apply, "_put", cancelled)
    body = {"requests": [r.to_dict() for r in REQUESTS[:2]], "mode": "batched", "batch_size": 2, "method": "ft-m", "force": True}
    done = site.ended(site.http.post("/v1/edits", json={**body, "settings": WEIGHTS}).json()["job"]["id"])
    assert (done["status"], done["edits"]) == ("done", [1]) and len(editor.ledger.edits()) == 1


def test_a_full_disk_and_an_edit_that_goes_wrong(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(monkeypatch, 0)
    failed = site.edit(FRANCE, "Rome")
    monkeypatch.undo()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "storage") and "the disk is full" in failed["error"]["message"]
    wild = site.edit(FRANCE, "Rome", settings={"rank": 2, "steps": 3, "lr": 1e30, "stop": 0.0})
    assert wild["status"] == "failed" and wild["error"]["code"] == "fit"
    assert site.service.ledger.log() == [] and site.edit(FRANCE, "Rome")["edits"] == [1]


def test_another_process_writes_and_live_follows(site: Site) -> None:
    assert site.text(FRANCE) == "Paris"
    Ledger.open(site.service.ledger.folder, trained("llama"), author="bob").apply(
        REQUESTS[:1], settings={**SETTINGS, "rank": 4}, force=True
    )
    assert site.text(FRANCE) == "Rome" and site.http.get("/health").json()["live"] == 1
    assert site.http.delete("/v1/edits/1", params={"author": "eve"}).status_code == 200 and site.text(FRANCE) == "Paris"
    assert [e.author for e in site.service.ledger.log()] == ["bob", "eve"]


def test_a_request_keeps_the_stack_it_began_with(site: Site) -> None:
    """Undone and its folder dropped while an answer runs."""
    site.edit(FRANCE, "Rome")
    parts: list[str] = []
    body = {"model": "live", "prompt": FRANCE, "temperature": 0, "max_tokens": 50, "stream": True}
    with site.http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                parts.append(line)
                if len(parts) == 1:
                    site.service.ledger.undo(1)
                    site.service.ledger.compact()
    whole = "".join(__import__("json").loads(p[6:])["choices"][0]["text"] for p in parts)
    assert whole.strip().startswith("Rome") and site.text(FRANCE) == "Paris"


@pytest.mark.parametrize("grace", [30.0, 0.0])
def test_the_edit_in_work_is_finished_or_rolled_back_at_the_end(tmp_path: Path, grace: float) -> None:
    with serving(tmp_path / "book") as site:
        begin(site, {"rank": 2, "steps": 150, "stop": 0.0, "lr": 0.02} if grace else LONG)
        queued = site.http.post("/v1/edits", json={"prompt": ITALY, "target": "Madrid", "force": True}).json()["job"]["id"]
        running, service = site.running, site.service
        stop = threading.Thread(target=running.stop, args=(grace,))
        stop.start()
        stop.join(60)
        assert not running.thread.is_alive() and service.editor.jobs[queued].status == "cancelled"
        status = next(j.status for j in service.editor.jobs.values())
    assert status == ("done" if grace else "cancelled")
    book = Ledger.open(tmp_path / "book", trained("llama"))
    assert len(book.edits()) == bool(grace) and len(list((tmp_path / "book" / "patches").iterdir())) == bool(grace)


def test_clients_are_told_when_the_server_stops(tmp_path: Path) -> None:
    with serving(tmp_path / "book") as site:
        begin(site, LONG)
        stop = threading.Thread(target=site.running.stop, args=(1.5,))
        stop.start()
        while not site.service.stopping:
            time.sleep(0.01)
        told = site.http.get("/health").json()["status"]  # on a connection that is open already
        stop.join(60)
    assert told == "stopping" and TOKEN
