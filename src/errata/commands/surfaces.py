"""``errata surfaces``: requests with other names of their subjects and other ways to ask, by rule or from a chat model."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from errata import storage
from errata.commands import common
from errata.commands.screen import Screen
from errata.errors import ConfigError, InputError, ModelError, StorageError
from errata.request import EditRequest, fill, read_lines, read_requests, to_jsonl

if TYPE_CHECKING:
    from errata.endpoint import Endpoint

NAMES, _PARAPHRASES = 10, 5
_ASK_NAMES = """Give {count} other names or descriptions by which readers would recognise "{subject}", the subject of this sentence:

{prompt}

Each must fit into the sentence in place of "{subject}" and mean the same thing. Do not mention what the sentence says about it.
Answer with a JSON list of {count} texts and nothing else."""
_ASK_PROMPTS = """Rephrase the beginning of this statement, or this question, in {count} ways:

{prompt}

Each must have the same answer; a beginning must break off where the answer follows, as the one above does. Do not give the answer.
Answer with a JSON list of {count} texts and nothing else."""


def add(commands: common.Subparsers) -> None:
    about = "add other names of the subject (aliases) to requests, and other ways to ask (paraphrases)"
    out = common.parser(commands, "surfaces", run, about, model=False)
    out.add_argument("requests", metavar="REQUESTS.jsonl", help="one JSON object a line, with prompt, target, subject …")
    out.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where the widened requests go")
    out.add_argument("--force", action="store_true", help="replace an earlier file of requests at --out")
    out.add_argument(
        "--templates",
        metavar="FILE.jsonl",
        help='paraphrases from templates: {"templates": ["{} was born in", …]}, a relation a line; or almanac',
    )
    out.add_argument(
        "--endpoint", metavar="URL", help="ask this OpenAI-compatible endpoint instead of the rules, like http://localhost:8000/v1"
    )
    out.add_argument("--endpoint-model", metavar="NAME", help="the model to ask there")
    out.add_argument(
        "--endpoint-key", default="OPENAI_API_KEY", metavar="VARIABLE", help="environment variable with the key (OPENAI_API_KEY)"
    )
    out.add_argument("--names", type=common.positive, metavar="N", help=f"names to ask the endpoint for ({NAMES})")
    out.add_argument("--paraphrases", type=common.positive, metavar="N", help=f"paraphrases to ask the endpoint for ({_PARAPHRASES})")


def run(args: argparse.Namespace, screen: Screen) -> None:
    wanted, endpoint, relations = read_requests(args.requests), _endpoint(args), _relations(args.templates)
    _check(args.out, args.force)
    out, counts = [], Counter[str]()
    with screen.progress() as progress:
        for i, request in enumerate(wanted, 1):
            try:
                request = _by_templates(request, relations)
                wide = (
                    by_rule(request)
                    if endpoint is None
                    else _by_model(request, endpoint, args.names or NAMES, args.paraphrases or _PARAPHRASES)
                )
            except ModelError as error:
                raise ModelError(f"{error} (at request {i} of {len(wanted)}; nothing was written)") from None
            counts["aliases"] += len(wide.aliases) - len(wanted[i - 1].aliases)
            counts["paraphrases"] += len(wide.paraphrases) - len(wanted[i - 1].paraphrases)
            counts["without a subject"] += request.subject is None
            out.append(wide)
            progress("requests", i, len(wanted))
    storage.write_atomic(args.out, to_jsonl(out).encode())
    screen.document({"requests": len(out), "saved": str(args.out), **counts})
    screen.say(f"{len(out)} requests, {counts['aliases']} aliases and {counts['paraphrases']} paraphrases added.")
    if counts["without a subject"]:
        screen.say(f"{counts['without a subject']} requests have no subject and got no alias.")
    screen.say(common.saved(args.out))


def _endpoint(args: argparse.Namespace) -> Endpoint | None:
    from errata.endpoint import Endpoint

    if args.endpoint is None:
        for name in ("endpoint_model", "names", "paraphrases"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} has no meaning without --endpoint URL")
        return None
    if args.endpoint_model is None:
        raise ConfigError("--endpoint needs the model's name there; give --endpoint-model NAME")
    return Endpoint(args.endpoint, args.endpoint_model, args.endpoint_key)


def _check(out: Path, force: bool) -> None:
    """`StorageError` now rather than after the last answer."""
    if not out.parent.is_dir():
        raise StorageError(f"{out}: {out.parent} is no folder; make it first")
    if not out.exists():
        return
    if not force:
        raise StorageError(f"{out} exists already; give another name, or --force to replace it")
    try:
        read_requests(out)
    except InputError:
        raise StorageError(f"{out} exists and is no file of requests; it is left alone, give another name") from None


def _relations(source: str | None) -> list[tuple[str, ...]]:
    """The templates of each relation of a file, or of the almanac."""
    if source is None:
        return []
    if source == "almanac":
        from errata.benchmarks.facts import relations

        return [(*r.templates, *r.questions) for r in relations().values()]
    out = []
    for where, record in read_lines(source):
        found = record.get("templates") if isinstance(record, dict) else None
        if not isinstance(found, list) or not all(isinstance(t, str) and t.count("{}") == 1 for t in found):
            raise InputError(f'{where}: expected {{"templates": ["…", …]}} with one {{}} for the subject in each')
        out.append(tuple(found))
    return out


def _by_templates(request: EditRequest, relations: Iterable[Sequence[str]]) -> EditRequest:
    """With the other templates of its relation as paraphrases; a request that has some as it is."""
    from errata.text.surfaces import templated

    return request if request.paraphrases else replace(request, paraphrases=templated(request, relations))


def by_rule(request: EditRequest) -> EditRequest:
    """With the seen half of `errata.text.surfaces.variants` as aliases; a request that has some, or no subject, as it is."""
    from errata.text.surfaces import halves, variants

    if request.subject is None or request.aliases:
        return request
    return replace(request, aliases=halves(variants(request.subject))[0])


def _by_model(request: EditRequest, endpoint: Endpoint, names: int, paraphrases: int) -> EditRequest:
    """With what the endpoint says; aliases or paraphrases that a request brings stay, and none are asked for."""
    if request.subject is not None and not request.aliases:
        said = endpoint.listed(_ASK_NAMES.format(count=names, subject=request.subject, prompt=request.prompt))
        kept = _usable(request, said[:names], lambda name: fill(request, name) != request.prompt)
        request = replace(request, aliases=kept or _nothing(endpoint, "name", request, said))
    if not request.paraphrases:
        said = endpoint.listed(_ASK_PROMPTS.format(count=paraphrases, prompt=request.prompt))
        kept = _usable(request, said[:paraphrases], lambda prompt: prompt != request.prompt.rstrip())
        request = replace(request, paraphrases=kept or _nothing(endpoint, "paraphrase", request, said))
    return request


def _usable(request: EditRequest, said: Iterable[str], new: Callable[[str], bool]) -> tuple[str, ...]:
    """Each once; not the request's own, and without the new or the old answer, which would give it away."""
    own = (request.subject or "").casefold()
    answers = [a.casefold().strip() for a in (request.target, request.old or request.target)]
    leaks = [a for a in answers if a not in own and a not in request.prompt.casefold()]
    return tuple(t for t in dict.fromkeys(said) if t and t.casefold() != own and new(t) and not any(a in t.casefold() for a in leaks))


def _nothing(endpoint: Endpoint, what: str, request: EditRequest, said: list[str]) -> tuple[str, ...]:
    raise ModelError(f"{endpoint.address}: {endpoint.model} gave no usable {what} for {request.prompt!r}; it said {said}")
