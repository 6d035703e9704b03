"""``errata serve``: the model over HTTP, under any stack, with edits made and taken back meanwhile."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.commands import common, files
from errata.commands.screen import Screen
from errata.errors import ConfigError, InputError

if TYPE_CHECKING:
    from errata.core.bank import Stack
    from errata.serve.options import Options

NEEDS = ("fastapi", "uvicorn", "prometheus_client")
_SHORTEST = 16  # characters of a token that was given


def add(commands: common.Subparsers) -> None:
    out = common.parser(commands, "serve", run, "serve a model over HTTP (OpenAI's API), and edit it meanwhile", json=False)
    out.add_argument("--ledger", type=Path, required=True, metavar="FOLDER", help="its edits; a new one is begun where there is none")
    out.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: only this machine)")
    out.add_argument("--port", type=int, default=8377, help="(8377; 0: a free one)")
    token = out.add_mutually_exclusive_group()
    token.add_argument("--token-env", metavar="NAME", help="environment variable with the token that edits need")
    token.add_argument("--token-file", type=Path, metavar="FILE", help="file with it; without either, one is made (on this machine only)")
    out.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name clients call it by; may be repeated")
    out.add_argument("--allow-files", action="store_true", help="let settings of an edit name files of this machine and downloads")
    out.add_argument(
        "--patch", action="append", default=[], metavar="NAME=DIR", help="saved patches as a model of this name; may be repeated"
    )
    out.add_argument("--watch", type=Path, metavar="FILE.jsonl", help='prompts to watch: {"prompt": …, "subject": …} a line')
    out.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="for answers and the edit in work at the end (30)")
    out.add_argument("--threads", type=common.positive, metavar="N", help="of torch, for everything (as torch chooses)")
    out.add_argument("--author", metavar="NAME", help="of edits that name none (the login name)")
    out.add_argument("--wait", type=float, default=30.0, metavar="SECONDS", help="for another writer of the ledger (30)")
    limits = out.add_argument_group("limits")
    for name, about in LIMITS.items():
        limits.add_argument(f"--max-{name}", type=float if name in ("seconds", "idle") else common.positive, metavar="N", help=about)


LIMITS = {
    "body": "bytes of a request (1048576)",
    "prompt": "tokens of a prompt (4096)",
    "tokens": "tokens of an answer (1024)",
    "rows": "answers of a request (64)",
    "queue": "answers that wait or run (512)",
    "batch": "rows of a batch (64)",
    "seconds": "of a request (120)",
    "edits": "edit jobs that wait (32)",
    "requests": "facts of a job (256)",
    "connections": "open at once (1000, or as many as the process may have files)",
    "idle": "seconds a connection may keep the server waiting for headers, for the next request, for reading an answer (30)",
}


def token(args: argparse.Namespace) -> tuple[str, bool]:
    """(the token, whether it was made here)."""
    from errata.serve.options import is_loopback

    if args.token_env is not None:
        given, where = os.environ.get(args.token_env, ""), f"the environment variable {args.token_env}"
    elif args.token_file is not None:
        try:
            given, where = args.token_file.read_text(encoding="utf-8"), str(args.token_file)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{args.token_file}: cannot be read ({error}); write the token into it") from None
    elif is_loopback(args.host):
        return secrets.token_urlsafe(24), True
    else:
        raise ConfigError(
            f"{args.host} can be reached from elsewhere, so edits need a token of yours: --token-env NAME or --token-file FILE"
        )
    given = given.strip()
    if len(given) < _SHORTEST or not given.isascii() or not given.isprintable() or " " in given:
        raise ConfigError(f"the token in {where} must be at least {_SHORTEST} printable ASCII characters without spaces")
    return given, False


def options(args: argparse.Namespace) -> tuple[Options, bool]:
    """What the arguments say, and whether the token was made here."""
    from errata.serve.options import Limits, Options, is_loopback

    if not 0 <= args.port <= 65_535:
        raise ConfigError(f"--port must be from 0 to 65535, not {args.port}")
    for name, least in {"grace": 0, "wait": 0, "max_seconds": 0, "max_idle": 1}.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= 86_400:
            raise ConfigError(f"--{name.replace('_', '-')} must be from {least} to 86400 seconds, not {value:g}")
    given = {name: value for name in LIMITS if (value := getattr(args, f"max_{name}")) is not None}
    hosts = tuple(h.lower() for h in args.allow_host)
    if is_loopback(args.host) or hosts:
        hosts = ("localhost", "127.0.0.1", "::1", args.host.strip("[]").lower(), *hosts)
    secret, made = token(args)
    import torch

    threads = args.threads or torch.get_num_threads()
    return Options(secret, args.host, args.port, hosts, args.grace, threads, args.allow_files, Limits(**given)), made


def patches(args: argparse.Namespace) -> dict[str, Stack]:
    out: dict[str, Stack] = {}
    for given in args.patch:
        name, _, folder = given.partition("=")
        if not name or not folder:
            raise ConfigError(f"--patch {given!r}: write NAME=DIR")
        out[name] = (*out.get(name, ()), *files.load_patches([folder]))
    return out


def watched(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    from errata.request import read_lines

    out = []
    for where, record in read_lines(args.watch) if args.watch is not None else ():
        about: Any = record if isinstance(record, dict) else {"prompt": record}
        prompt, subject = about.get("prompt"), about.get("subject")
        if not isinstance(prompt, str) or not prompt.strip() or not isinstance(subject, str | None):
            raise InputError(f'{where}: expected {{"prompt": …}}, with a subject or without')
        out.append((prompt, subject))
    return out


def run(args: argparse.Namespace, screen: Screen) -> None:
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"`errata serve` needs {', '.join(missing)}: pip install 'errata[serve]'")
    chosen, made = options(args)
    given, prompts = patches(args), watched(args)
    from errata.serve.server import ServerRunner, bind_socket, leave

    listening = bind_socket(chosen.host, chosen.port)  # first of all: a port that is taken needs no model
    args.until_end.callback(listening.close)
    lm = common.load(args)
    if Path(lm.name).is_dir():
        lm.name = str(Path(lm.name).resolve())  # the ledger remembers it, wherever it is called from
    from errata.serve.service import Service

    logging.basicConfig(
        stream=sys.stderr, level=logging.DEBUG if args.debug else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    service = Service(lm, args.ledger, chosen, given, prompts, author=args.author, wait=args.wait)

    def ready(url: str) -> None:
        screen.say(f"{lm.name} with the ledger {args.ledger} is at {url}/" + (f"#token={chosen.token}" if made else ""))
        screen.flush()

    if not ServerRunner(service, ready, listening).run():
        leave(0)
