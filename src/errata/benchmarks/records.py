"""Records of benchmark files: a JSON list or JSON Lines, from a path or the Hugging Face hub, with typed fields.

Every error names the file and the number of the record (from 1), whichever way the file is written.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from errata.documents import check_depth, once, parse_json
from errata.errors import InputError, near
from errata.request import no_constant, read_bytes

HUB: Final = "hub:"
SUFFIXES: Final = (".json", ".jsonl")
_DECODER: Final = json.JSONDecoder(parse_constant=no_constant, object_pairs_hook=once)
_SPACE: Final = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Record:
    """One record.  ``where`` is "file: record 12"; ``index`` counts from 0."""

    where: str
    index: int
    values: Mapping[str, Any]

    def fail(self, message: str) -> InputError:
        """The error to raise."""
        return InputError(f"{self.where}: {message}")

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def text(self, key: str) -> str:
        """A field that is one text; it may be empty."""
        return self._typed(key, str, "a text")  # type: ignore[no-any-return]

    def texts(self, key: str) -> tuple[str, ...]:
        """A field that is a list of texts."""
        return tuple(self._part(f"{key}[{i}]", value, str, "a text") for i, value in enumerate(self._typed(key, list, "a list of texts")))

    def rows(self, key: str) -> list[tuple[str, ...]]:
        """A field that is a list of lists of texts."""
        found = enumerate(self._typed(key, list, "a list of lists"))
        lists = [(f"{key}[{i}]", self._part(f"{key}[{i}]", value, list, "a list of texts")) for i, value in found]
        return [tuple(self._part(f"{name}[{j}]", v, str, "a text") for j, v in enumerate(value)) for name, value in lists]

    def answers(self, key: str) -> tuple[str, ...]:
        """A field of accepted answers, best first: a text, a list, or (KnowEdit) a list of lists of spellings."""
        out: list[str] = []
        self._flatten(key, self._typed(key, object, "anything"), out)
        return tuple(dict.fromkeys(text for text in out if text.strip()))

    def inner(self, key: str) -> Record:
        """A field that is an object, as a record."""
        return Record(f"{self.where}, {key}", self.index, self._typed(key, dict, "an object"))

    def inners(self, key: str) -> list[Record]:
        """A field that is a list of objects."""
        found = enumerate(self._typed(key, list, "a list of objects"))
        return [Record(f"{self.where}, {key}[{i}]", self.index, self._part(f"{key}[{i}]", v, dict, "an object")) for i, v in found]

    def only(self, *known: str) -> Record:
        """This record, which has no other fields than ``known``."""
        for key in self.values:
            if key not in known:
                raise self.fail(unknown_field(key, known))
        return self

    def _flatten(self, name: str, value: Any, out: list[str]) -> None:
        if isinstance(value, list):
            for i, part in enumerate(value):
                self._flatten(f"{name}[{i}]", part, out)
        else:
            out.append(self._part(name, value, str, "a text, or lists of texts"))

    def _typed(self, key: str, kind: type, words: str) -> Any:
        if key not in self.values:
            raise self.fail(f"field {key!r} is missing")
        return self._part(key, self.values[key], kind, words)

    def _part(self, name: str, value: Any, kind: type, words: str) -> Any:
        if not isinstance(value, kind):
            raise self.fail(f"{name} must be {words}, not {type(value).__name__}")
        return value


def unknown_field(key: str, known: Collection[str]) -> str:
    return f"unknown field {key!r}; {near(key, sorted(known), 'known fields are')}"


def read_records(path: str | Path) -> list[Record]:
    """All records of a file.  Raises `InputError` where it cannot be read, is cut off or holds anything but objects."""
    path = Path(path)
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    out = [_object(path, i, value) for i, value in enumerate(_listed(path, text) if text.lstrip(_SPACE)[:1] == "[" else _lines(path, text))]
    if not out:
        raise InputError(f"{path}: holds no record; give a JSON list of objects or one object a line")
    return out


def _object(path: Path, index: int, value: Any) -> Record:
    where = f"{path}: record {index + 1}"
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be an object with fields, not {type(value).__name__}")
    return Record(where, index, value)


def _decode(where: str, text: str, at: int) -> tuple[Any, int]:
    try:
        found, end = _DECODER.raw_decode(text, at)
        check_depth(found)
        return found, end
    except json.JSONDecodeError as error:
        ends = error.msg.startswith("Unterminated") or not text[error.pos :].strip(_SPACE)
        cut = " (it is cut off here)" if ends else ""
        raise InputError(f"{where}: not valid JSON: {error}{cut}; mend or remove the record") from None
    except (ValueError, RecursionError) as error:  # a number with more digits than Python reads; thousands of brackets
        raise InputError(f"{where}: not valid JSON: {error}; mend or remove the record") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _listed(path: Path, text: str) -> Iterator[Any]:
    """The values of one JSON list, read one by one so that an error can name the record."""
    at, count = _skip(text, text.index("[") + 1), 0
    while text[at : at + 1] != "]":
        where = f"{path}: record {count + 1}"
        value, at = _decode(where, text, at)
        yield value
        count, at = count + 1, _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            cut = "the file is cut off" if at >= len(text) else f"{text[at]!r} stands where , or ] should"
            raise InputError(f"{where}: {cut} behind this record; mend the list")
    if rest := text[at + 1 :].strip(_SPACE):
        raise InputError(f"{path}: {rest[:20]!r} stands behind the end of the list, after record {count}; remove it")


def _lines(path: Path, text: str) -> Iterator[Any]:
    """JSON Lines; empty lines do not count."""
    for count, line in enumerate((line for line in text.split("\n") if line.strip(_SPACE)), 1):
        where = f"{path}: record {count}"
        try:
            value, at = _decode(where, line, _skip(line, 0))
        except InputError as error:
            raise _spread(path, text) or error from None
        if rest := line[at:].strip(_SPACE):
            raise InputError(f"{where}: {rest[:20]!r} stands behind the object; write one object a line")
        yield value


def _spread(path: Path, text: str) -> InputError | None:
    """The error for a file that is one object written over several lines."""
    try:
        parse_json(text)
    except ValueError:
        return None
    return InputError(f"{path}: is one JSON value over several lines; give a JSON list of objects, or one object a line")


def _skip(text: str, at: int) -> int:
    while text[at : at + 1] and text[at] in _SPACE:
        at += 1
    return at


def locate(data: str | Path) -> Path:
    """The local path of ``--data``: itself, or the downloaded copy of hub:OWNER/NAME/PATH[@REVISION] (a file of a data set)."""
    if not str(data).startswith(HUB):
        path = Path(data).expanduser()
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; give a JSON or JSON Lines file, a folder of them, or {HUB}OWNER/NAME/PATH")
        return path
    name, _, revision = str(data).removeprefix(HUB).partition("@")
    owner, _, rest = name.partition("/")
    repository, _, inside = rest.partition("/")
    if not (owner and repository and inside):
        raise InputError(
            f"{data}: write {HUB}OWNER/NAME/PATH, the path of one JSON file in the data set, and @REVISION behind it to pin one"
        )
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise InputError(
            f"{data}: the hub needs huggingface_hub; pip install huggingface_hub, or download the file and give its path"
        ) from None
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", inside, repo_type="dataset", revision=revision or None))
    except (OSError, ValueError, LookupError) as error:  # what the hub's client raises: no network, no such repository, file or revision
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{data}: could not be fetched ({first}); check name and network, or download the file and give its path"
        ) from None
