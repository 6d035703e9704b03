"""`errata serve` under attack: a thousand hostile connections, honest clients beside them, and `/health` all the time.

    python benchmarks/serve_hostile.py [--model almanac] [--hostile 1000] [--clients 32] [--rounds 3] [--requests 8] [--threads 1]
                                       [--pause 1] [--nice 10] [--out FILE.json]

The hostile connections are a process of their own.  Each is of one of the kinds in `KINDS`: it says nothing, drips headers or a body, sends
texts and bodies that are too much, or as much as is read at all, sends what is no HTTP, does not read what it asked for, or keeps a
connection that it no longer needs.  When it is hung up on, or has its answer, it begins again after ``pause`` seconds, more or less.
Another process asks for `/health` every 50 milliseconds, by turns on a connection that it keeps and on a new one.  The honest clients are
those of `serve_load.py`: every answer is compared with the library's.  They ask in rounds, first without the attack, then under it, then
without it again; *slower* is the seconds of a request under it by those without it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import platform
import random
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from serve_load import Load, middle, prepared, processor, serving

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
_EVERY = 0.05  # seconds between two questions for /health
_HEAD = "{} {} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n"


def _post(path: str, body: str) -> bytes:
    return (_HEAD.format("POST", path, len(body)) + "\r\n" + body).encode()


def _asked(path: str, **body: Any) -> bytes:
    return _post(path, json.dumps(body))


def _sent(text: bytes) -> Callable[[Streams], Awaitable[str]]:
    """Send it, and read the answer."""

    async def act(streams: Streams) -> str:
        streams[1].write(text)
        await streams[1].drain()
        return await _status(streams)

    return act


async def _status(streams: Streams) -> str:
    """The status of an answer; "closed" where there is none."""
    return _code(await streams[0].readline())


def _code(line: bytes) -> str:
    return [*line.decode("latin-1").split(" "), "closed"][1] if line else "closed"


def _dripped(head: bytes, drop: bytes) -> Callable[[Streams], Awaitable[str]]:
    """A beginning, and then a little more every second, until it is hung up on."""

    async def act(streams: Streams) -> str:
        streams[1].write(head)
        reading = asyncio.ensure_future(streams[0].readline())
        while not reading.done():
            streams[1].write(drop)
            await asyncio.wait([reading], timeout=1.0)
        return _code(reading.result())

    return act


async def _deaf(streams: Streams) -> str:
    """Ask for much and read nothing, until it is hung up on."""
    streams[1].transport.pause_reading()  # type: ignore[attr-defined]
    with contextlib.suppress(ConnectionError):
        for _ in range(10_000):
            streams[1].write(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 20)
            await streams[1].drain()
            await asyncio.sleep(0.1)
    return "closed"


async def _kept(streams: Streams) -> str:
    """One short question, and then nothing, until it is hung up on."""
    said = await _sent(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")(streams)
    await streams[0].read()
    return said


KINDS: dict[str, Callable[[Streams], Awaitable[str]]] = {
    "says nothing": _dripped(b"", b""),
    "drips headers": _dripped(b"GET /health HTTP/1.1\r\n", b"X: y\r\n"),
    "drips a body": _dripped((_HEAD.format("POST", "/v1/completions", 500_000) + "\r\n{").encode(), b" "),
    "a prompt of 200,000 characters": _sent(_asked("/v1/completions", model="live", prompt="a b c " * 33_333)),
    "four prompts of 200,000 characters": _sent(_asked("/v1/compare", prompts=["words of " * 22_222] * 4)),
    "a conversation of 200,000 characters": _sent(
        _asked("/v1/chat/completions", model="live", messages=[{"role": "user", "content": "a " * 99_999}])
    ),
    "a prompt as long as is read": _sent(_asked("/v1/completions", model="live", prompt="a " * 30_000)),
    "a million values": _sent(_post("/v1/check", "[" + "1," * 500_000 + "1]")),
    "thousands of fields": _sent(_post("/v1/completions", json.dumps(dict.fromkeys(map(str, range(9_000)))))),
    "no HTTP": _sent(b"\x16\x03\x01\x02\x00\x01 this is no HTTP \r\n\r\n"),
    "does not read": _deaf,
    "keeps its connection": _kept,
}


def attack(port: int, args: argparse.Namespace, over: Any, told: Any) -> None:
    """All hostile connections, until it is over; how each kind of attempt ended, by its status."""
    os.nice(args.nice)
    ends: Counter[str] = Counter()

    async def one(number: int) -> None:
        drawn, kind = random.Random(number), list(KINDS)[number % len(KINDS)]
        await asyncio.sleep(drawn.random() * args.pause)
        while True:
            said = "no connection"
            with contextlib.suppress(OSError):
                streams = await asyncio.open_connection("127.0.0.1", port)
                said = "closed"
                try:
                    said = await KINDS[kind](streams)
                finally:
                    streams[1].transport.abort()
            ends[f"{kind}: {said}"] += 1
            await asyncio.sleep(args.pause * (0.5 + drawn.random()))

    async def all_of_them() -> None:
        crew = [asyncio.ensure_future(one(i)) for i in range(args.hostile)]
        await asyncio.to_thread(over.wait)
        for task in crew:
            task.cancel()
        await asyncio.wait(crew)

    asyncio.run(all_of_them())
    told.put(dict(sorted(ends.items())))


def probe(port: int, over: Any, told: Any) -> None:
    """`/health` all the time; (the time, the seconds it took, or infinity where there was no answer) of each."""
    took, kept = [], http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    while not over.is_set():
        fresh = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        for connection in (kept, fresh):
            began = time.perf_counter()
            try:
                connection.request("GET", "/health")
                response = connection.getresponse()
                right = response.status == 200 and json.loads(response.read())["status"] == "ok"
                took.append((time.time(), time.perf_counter() - began if right else float("inf")))
            except (OSError, http.client.HTTPException):
                took.append((time.time(), float("inf")))
                connection.close()
            time.sleep(_EVERY)
        fresh.close()
    told.put(took)


def phase(load: Load, pid: int, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Some rounds of the honest clients."""
    began, before, took = time.time(), processor(pid), []
    for number in range(args.rounds):
        took += load.round(True, seed + number)[2]
    spent = time.time() - began
    return {
        "from": began,
        "to": time.time(),
        "answers": len(took),
        "seconds_a_request": round(middle(took), 4),
        "slowest": round(max(took), 3),
        "requests_per_second": round(len(took) / spent, 2),
        "processor_share": round((processor(pid) - before) / spent, 2),
    }


def health(took: list[tuple[float, float]], part: dict[str, Any]) -> dict[str, Any]:
    """What `/health` took in a phase."""
    inside = sorted(seconds for when, seconds in took if part["from"] <= when <= part["to"])
    return {
        "asked": len(inside),
        "unanswered": sum(s == float("inf") for s in inside),
        "median": round(middle(inside), 4),
        "99%": round(inside[int(0.99 * len(inside))], 4),
        "slowest": round(inside[-1], 4),
        "over_0.2": sum(s > 0.2 for s in inside),
    }


def measured(load: Load, process: Any, port: int, args: argparse.Namespace) -> dict[str, Any]:
    told, over, peace = multiprocessing.Queue(), multiprocessing.Event(), multiprocessing.Event()
    attacked: Any = multiprocessing.Queue()
    prober = multiprocessing.Process(target=probe, args=(port, over, told), daemon=True)
    crowd = multiprocessing.Process(target=attack, args=(port, args, peace, attacked), daemon=True)
    load.round(True, -1)  # banks are compiled, connections and caches warm
    prober.start()
    parts = {"before": phase(load, process.pid, args, 0)}
    crowd.start()
    parts["under_attack"] = phase(load, process.pid, args, 100)
    connections = len(os.listdir(f"/proc/{process.pid}/fd"))
    peace.set()
    ends = attacked.get(timeout=60)
    time.sleep(2.0)
    parts["after"] = phase(load, process.pid, args, 200)
    over.set()
    took = told.get(timeout=60)
    for part in parts.values():
        part["health"] = health(took, part)
        part["seconds"] = round(part.pop("to") - part.pop("from"), 1)
    calm = [parts[name]["seconds_a_request"] for name in ("before", "after")]
    return {
        **parts,
        "slower": round(2 * parts["under_attack"]["seconds_a_request"] / sum(calm), 2),
        "wrong": load.wrong,
        "unanswered": (3 * args.rounds + 1) * args.clients * args.requests - load.asked,
        "open_files_under_attack": connections,
        "attempts": ends,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="almanac")
    parser.add_argument("--method", default="baft")
    for name, default in {"hostile": 1000, "clients": 32, "rounds": 3, "requests": 8, "tokens": 12, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument("--nice", type=int, default=10, help="of the hostile clients, which elsewhere would be other machines' work")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "book"
        prompts, answers = prepared(args, folder)
        process, port = serving(args, folder)
        try:
            found = measured(Load(port, args, prompts, answers), process, port, args)
        finally:
            process.terminate()
            process.wait(60)
    names = ("model", "hostile", "clients", "rounds", "requests", "tokens", "threads", "pause", "nice")
    how = {name: getattr(args, name) for name in names}
    document = {**how, "cores": os.cpu_count(), "machine": platform.machine(), **found}
    text = json.dumps(document, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    under = found["under_attack"]["health"]
    raise SystemExit(bool(found["wrong"] or found["unanswered"] or under["over_0.2"]))


if __name__ == "__main__":
    main()
