"""What a server is started with."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one client, and all together, may ask for.

    body       bytes of a request
    prompt     tokens of one prompt (the model's window is a limit of its own)
    tokens     tokens of one answer at most
    rows       answers of one request (prompts × n)
    queue      answers that wait or run, altogether
    batch      rows of one batch
    width      tokens of one batch, padding included
    seconds    of one request, waiting included; also of sending its body
    edits      jobs that wait
    requests   facts of one job
    jobs       jobs that are remembered once they ended
    questions  compare, blame, check, trace and so on that wait or run
    streams    clients that watch jobs at once
    connections  open at once; where one more comes, the one that has kept the server waiting longest is closed
    idle       seconds that a connection may keep the server waiting: for a request's headers, for the next one, for reading its answer
    """

    body: int = 1 << 20
    prompt: int = 4096
    tokens: int = 1024
    rows: int = 64
    queue: int = 512
    batch: int = 64
    width: int = 32_768
    seconds: float = 120.0
    edits: int = 32
    requests: int = 256
    jobs: int = 1000
    questions: int = 16
    streams: int = 64
    connections: int = 1000
    idle: float = 30.0


@dataclass(frozen=True)
class Options:
    """host, port (0: a free one); token: what an edit needs; hosts: names a client may call the server by (empty: any);
    grace: seconds that answers and the edit in work are given at the end; threads: torch's, for everything together; files: whether
    settings of a method may name files of this machine and things to download."""

    token: str
    host: str = "127.0.0.1"
    port: int = 8377
    hosts: tuple[str, ...] = ()
    grace: float = 30.0
    threads: int = 1
    files: bool = False
    limits: Limits = Limits()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
