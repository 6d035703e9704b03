"""Names by kind, from which contrast subjects are taken: those in the package, the almanac's, or a list of the user's.

``common.txt`` holds well-known names, written for errata (CC0).  ``counterfact.txt.xz`` holds the subjects of CounterFact (Meng et al.
2022, MIT) by relation, made by ``scripts/make_names.py``.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from errata.benchmarks import facts
from errata.errors import InputError
from errata.request import read_bytes

_HERE = Path(__file__).parent
_ARTICLES = re.compile(r"^(?:the )+")
COUNT = 16  # neighbours of a fact, in the training half and in the watch half
_GENERAL = 12  # facts of the almanac
_FEWEST = 4  # names in a list of the user's: two for each half


@dataclass(frozen=True)
class Names:
    """``kinds``: {kind: names}; ``digest`` names the content."""

    kinds: Mapping[str, tuple[str, ...]]

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits."""
        text = "\n".join(f"{kind}\t{name}" for kind, own in self.kinds.items() for name in own)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def _kinds_of(self) -> dict[str, tuple[str, ...]]:
        out: dict[str, tuple[str, ...]] = {}
        for kind, own in self.kinds.items():
            for name in own:
                key = plain(name)
                out[key] = (*out.get(key, ()), kind)
        return out

    def kinds_of(self, subject: str) -> tuple[str, ...]:
        """The kinds that hold this name."""
        return self._kinds_of.get(plain(subject), ())


def plain(name: str) -> str:
    """A name as names are compared: without case and without a leading article."""
    words = " ".join(name.casefold().split())
    return _ARTICLES.sub("", words) if words.startswith("the ") else words


def share(name: str) -> float:
    """A number in [0, 1) that depends on the name only.  Below a half it may train, from there on it is watched."""
    return int.from_bytes(hashlib.sha256(f"contrast {plain(name)}".encode()).digest()[:6], "big") / 2**48


def may_train(name: str) -> bool:
    """Whether a name is in the training half; the other half is only ever watched."""
    return share(name) < 0.5


def of_model(model: str) -> Names:
    """The names for a model of that name: the almanac knows none but its own."""
    return _almanac() if model == "almanac" else bundled()


@functools.cache
def bundled() -> Names:
    """Those in the package."""
    common = (_HERE / "common.txt").read_text(encoding="utf-8").splitlines()
    subjects = lzma.decompress((_HERE / "counterfact.txt.xz").read_bytes()).decode().splitlines()
    return Names(_parsed(line.partition(": ") for line in (*common, *subjects) if line and not line.startswith("#")))


def _parsed(parts: Iterable[tuple[str, str, str]]) -> dict[str, tuple[str, ...]]:
    return {kind: tuple(dict.fromkeys(names.split("; "))) for kind, _, names in parts}


@functools.cache
def _almanac() -> Names:
    kinds: dict[str, dict[str, None]] = {}
    for fact in facts.facts():
        kinds.setdefault(fact.relation, {})[fact.subject] = None
    return Names({kind: tuple(own) for kind, own in kinds.items()})


def read(path: str | Path) -> Names:
    """A list of the user's: one name a line; all are of one kind."""
    text = read_bytes(Path(path)).decode("utf-8-sig", errors="replace")
    own = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    for number, line in enumerate(text.splitlines(), 1):
        if "\ufffd" in line:
            raise InputError(f"{path}:{number}: not UTF-8; save the file as UTF-8")
    if len(own) < _FEWEST:
        raise InputError(f"{path}: holds {len(own)} names; write at least {_FEWEST}, one a line")
    return Names({"given": own})


def general(model: str) -> list[str]:
    """Prompts about nothing in particular, to see whether an edit moved what has nothing to do with it; of the almanac, its own facts."""
    if model != "almanac":
        return [line for line in (_HERE / "general.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    out: dict[str, str] = {}
    for fact in sorted(facts.facts(), key=lambda f: facts.share("watch", f.subject, f.relation)):
        if fact.relation not in out and (shown := [t for t in facts.templates(fact)[0] if not t.endswith("?")]):
            out[fact.relation] = shown[0].format(fact.subject)
        if len(out) == _GENERAL:
            break
    return list(out.values())
