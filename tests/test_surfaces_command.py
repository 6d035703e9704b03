"""`errata surfaces`: other names by rule, and from a chat endpoint, which here is a small HTTP server on this machine."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tiny import fill_disk, leftovers

from errata import endpoint as endpoints
from errata.benchmarks.almanac import Almanac
from errata.cli import main
from errata.endpoint import Endpoint
from errata.errors import ConfigError, ModelError
from errata.request import EditRequest, read_requests, write_requests
from errata.text.surfaces import halves, variants

ADA = EditRequest("The mother tongue of Ada Lovelace is", "French", "Ada Lovelace", "English")
SKY = EditRequest("The sky is", "green")
SECRET = "sk-very-secret"
Reply = tuple[int, dict[str, str], bytes]


def said(content: object) -> Reply:
    text = content if isinstance(content, str) else json.dumps(content)
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@dataclass
class Server:
    """Answers with `reply`, and keeps what it was asked."""

    url: str = ""
    reply: Callable[[str], Reply] = lambda text: said([])
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoints, "WAIT", 0.0)
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(body)
            state.headers.append(dict(self.headers))
            state.paths.append(self.path)
            status, headers, content = state.reply(body["messages"][0]["content"])
            self.send_response(status)
            for name, text in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http_server.server_address[1]}/v1"
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    http_server.shutdown()
    http_server.server_close()
    thread.join()


def answers(text: str) -> Reply:
    """Names to the first question, prompts to the second."""
    if text.startswith("Give"):
        return said(["Countess of Lovelace", "ada lovelace", "the French Ada", "Countess of Lovelace", "Lady Ada", ""])
    return said('Here they are:\n```json\n["Ada Lovelace spoke", "Lovelace spoke English", "The mother tongue of Ada Lovelace is"]\n```')


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, Path]:
    write_requests(tmp_path / "in.jsonl", [ADA, SKY])
    return str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"


def run(files: tuple[str, Path], *more: str) -> int:
    return main(["surfaces", files[0], "--out", str(files[1]), *more])


def asking(server: Server) -> tuple[str, ...]:
    return ("--endpoint", server.url, "--endpoint-model", "small")


# -- by rule ---------------------------------------------------------------------------------------------------


def test_by_rule_gives_the_seen_half(files: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files) == 0
    ada, sky = read_requests(files[1])
    assert ada.aliases == halves(variants("Ada Lovelace"))[0] and sky == SKY
    assert (ada.prompt, ada.target, ada.old) == (ADA.prompt, ADA.target, ADA.old)
    out = capsys.readouterr().out
    assert "2 requests, 8 aliases and 0 paraphrases added" in out and "1 requests have no subject" in out
    again = (str(files[1]), files[1].with_name("again.jsonl"))
    assert run(again) == 0 and read_requests(again[1]) == [ada, sky], "what a request brings stays"


def test_templates_of_the_same_relation_become_paraphrases(
    files: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tongue = {"templates": ["The mother tongue of {} is", "{} is a native speaker of", "Which language did {} speak at home?"]}
    table = tmp_path / "t.jsonl"
    table.write_text(json.dumps({"templates": ["{} lies in"]}) + "\n" + json.dumps(tongue) + "\n")
    assert run(files, "--templates", str(table)) == 0
    ada, sky = read_requests(files[1])
    assert (
        ada.paraphrases == ("Ada Lovelace is a native speaker of", "Which language did Ada Lovelace speak at home?") and not sky.paraphrases
    )
    assert "2 paraphrases added" in capsys.readouterr().out
    table.write_text('{"templates": ["no place for a subject"]}')
    assert run(files, "--templates", str(table), "--force") == 2 and "t.jsonl:1: expected" in capsys.readouterr().err
    case = next(iter(Almanac().load("dev", 1)))
    write_requests(files[0], [case.request])
    assert run(files, "--templates", "almanac", "--force") == 0
    found = read_requests(files[1])[0].paraphrases
    assert {p.prompt for p in case.probes if p.kind == "rephrase"} <= set(found), "so the almanac's own rephrases may then not score"


def test_a_file_is_replaced_only_when_told_and_only_if_it_is_one_of_requests(files: tuple[str, Path]) -> None:
    files[1].write_text("my diary")
    for more in ((), ("--force",)):
        assert run(files, *more) == 6
        assert files[1].read_text() == "my diary"
    write_requests(files[1], [SKY])
    assert run(files) == 6 and read_requests(files[1]) == [SKY]
    assert run(files, "--force", "--json") == 0 and len(read_requests(files[1])) == 2


def test_a_full_disk_leaves_what_was_there(files: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    write_requests(files[1], [SKY])
    fill_disk(monkeypatch, 0)
    assert run(files, "--force") == 6
    assert read_requests(files[1]) == [SKY] and leftovers(files[1].parent) == ["in.jsonl", "out.jsonl"]


# -- from an endpoint ------------------------------------------------------------------------------------------


def test_an_endpoint_gives_names_and_paraphrases(
    files: tuple[str, Path], server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.reply = answers
    assert run(files, *asking(server), "--names", "6", "--paraphrases", "3") == 0
    ada, sky = read_requests(files[1])
    assert ada.aliases == ("Countess of Lovelace", "Lady Ada"), "not the subject, the new answer, a repetition, nothing"
    assert ada.paraphrases == ("Ada Lovelace spoke",), "not the prompt itself, not the old answer"
    assert sky.aliases == () and sky.paraphrases, "no subject, no names; paraphrases all the same"
    assert len(server.asked) == 3 and {a["model"] for a in server.asked} == {"small"} and set(server.paths) == {"/v1/chat/completions"}
    texts = [a["messages"][0]["content"] for a in server.asked]
    assert '"Ada Lovelace"' in texts[0] and ADA.prompt in texts[0] and "6 texts" in texts[0] and SKY.prompt in texts[2]
    assert not any(word in text for text in texts[:2] for word in ("French", "English")), "the answers are not given to it"
    assert all(h["Authorization"] == f"Bearer {SECRET}" for h in server.headers)
    assert SECRET not in "".join(capsys.readouterr()) + files[1].read_text()


def test_no_key_no_header_and_what_is_there_is_not_asked_for(files: tuple[str, Path], server: Server) -> None:
    server.reply = answers
    write_requests(Path(files[0]), [EditRequest(ADA.prompt, "French", "Ada Lovelace", aliases=("Ada",))])
    assert run(files, *asking(server)) == 0
    (request,) = read_requests(files[1])
    assert request.aliases == ("Ada",) and len(server.asked) == 1 and "Authorization" not in server.headers[0]


def test_trying_again_helps_where_it_can(server: Server) -> None:
    replies = iter([(503, {}, b"busy"), (429, {}, b"slow down"), said(["a"])])
    server.reply = lambda text: next(replies)
    assert Endpoint(server.url + "/chat/completions/", "m").listed("x") == ["a"] and len(server.asked) == 3


@pytest.mark.parametrize(
    ("reply", "tries", "says"),
    [
        ((401, {}, b'{"error": "bad key"}'), 1, r"no answer: HTTP 401 .*bad key.*\$OPENAI_API_KEY"),
        ((500, {}, b"down"), 3, r"no answer \(3 tries\): HTTP 500"),
        ((302, {"Location": "http://127.0.0.1:9/elsewhere"}, b""), 1, "HTTP 302"),
        ((200, {}, b"<html>hello"), 1, "no chat completion: <html>hello"),
        ((200, {}, b'{"choices": []}'), 1, "no chat completion"),
        ((200, {}, b'{"choices": [{"message": {"content": null}}]}'), 1, "no chat completion"),
        (said("I cannot do that."), 1, "asked for a JSON list of texts and said: I cannot"),
        (said("[1, 2]"), 1, "asked for a JSON list of texts"),
        (said("] ["), 1, "asked for a JSON list of texts"),
        (said([]), 1, "gave no usable name"),
        (said(["Ada Lovelace", "the French one"]), 1, "gave no usable name"),
    ],
)
def test_a_failure_is_one_error_and_nothing_is_written(
    reply: Reply, tries: int, says: str, files: tuple[str, Path], server: Server, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.reply = lambda text: reply
    assert run(files, *asking(server)) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "at request 1 of 2; nothing was written" in err and SECRET not in err
    assert len(server.asked) == tries and re.search(says, err), err
    assert leftovers(files[1].parent) == ["in.jsonl"]


def test_a_failure_in_the_middle_writes_nothing(files: tuple[str, Path], server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.reply = lambda text: (400, {}, b"no") if SKY.prompt in text else answers(text)
    write_requests(files[1], [SKY])
    assert run(files, *asking(server), "--force") == 3
    assert "at request 2 of 2" in capsys.readouterr().err and read_requests(files[1]) == [SKY]


def test_nobody_listens(server: Server) -> None:
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9/v1/chat/completions: no answer \(3 tries\)"):
        Endpoint("http://127.0.0.1:9/v1", "m", seconds=2.0).ask("x")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--endpoint", "localhost:80", "--endpoint-model", "m"), "no http or https address"),
        (("--endpoint", "file:///etc/passwd", "--endpoint-model", "m"), "no http or https address"),
        (("--endpoint", "http://localhost/v1"), "give --endpoint-model NAME"),
        (("--endpoint-model", "m"), "--endpoint-model has no meaning without --endpoint"),
        (("--names", "3"), "--names has no meaning without --endpoint"),
    ],
)
def test_bad_arguments(more: tuple[str, ...], says: str, files: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, *more) == 2
    assert says in capsys.readouterr().err and not files[1].exists()
    with pytest.raises(ConfigError):
        Endpoint("http://localhost", " ")
