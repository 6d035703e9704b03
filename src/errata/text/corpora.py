"""Text to read a model with: the bundled sample, a file, a folder, or a dataset of the hub."""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import errata
from errata.errors import InputError

BUNDLED = {"bundled": "train", "heldout": "heldout"}  # English Wikipedia paragraphs (see the almanac's NOTICE)
HUB = "hub:"


@dataclass(frozen=True)
class Corpus:
    """Texts in their order; ``digest`` names the content."""

    name: str
    texts: Sequence[str]
    digest: str


def bundled(name: str) -> str:
    """The text in the package: "train" or "heldout"."""
    return lzma.decompress((Path(errata.__file__).parent / "almanac" / "text" / f"{name}.txt.xz").read_bytes()).decode()


def open_corpus(source: str) -> Corpus:
    """A text by name:

    almanac         what the almanac was trained on: that text, and every training sentence about a fact
    bundled         English Wikipedia paragraphs in the package (heldout: those the almanac was not trained on)
    FILE.txt        a paragraph a line; FILE.jsonl: the key "text" of each line
    FOLDER          every .txt and .jsonl in it and below, in the order of their paths
    hub:NAME        a dataset of the Hugging Face hub, hub:NAME:CONFIG:SPLIT (split "train"); needs the package `datasets`
    """
    if source in BUNDLED or source == "almanac":
        return _bundled(source)
    if source.startswith(HUB):
        return _hub(source)
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl") and p.is_file())
        if not files:
            raise InputError(f"{source}: holds no .txt or .jsonl file")
        return _corpus(source, [text for file in files for text in _file(file)])
    return _corpus(source, _file(path))


@functools.cache
def _bundled(source: str) -> Corpus:
    """Read once a process: it is part of the package and does not change."""
    if source == "almanac":
        from errata.benchmarks.facts import facts, sentences

        told = [f"{s.prompt} {s.answer}." for fact in facts() for s in sentences(fact) if s.kind == "training"]
        return _corpus(source, [*bundled("train").split("\n"), *told])
    return _corpus(source, bundled(BUNDLED[source]).split("\n"))


def _corpus(name: str, texts: Sequence[str]) -> Corpus:
    kept = [t.strip() for t in texts if t.strip()]
    if not kept:
        raise InputError(f"{name}: holds no text; give a file with words in it")
    digest = hashlib.sha256()
    for text in kept:
        digest.update(text.encode("utf-8", "replace") + b"\n")
    return Corpus(name, kept, digest.hexdigest()[:16])


def _file(path: Path) -> list[str]:
    try:
        raw = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        known = ", ".join((*BUNDLED, "almanac", "a .txt or .jsonl file, a folder", f"{HUB}NAME"))
        raise InputError(f"{path}: no such text; give {known}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if path.suffix != ".jsonl":
        return raw.split("\n")
    out = []
    for number, line in enumerate(raw.split("\n"), 1):
        if line.strip():
            try:
                out.append(str(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(f'{path}:{number}: expected an object with the key "text"') from None
    return out


def _hub(source: str) -> Corpus:
    name, _, rest = source.removeprefix(HUB).partition(":")
    config, _, split = rest.partition(":")
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise InputError(f"{source}: reading the hub needs the package `datasets`; pip install datasets, or give a text file") from None
    try:
        rows = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds, also for no network
        raise InputError(f"{source}: cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    if "text" not in rows.column_names:
        raise InputError(f"{source}: has no column 'text'; it has {', '.join(rows.column_names)}")
    return Corpus(source, rows["text"], str(rows._fingerprint)[:16])
