"""Edits: made in the background, watched, listed, taken back."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query
from fastapi.responses import JSONResponse, Response, StreamingResponse

from errata import registry
from errata.errors import ErrataError, LedgerError
from errata.ledger.database import Edit
from errata.ledger.findings import FindingsError, find_conflicts, raise_on_findings
from errata.methods.in_context.demonstrations import PACKAGED
from errata.request import EditRequest, fill
from errata.serve.api_errors import APIError, to_api_error
from errata.serve.bodies import ParsedRoute
from errata.serve.jobs import EditSpec, Job, finding_document
from errata.serve.middleware import require_token
from errata.serve.schemas import EditPost
from errata.serve.service import Service
from errata.text.corpora import BUNDLED

_LONGEST = 1000  # characters of a text in the settings: it is put into every text that is trained
_BEAT = 15.0  # seconds between signs of life of a stream
FILES = {"demonstrations": (None, *PACKAGED), "encoder": (None,), "stats": (*BUNDLED, "almanac")}  # what these may be without --allow-files
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]


def routes(service: Service) -> APIRouter:
    """Of edits, and of the jobs that make them."""
    router = APIRouter(tags=["edits"], route_class=ParsedRoute)
    token = [Depends(require_token(service.options.token))]

    @router.post("/v1/edits", status_code=202, dependencies=token)
    def post(body: EditPost) -> Response:
        """Begin an edit; its job says how it goes.  409 where a fact is live already, or contradicts one."""
        job = service.editor.apply(_plan(service, body))
        return JSONResponse({"job": job.document()}, 202, {"Location": f"/v1/jobs/{job.id}"})

    @router.get("/v1/edits")
    def edits(live: Annotated[bool, Query(description="only those that are on")] = True) -> dict[str, Any]:
        """Edits by number."""
        return {"edits": [described(e) for e in service.ledger.edits(live)]}

    @router.get("/v1/edits/{number}")
    def edit(number: Number) -> dict[str, Any]:
        """One edit."""
        return described(_edit(service, number))

    @router.delete("/v1/edits/{number}", dependencies=token)
    async def undo(
        number: Number,
        remake: Annotated[bool, Query(description="make later edits again, as if this one had never been")] = False,
        reason: Annotated[str, Query(max_length=10_000)] = "",
        author: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    ) -> dict[str, Any]:
        """Take an edit back.  409, with the way out, where the ledger refuses."""
        _edit(service, number)
        job = service.editor.undo(number, remake, author, reason)
        await _ended(service, job)
        done = job.result
        remade = [{"edit": n, "before": old, "now": new} for n, old, new in done.remade]
        return {"edit": done.edit, "remade": remade, "on_top": list(done.on_top)}

    @router.get("/v1/log")
    def log(last: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None) -> dict[str, Any]:
        """What was done to the ledger, oldest first."""
        return {"events": [dataclasses.asdict(e) for e in service.ledger.log(last)]}

    _jobs(router, service, token)
    return router


def _jobs(router: APIRouter, service: Service, token: list[Any]) -> None:
    watching = [0]

    @router.get("/v1/jobs")
    def jobs() -> dict[str, Any]:
        """Jobs since the server started, oldest first."""
        return {"jobs": [job.document() for job in list(service.editor.jobs.values())]}

    @router.get("/v1/jobs/{id}")
    def job(id: str) -> dict[str, Any]:
        """How a job goes."""
        return _job(service, id).document()

    @router.delete("/v1/jobs/{id}", dependencies=token)
    def cancel(id: str) -> dict[str, Any]:
        """Stop a job.  What it has acknowledged stays; what is in work is rolled back."""
        found = _job(service, id)
        service.editor.cancel(found)
        return found.document()

    @router.get("/v1/jobs/{id}/events", response_class=StreamingResponse)
    async def events(id: str) -> StreamingResponse:
        """Server-sent events: the job's document at each change, until it ends."""
        found = _job(service, id)
        if watching[0] >= service.options.limits.streams:
            raise APIError(429, f"{watching[0]} clients watch jobs, no more may; ask for the job instead", "too_many_streams")
        return _Watching(_changes(found), watching)


def described(edit: Edit) -> dict[str, Any]:
    """An edit as the page shows it: its first fact in front."""
    first = edit.requests[0]
    return {**edit.to_dict(), "prompt": first.prompt, "target": first.target, "subject": first.subject}


def _plan(service: Service, body: EditPost) -> EditSpec:
    """What to do; whatever can be said at once is wrong is said at once."""
    limits = service.options.limits
    if len(body.facts) > limits.requests:
        raise APIError(400, f"{len(body.facts)} facts are too many for one job; give {limits.requests} at most", "too_many", "requests")
    requests = []
    for i, fact in enumerate(body.facts):
        where = None if body.requests is None else f"requests.{i}"
        try:
            requests.append(EditRequest.from_dict(fact.model_dump(exclude_defaults=True)))
        except ErrataError as error:
            raise APIError(400, str(error), "invalid_fact", where) from None
    if body.batch_size is not None and body.mode != "batched":
        raise APIError(400, f"batch_size has no meaning in {body.mode} mode", "invalid_value", "batch_size")
    _settings(service, body.method, body.settings)
    editor = registry.get("method", body.method).for_model(service.lm, **body.settings)
    _window(service, requests, {getattr(editor, "end", ""), *_ends(body.settings)})
    if not body.force:
        try:
            raise_on_findings(list(find_conflicts(requests, service.ledger.edits())), "set force")
        except FindingsError as error:
            raise APIError(409, str(error), "findings", None, {"findings": [finding_document(f) for f in error.findings]}) from None
    author = body.author or service.ledger.author
    return EditSpec(tuple(requests), body.method, body.settings, body.mode, author, body.reason, body.force, body.batch_size)


def _settings(service: Service, method: str, settings: dict[str, Any]) -> None:
    """`APIError` for what only Python's arguments are called, and for the server's files and downloads; also of a wrapped method."""
    for name, value in settings.items():
        if name in ("cls", "lm"):
            raise APIError(400, f"{method} has no setting {name!r}", "invalid_setting", "settings")
        if name in FILES and value not in FILES[name] and not service.options.files:
            known = " or ".join("null" if own is None else repr(own) for own in FILES[name])
            raise APIError(
                403,
                f"{name} {value!r} would make the server read a file or download something; give {known}, or start it with --allow-files",
                "files_not_allowed",
                "settings",
            )
        if isinstance(value, str) and len(value) > _LONGEST:
            raise APIError(400, f"{method}: {name} has {len(value)} characters, {_LONGEST} are taken", "invalid_setting", "settings")
        if isinstance(value, dict):
            _settings(service, method, value)


def _ends(settings: dict[str, Any]) -> Iterator[str]:
    """What settings, also those of a wrapped method, put behind a target."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _ends(value)
        elif name == "end" and isinstance(value, str):
            yield value


def _window(service: Service, requests: Sequence[EditRequest], ends: Iterable[str]) -> None:
    """`APIError` for a text of an edit that does not fit: any way to ask with its answer and what a method puts behind it."""
    limits, window = service.options.limits, service.lm.context_length
    most = limits.prompt if window is None else min(limits.prompt, window)
    for request in requests:
        prompts = (request.prompt, *request.paraphrases, *(fill(request, name) for name in request.aliases))
        pairs = [(prompt, request.continuation + end) for prompt in prompts for end in ends]
        pairs += [*request.unrelated, *([(request.prompt, request.old)] if request.old else [])]
        service.texts.bound(text for pair in pairs for text in pair)
        longest = max(len(e.ids) for e in service.lm.encode([p for p, _ in pairs], [t for _, t in pairs]))
        if longest > most:
            about = request.prompt[:80]
            raise APIError(400, f"{about!r} and its target have {longest} tokens, {most} fit", "context_length_exceeded", "prompt")


def _edit(service: Service, number: int) -> Edit:
    try:
        return service.ledger.show(number)
    except LedgerError as error:
        raise APIError(404, str(error), "no_such_edit") from None


def _job(service: Service, name: str) -> Job:
    found = service.editor.jobs.get(name)
    if found is None:
        raise APIError(
            404, f"there is no job {name!r}; jobs are forgotten when the server ends, edits are not (GET /v1/edits)", "no_such_job"
        )
    return found


async def _ended(service: Service, job: Job) -> None:
    """Until the job ends; one that waits too long is taken out of the queue again."""
    event = job.watch()
    try:
        late = asyncio.get_running_loop().time() + service.options.limits.seconds
        while not job.ended:
            left = late - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(event.wait(), max(left, 0.0) if job.status == "queued" else None)
            except asyncio.TimeoutError:
                if job.status == "queued":
                    service.editor.cancel(job)
                    raise APIError(503, "edits before this one take too long; nothing was undone, try again later", "busy") from None
            event.clear()
    finally:
        job.unwatch(event)
    if job.failure is not None:
        raise to_api_error(job.failure)
    if job.status == "cancelled":
        raise APIError(503, "the server is stopping; nothing was undone", "stopping")


class _Watching(StreamingResponse):
    """A client that watches a job; counted from when it is let in, or many who come at once would all be let in."""

    def __init__(self, changes: AsyncIterator[str], watching: list[int]) -> None:
        super().__init__(changes, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.watching = watching
        watching[0] += 1

    async def __call__(self, *scope_receive_send: Any) -> None:
        try:
            await super().__call__(*scope_receive_send)
        finally:
            self.watching[0] -= 1


async def _changes(job: Job) -> AsyncIterator[str]:
    event, seen = job.watch(), -1
    try:
        while True:
            event.clear()
            if job.version != seen:
                seen, ended = job.version, job.ended
                yield f"data: {json.dumps(job.document(), ensure_ascii=False)}\n\n"
                if ended:
                    return
            try:
                await asyncio.wait_for(event.wait(), _BEAT)
            except asyncio.TimeoutError:
                yield ": still here\n\n"
    finally:
        job.unwatch(event)
