"""The command in a process of its own: its start, its end, its kills, its arguments."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import signal
import socket
from pathlib import Path

import httpx
import pytest
from processes import ROOT, own
from tiny import FRANCE

from errata.cli import main


def test_kills_at_random_moments_of_continual_editing(tiny: str, tmp_path: Path) -> None:
    """In forks of one process, which fall into editing; `scripts/kill_serve.py` says what is compared."""
    argv = [str(ROOT / "scripts" / "kill_serve.py"), tiny, "--kills", "3", "--edits", "5", "--out", str(tmp_path / "out")]
    out, err = own([*argv, "--set", "rank=2", "--set", "steps=4"]).communicate(timeout=300)
    found = json.loads(out or "{}")
    assert found.get("kills") == 3 and found["wrong"] == [], err


def test_a_server_from_its_start_to_its_end(tiny: str, tmp_path: Path) -> None:
    """Two signals: the second ends the grace time; the edit in work is rolled back, the exit code is 0."""
    process = own(["-m", "errata", "serve", tiny, "--ledger", str(tmp_path / "book"), "--port", "0", "--grace", "600"])
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r" is at (http://127\.0\.0\.1:\d+)/#token=(\S+)$", line.rstrip())
    assert found is not None, line
    headers = {"Authorization": f"Bearer {found[2]}"}
    with httpx.Client(base_url=found[1], headers=headers, timeout=60) as client:
        long = {"rank": 2, "steps": 100_000, "stop": 0.0, "lr": 1e-9}
        job = client.post("/v1/edits", json={"prompt": FRANCE, "target": "Rome", "settings": long}).json()["job"]["id"]
        while client.get(f"/v1/jobs/{job}").json()["stage"] != "steps":
            pass
        process.send_signal(signal.SIGTERM)
        assert client.get("/health").json()["editing"]["id"] == job
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "" and "Traceback" not in err and "rolled back" not in out
    assert list((tmp_path / "book" / "patches").iterdir()) == []


CROWDED = """import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from errata.cli import main
sys.exit(main(sys.argv[1:]))"""


def test_more_connections_than_the_process_may_have_files(tiny: str, tmp_path: Path) -> None:
    process = own(["-c", CROWDED, "serve", tiny, "--ledger", str(tmp_path / "book"), "--port", "0", "--grace", "0.2"])
    assert process.stdout is not None
    found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
    assert found is not None
    with contextlib.ExitStack() as crowd:
        crowd.callback(process.terminate)
        for _ in range(300):
            connection = crowd.enter_context(socket.create_connection(("127.0.0.1", int(found[1])), timeout=30))
            with contextlib.suppress(OSError):
                connection.sendall(b"GET /health HTTP/1.1\r\n")
        ask = {"model": "live", "prompt": FRANCE, "max_tokens": 2}
        for _ in range(5):
            assert httpx.get(f"{found[0]}/health", timeout=10).json()["status"] == "ok"
            assert httpx.post(f"{found[0]}/v1/completions", json=ask, timeout=10).status_code == 200
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in err and len(err.splitlines()) < 20, err


ENDLESS = """import sys, time
from errata.serve.analysis_worker import AnalysisWorker
AnalysisWorker.check = lambda self: print("asked", flush=True) or time.sleep(600)  # as a check of many edits by a large model
from errata.cli import main
sys.exit(main(sys.argv[1:]))"""


def test_a_question_that_still_runs_does_not_keep_the_process(tiny: str, tmp_path: Path) -> None:
    process = own(["-c", ENDLESS, "serve", tiny, "--ledger", str(tmp_path / "book"), "--port", "0", "--grace", "0.2"])
    assert process.stdout is not None
    found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
    assert found is not None
    with contextlib.suppress(httpx.TransportError), httpx.Client(base_url=found[0], timeout=0.5) as client:
        client.post("/v1/check", json={})
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--host", "0.0.0.0"], 2, "need a token of yours"),
        (["--token-env", "NOWHERE_TO_BE_FOUND"], 2, "at least 16"),
        (["--token-file", "nowhere"], 2, "cannot be read"),
        (["--port", "70000"], 2, "--port must be from 0 to 65535"),
        (["--grace", "nan"], 2, "--grace must be"),
        (["--patch", "lyon"], 2, "NAME=DIR"),
        (["--patch", "lyon=nowhere"], 4, "nowhere"),
        (["--watch", "nowhere.jsonl"], 2, "no such file"),
        (["--max-body", "0"], 2, "at least 1"),
        (["--host", "no.such.host.invalid", "--token-env", "GOOD"], 2, "cannot listen there"),
    ],
)
def test_wrong_arguments(
    argv: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GOOD", "a-token-that-is-long-enough")
    assert main(["serve", "model", "--ledger", str(tmp_path / "book"), "--port", "0", *argv]) == code
    assert words in capsys.readouterr().err and not (tmp_path / "book").exists()


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "model", "--ledger", str(tmp_path / "book"), "--port", str(port)]) == 2
    assert f"127.0.0.1, port {port}: cannot listen there (Address already in use)" in capsys.readouterr().err


def test_without_the_extra(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "fastapi" else real(name, *more))
    assert main(["serve", "model", "--ledger", str(tmp_path / "book")]) == 2
    assert "needs fastapi: pip install 'errata[serve]'" in capsys.readouterr().err
