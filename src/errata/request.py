"""What an editor sees (`EditRequest`), what a scorer sees (`Probe`), and a benchmark record (`Case`).

JSON Lines in and out; an error names file and line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

from errata.config import digest
from errata.documents import parse_json
from errata.errors import InputError
from errata.subjects import names_in, places, spell
from errata.writing import NO_SPACE

PROBE_KINDS = (
    *("rewrite", "rephrase"),
    *("neighbour", "unrelated", "same_subject", "forgetfulness", "distracting"),
    *("two_hop", "multi_hop", "reverse", "alias", "logical", "sub_fact", "out_of_domain"),
    *("same_sentiment", "opposite_sentiment"),
    "watch",  # the same of other subjects, found on the model (`errata.score.neighbours`)
)
SENTIMENT = ("same_sentiment", "opposite_sentiment")  # replies to the edited prompt itself, weighed by their likelihood
LOCAL_KINDS = ("neighbour", "unrelated", "same_subject", "forgetfulness")  # facts that an edit should leave as they were
# What `errata.score.robustness` adds.  "_seen": an editor may have trained on this surface of the fact; "_unseen": on one like it.
SURFACE_KINDS = (
    *("paraphrase_seen", "subject_seen", "subject_unseen", "shuffled_seen", "shuffled_unseen"),
    *("long_seen", "long_unseen", "long_tokens_seen", "long_tokens_unseen"),
    *("question_form", "completion_form", "chat"),
)
ROBUST_KINDS = (*SURFACE_KINDS, "statement_true", "statement_false", "negation")


JOINS = {"auto": "", "space": " ", "none": NO_SPACE}
_USUAL = {"occurrence": 1, "join": "auto"}
_LISTS = ("paraphrases", "unrelated", "aliases", "contrast")


def _text(name: str, value: object, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, str):
        raise InputError(f"{name} must be a text, not {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{name} is empty; give at least one word")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} holds half a character (a lone surrogate) at {error.start}; write the whole character") from None


def _pairs(name: str, given: Iterable[Any]) -> tuple[tuple[str, str], ...]:
    """Pairs of prompt and answer, checked."""
    pairs = []
    for i, pair in enumerate(given):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"{name}[{i}] must be a pair [prompt, answer]")
        for part, value in zip(("prompt", "answer"), pair, strict=True):
            _text(f"{name}[{i}] {part}", value)
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One fact to write.

    prompt        text that the target should follow; must contain ``subject`` where that is given
    target        the new answer
    subject       what the fact is about, in whole words of the prompt; it is kept as the prompt spells it (`errata.subjects`)
    old           the answer before, where known
    paraphrases   other prompts with the same answer; the editor may train on them
    unrelated     (prompt, answer) pairs that should stay; the editor may use them for locality regularisation
    aliases       other names of the subject; the editor may train on the prompt with them in the subject's place (`fill`)
    contrast      (prompt, answer) pairs: the prompt about other subjects, and what the base says to it (`errata.contrast`).  They say how
                  the fact is to be written, not what it is, so `id` does not depend on them
    occurrence    which of the subject's places in the prompt is meant: 1 the first, 2 the second …, -1 the last
    join          what stands between prompt and target: "auto" (a space, or nothing where one writes none: `errata.writing.seam`),
                  "space" or "none"
    restored      this was a request before (`restore`): it stays as it is, also where today a new one would be refused
    """

    prompt: str
    target: str
    subject: str | None = None
    old: str | None = None
    paraphrases: tuple[str, ...] = ()
    unrelated: tuple[tuple[str, str], ...] = ()
    aliases: tuple[str, ...] = ()
    contrast: tuple[tuple[str, str], ...] = ()
    occurrence: int = 1
    join: str = "auto"
    restored: InitVar[bool] = False

    def __post_init__(self, restored: bool) -> None:
        _text("prompt", self.prompt)
        _text("target", self.target)
        _text("subject", self.subject, optional=True)
        _text("old", self.old, optional=True)
        if any(isinstance(getattr(self, name), str) for name in _LISTS):
            raise InputError("paraphrases, unrelated, aliases and contrast are lists, not texts")
        for name in ("paraphrases", "aliases"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for i, text in enumerate(getattr(self, name)):
                _text(f"{name}[{i}]", text)
        for name in ("unrelated", "contrast"):
            object.__setattr__(self, name, _pairs(name, getattr(self, name)))
        if type(self.occurrence) is not int or self.occurrence == 0:
            raise InputError(f"occurrence must be 1 for the subject's first place, 2 …, or -1 for its last, not {self.occurrence!r}")
        if self.join not in JOINS:
            raise InputError(f"join must be one of {', '.join(JOINS)}, not {self.join!r}")
        if self.subject is not None and not restored:
            object.__setattr__(self, "subject", spell(self.prompt, self.subject))
            self.place()
        if self.aliases and self.subject is None:
            raise InputError(f"aliases are other names of the subject, and prompt {self.prompt!r} has none; give the key 'subject'")
        if self.subject in self.aliases:
            raise InputError(f"aliases[{self.aliases.index(self.subject)}] is the subject {self.subject!r} itself; give other names")

    def place(self) -> tuple[int, int]:
        """Characters [begin, end) of the subject in the prompt, of the occurrence that is meant; `InputError` where there is none.  Of one
        that was saved before whole words were asked for (`restore`), it may be a part of a word."""
        if self.subject is None:
            raise InputError(f"prompt {self.prompt!r} has no subject; give the key 'subject'")
        found = places(self.prompt, self.subject, parts=True)
        number = self.occurrence - 1 if self.occurrence > 0 else len(found) + self.occurrence
        if not 0 <= number < len(found):
            times = f"{len(found)} times"
            raise InputError(f"subject {self.subject!r} stands {times} in prompt {self.prompt!r}: no occurrence {self.occurrence}")
        return found[number]

    @property
    def continuation(self) -> str:
        """The target as it is tokenised behind a prompt (`errata.core.tokens.join`): with what ``join`` says in front."""
        return JOINS[self.join] + (self.target if self.join == "auto" else self.target.strip())

    @property
    def id(self) -> str:
        """Hash of the content without ``contrast``: equal requests have equal ids on every machine."""
        return digest({k: v for k, v in self.to_dict().items() if k != "contrast"})

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; absent fields left out."""
        out: dict[str, Any] = {"prompt": self.prompt, "target": self.target}
        if self.subject is not None:
            out["subject"] = self.subject
        if self.old is not None:
            out["old"] = self.old
        if self.paraphrases:
            out["paraphrases"] = list(self.paraphrases)
        if self.unrelated:
            out["unrelated"] = [list(pair) for pair in self.unrelated]
        if self.aliases:
            out["aliases"] = list(self.aliases)
        if self.contrast:
            out["contrast"] = [list(pair) for pair in self.contrast]
        out |= {key: value for key, value in (("occurrence", self.occurrence), ("join", self.join)) if value != _USUAL[key]}
        return out

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditRequest:
        """The inverse of `to_dict`; unknown keys raise."""
        request: EditRequest = _make(cls, record, required=("prompt", "target"), known=cls.__slots__)
        return request

    @classmethod
    def restore(cls, record: Mapping[str, Any]) -> EditRequest:
        """A request that was saved with a patch or in a ledger, to the letter: its id, and its patch's, depend on it."""
        request: EditRequest = _make(cls, record, required=("prompt", "target"), known=cls.__slots__, restored=True)
        return request


def fill(request: EditRequest, name: str) -> str:
    """The prompt with ``name`` in place of the subject, at the occurrence that is meant.

    Only the seam is mended: a name that begins with "the" begins a prompt with "The", and the comma that ends a name
    ("X, so called,") gives way to the punctuation that follows.
    """
    if request.subject is None:
        raise InputError(f"prompt {request.prompt!r} has no subject to put {name!r} in the place of; give the key 'subject'")
    begin, end = request.place()
    before, after = request.prompt[:begin], request.prompt[end:]
    if not before.strip() and name.startswith("the "):
        name = "T" + name[1:]
    if name.endswith(",") and (not after or not after[0].isspace()):
        name = name[:-1]
    return before + name + after


def _filled_name(request: EditRequest, prompt: str) -> str | None:
    """The name that stands in ``prompt`` where the request's has its subject; None where the two differ elsewhere, too."""
    if request.subject is None:
        return None
    begin, end = request.place()
    before, after = request.prompt[:begin], request.prompt[end:]
    if len(prompt) <= len(before) + len(after) or not (prompt.startswith(before) and prompt.endswith(after)):
        return None
    return prompt[len(before) : len(prompt) - len(after)]


@dataclass(frozen=True, slots=True)
class Probe:
    """One question asked to score an edit.  ``target`` None means "whatever the model said before the edit".

    ``also``: other accepted spellings or answers; a free answer that equals one of them is right.  Teacher forcing and
    likelihoods take ``target``.
    """

    kind: str
    prompt: str
    target: str | None = None
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _text("probe kind", self.kind)
        _text("probe prompt", self.prompt)
        _text("probe target", self.target, optional=True)
        object.__setattr__(self, "also", tuple(self.also))
        for i, answer in enumerate(self.also):
            _text(f"probe also[{i}]", answer)


@dataclass(frozen=True, slots=True)
class Case:
    """A request with the probes that score it: one benchmark record.

    What trains may not score, except by a probe whose kind says so: it ends in "_seen" and asks a paraphrase, or the prompt under
    an alias.  ``more``: requests that belong to the same change (a chain of facts in MQuAKE); all are written together before any
    probe is asked.
    """

    request: EditRequest
    probes: tuple[Probe, ...]
    more: tuple[EditRequest, ...] = ()

    def __post_init__(self) -> None:
        pairs = {prompt for r in self.requests for prompt, _ in (*r.unrelated, *r.contrast)}
        surfaces = {text for r in self.requests for text in (*r.paraphrases, *(fill(r, name) for name in r.aliases))}
        edited = {r.prompt for r in self.requests}
        for probe in self.probes:
            if probe.prompt in pairs or (probe.prompt in surfaces and not probe.kind.endswith("_seen")):
                raise InputError(
                    f"probe {probe.prompt!r} is also training text of its request; a model may not be scored on what it was shown"
                )
            if probe.kind not in ("rewrite", "chat", *SENTIMENT) and probe.prompt in edited:
                raise InputError(f"probe {probe.prompt!r} of kind {probe.kind!r} is the edited prompt itself; call it 'rewrite'")

        self._check_contrast()

    def _check_contrast(self) -> None:
        """`InputError` where a subject of ``contrast`` is asked about by a probe: what trains may not score."""
        names = {name for r in self.requests for prompt, _ in r.contrast if (name := _filled_name(r, prompt)) is not None}
        for probe in self.probes if names else ():
            if found := names_in(probe.prompt, names):
                raise InputError(f"probe {probe.prompt!r} asks about {found[0]!r}, which its request was trained to keep (contrast)")

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """All that are written together."""
        return (self.request, *self.more)

    @property
    def id(self) -> str:
        """The request's id; with ``more``, a hash of all ids."""
        if not self.more:
            return self.request.id
        return hashlib.sha256(" ".join(r.id for r in self.requests).encode()).hexdigest()[:16]


def _make(cls: Any, record: object, *, required: tuple[str, ...], known: Iterable[str], **more: Any) -> Any:
    if not isinstance(record, Mapping):
        raise InputError(f'expected an object like {{"prompt": …, "target": …}}, found {type(record).__name__}')
    known = tuple(known)
    unknown = sorted(set(record) - set(known))
    if unknown:
        raise InputError(f"unknown key {unknown[0]!r}; known keys are {', '.join(known)}")
    missing = [key for key in required if key not in record]
    if missing:
        raise InputError(f"key {missing[0]!r} is missing")
    for key in _LISTS:
        if key in record and not isinstance(record[key], list | tuple):
            raise InputError(f"{key} must be a list, not {type(record[key]).__name__}")
    return cls(**record, **more)


def read_bytes(path: Path) -> bytes:
    """What a file holds; `InputError` where it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a JSON Lines file") from None


def read_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """("file:line", parsed JSON) of each non-empty line."""
    path = Path(path)
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield where, parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=no_constant)
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
        except ValueError as error:  # also a number with more digits than Python reads
            hint = " (the file is one JSON list; write one object a line)" if number == 1 and line.lstrip().startswith(b"[") else ""
            raise InputError(f"{where}: not valid JSON: {error}{hint}; each line holds one object") from None
        except InputError as error:
            raise InputError(f"{where}: {error}") from None


def no_constant(name: str) -> float:
    """For json's ``parse_constant``: NaN and Infinity are no JSON."""
    raise InputError(f"{name} is not a JSON value")


def read_requests(path: str | Path) -> list[EditRequest]:
    """All requests of a JSON Lines file; raises `InputError` with file:line, also for a request given twice."""
    out: dict[str, str] = {}
    requests = []
    for where, record in read_lines(path):
        try:
            request = EditRequest.from_dict(record)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if request.id in out:
            raise InputError(f"{where}: the same request stands at {out[request.id]}; remove one")
        out[request.id] = where
        requests.append(request)
    if not requests:
        raise InputError(f"{path}: holds no request; write one JSON object a line, at least with prompt and target")
    return requests


def to_jsonl(requests: Iterable[EditRequest]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(r.to_dict(), ensure_ascii=False) + "\n" for r in requests)


def write_requests(path: str | Path, requests: Iterable[EditRequest]) -> None:
    """`to_jsonl` in a file."""
    Path(path).write_text(to_jsonl(requests), encoding="utf-8")
