"""What the server says of itself and of its edits: the models it has, its page, its health and numbers, and what one may ask about them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from families import lm as trained
from made import made
from serving import Site, limited, refused
from tiny import FRANCE


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with limited(tmp_path_factory.mktemp("site")) as out:
        yield out


def test_models_by_every_name(site: Site) -> None:
    listed = [m["id"] for m in site.http.get("/v1/models").json()["data"]]
    assert listed == ["base", "live", "mine", "edit:1"]
    answers = {name: site.text(FRANCE, name) for name in ("base", "live", "llama", "edit:1", "edits:1", "event:0", "event:1", "mine")}
    mine = answers.pop("mine")
    assert answers == dict.fromkeys(answers, "Rome") | {"base": "Paris", "event:0": "Paris"}
    lm = trained("llama")
    assert mine == lm.generate([FRANCE], stacks=[(made(lm, 1),)], max_new_tokens=8, stop=(".",))[0]
    assert site.http.get("/v1/models/event:1").json()["id"] == "event:1"
    refused(site.http.get("/v1/models/event:2"), 404, "event 2")


def test_the_page_and_its_headers(site: Site) -> None:
    for path in ("/", "/index.html"):
        response = site.http.get(path)
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
        policy = response.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy and response.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in site.http.get("/health", headers={"Origin": "http://evil.example"}).headers


def test_health_and_metrics(site: Site) -> None:
    site.text(FRANCE)
    health = site.http.get("/health").json()
    queue = {"answers": 0, "edits": 0}
    assert health == {
        "status": "ok",
        "model": "llama",
        "base": site.service.lm.fingerprint,
        "live": 1,
        "event": 1,
        "queue": queue,
        "editing": None,
    }
    text = site.http.get("/metrics").text
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if not line.startswith("#")}
    assert values['errata_requests_total{code="200",method="POST",route="completions"}'] >= 1
    assert values['errata_edits_total{outcome="made"}'] == 1 and values["errata_live_edits"] == 1
    assert values["errata_tokens_total"] >= 2 and values["errata_first_token_seconds_count"] >= 1
    lines = []
    for i in range(6):  # strangers make no new lines, but for the first of them
        site.http.get(f"/v1/{i}")
        site.http.get(f"/{i}")
        lines.append(len(site.http.get("/metrics").text.splitlines()))
    assert lines[1:] == [lines[1]] * 5


def test_questions(site: Site) -> None:
    found = site.http.post(
        "/v1/compare", json={"prompts": [FRANCE, "The capital of Japan is"], "answers": [{"old": "Paris", "new": "Rome"}, None]}
    ).json()
    assert (found["before"], found["after"]) == ("base", "live")
    first, second = found["answers"]
    assert (first["before"]["text"], first["after"]["text"], first["changed"]) == ("Paris", "Rome", True) and first["moved"] > 0.5
    assert first["likelihood"]["old"]["before"] > 0.5 > first["likelihood"]["old"]["after"]
    assert first["likelihood"]["new"]["after"] > 0.5 > first["likelihood"]["new"]["before"] and "likelihood" not in second
    assert "".join(t["text"] for t in first["after"]["tokens"]).strip() == "Rome." and all(
        t["logprob"] <= 0 for t in first["after"]["tokens"]
    )
    blamed = site.http.post("/v1/blame", json={"prompt": FRANCE}).json()
    assert blamed["parts"][0]["edits"] == [1] and blamed["parts"][0]["needed"]
    checked = site.http.post("/v1/check", json={}).json()
    assert checked["sound"] and checked["edits"][0]["status"] == "right" and checked["edits"][0]["request"]["target"] == "Rome"
    traced = site.http.post("/v1/trace", json={"prompt": FRANCE, "subject": "France"}).json()
    assert set(traced["kinds"]) == {"block", "mlp", "attention"} and traced["high"] > traced["low"]
    assert all(len(rows) == len(traced["tokens"]) and len(rows[0]) == 4 for rows in traced["kinds"].values())
    watched = site.http.get("/v1/watch").json()["prompts"]
    assert watched[0] == FRANCE and len(watched) > 10 and len(set(watched)) == len(watched), "its own edits, then general ones"
    near = site.http.post(
        "/v1/neighbours", json={"prompt": "The capital of Spain is", "subject": "Spain", "paraphrases": ["Spain has"]}
    ).json()
    assert set(near) == {"prompts", "questions", "paragraphs", "looked_at"} and near["looked_at"] > 10
    assert near["prompts"][0] == "Spain has" and 2 <= len(near["prompts"]) <= 6 and not any("Spain is" in p for p in near["prompts"])
    assert all("France" not in p for p in near["prompts"]), "what a live edit writes is no neighbour"
    assert all(p.startswith("Question: The capital of") for p in near["questions"]) and len(near["paragraphs"]) == 1
    events = site.http.get("/v1/log").json()["events"]
    assert [e["verb"] for e in events] == ["apply"] and events[0]["details"]["edits"] == [1]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("compare", {"prompts": []}, 400, "prompts"),
        ("compare", {"prompts": [FRANCE], "answers": [None, None]}, 400, "2 answers for 1 prompts"),
        ("compare", {"prompts": [FRANCE], "after": "edit:5"}, 404, "there is no edit 5"),
        ("compare", {"prompts": [FRANCE], "max_tokens": 60}, 400, "this server gives 40"),
        ("compare", {"prompts": ["The capital of " * 9], "max_tokens": 39}, 400, "do not fit the model's 64 positions"),
        ("compare", {"prompts": [FRANCE] * 7}, 400, "too many"),
        ("blame", {"prompt": FRANCE, "max_tokens": 60}, 400, "this server gives 40"),
        ("blame", {"prompt": " "}, 400, "prompt"),
        ("trace", {"prompt": FRANCE, "subject": "Spain"}, 400, "does not occur"),
        ("trace", {"prompt": FRANCE, "subject": "France", "target": "Tokyo"}, 400, "expected was"),
        ("trace", {"prompt": FRANCE, "subject": "France", "model": "live"}, 400, "model"),
        ("neighbours", {"prompt": FRANCE, "subject": "Spain"}, 400, "does not occur"),
        ("check", {"repair": True}, 400, "not a field"),
    ],
)
def test_wrong_things_to_ask(site: Site, path: str, body: dict[str, Any], status: int, words: str) -> None:
    refused(site.http.post(f"/v1/{path}", json=body), status, words)
