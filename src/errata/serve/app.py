"""The application: routes, errors in one shape, the OpenAPI document, the page."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from errata import __version__
from errata.errors import ErrataError
from errata.serve import routes_ask, routes_edits, routes_openai
from errata.serve.api_errors import APIError, to_api_error
from errata.serve.bodies import App
from errata.serve.middleware import GuardMiddleware
from errata.serve.schemas import Error
from errata.serve.service import Service

PAGE = Path(__file__).parent / "page"
METHODS = ("DELETE", "GET", "HEAD", "POST")
_UNSUPPORTED = ("frequency_penalty", "presence_penalty", "logit_bias", "echo", "suffix", "best_of", "tools", "response_format")


def make(service: Service) -> App:
    """The ASGI application of a service that runs."""
    api = FastAPI(title="errata", version=__version__, description=__doc__, docs_url=None, redoc_url=None, openapi_url=None)
    for module in (routes_openai, routes_edits, routes_ask):
        api.include_router(module.routes(service))
    api.add_exception_handler(APIError, _refused)
    api.add_exception_handler(ErrataError, _refused)
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _http)
    api.add_exception_handler(Exception, _unforeseen)  # uvicorn then logs it
    _page(api)
    document = json.dumps(_document(api)).encode()  # once: it is large, and anyone may ask for it again and again

    async def described() -> Response:
        return Response(document, media_type="application/json")

    api.add_api_route("/openapi.json", described, include_in_schema=False)
    return GuardMiddleware(api, service)


def _page(api: FastAPI) -> None:
    """The files of the page, as they are when the server starts; "/" is its index.html."""

    def shown(path: Path) -> Callable[[], Awaitable[Response]]:
        async def show() -> Response:
            return FileResponse(path, headers={"Cache-Control": "no-cache"})

        return show

    for path in sorted(p for p in PAGE.rglob("*") if p.is_file()):
        name = path.relative_to(PAGE).as_posix()
        for where in ("/", "/index.html") if name == "index.html" else (f"/{name}",):
            api.add_api_route(where, shown(path), methods=["GET", "HEAD"], include_in_schema=False, response_class=FileResponse)


def _said(refused: APIError) -> Response:
    return JSONResponse(refused.document, refused.status, refused.headers)


async def _refused(_: Request, error: Exception) -> Response:
    return _said(to_api_error(error))


async def _unforeseen(_: Request, error: Exception) -> Response:
    """uvicorn closes the connection after an error that nobody foresaw; said beforehand, no client sends its next request into it."""
    response = _said(to_api_error(error))
    response.headers["Connection"] = "close"
    return response


async def _http(request: Request, error: Exception) -> Response:
    """What the routing says: nothing there, or not with this method."""
    assert isinstance(error, HTTPException)
    wrong = {404: f"there is no {request.url.path}", 405: f"{request.method} does not go with {request.url.path}"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
    headers = dict(error.headers or {})
    if error.status_code == 405:  # of the first route that has this path; there may be others
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return _said(APIError(error.status_code, wrong.get(error.status_code, str(error.detail)), code, headers=headers))


def _methods(request: Request) -> set[str]:
    """What goes with the path of a request."""
    found: set[str] = set()
    for method in METHODS:
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.router.routes):
            found.add(method)
    return found


async def _invalid(_: Request, error: Exception) -> Response:
    """The first thing that is wrong with a request's fields."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    first = min(found, key=lambda e: -len(e["loc"])) if found else {"loc": (), "msg": "invalid request", "type": ""}
    where = [
        str(part) for part in first["loc"][1:] if not str(part).startswith(("constrained", "list[", "function", "str", "int", "float"))
    ]
    name = ".".join(where) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"{name} is not a field of this request, or not one that this server acts on; leave it out"
    elif where and where[0] in _UNSUPPORTED:
        message = f"{where[0]} is not supported; leave it out"
    elif name:
        message = f"{name}: {message}"
    return _said(APIError(400, message, "invalid_value", name))


def _document(api: FastAPI) -> dict[str, Any]:
    """OpenAPI with errors as they are: 400 in OpenAI's shape in place of FastAPI's 422."""
    document = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schema = Error.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= schema.pop("$defs", {})
    schemas["Error"] = schema
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _errors(operation, content, edits=method in ("post", "delete") and path.startswith(("/v1/edits", "/v1/jobs")))
    return document


def _errors(operation: dict[str, Any], content: dict[str, Any], edits: bool) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    codes = {"400": "wrong input", "403": "wrong name", "404": "not there", "429": "too much waits", "503": "stopping or busy"}
    codes |= {"409": "the ledger refuses", "413": "too large", "415": "not JSON", "500": "failed", "504": "too late", "507": "disk full"}
    if edits:
        codes["401"] = "without the token"
        operation["security"] = [{"token": []}]
    for code, about in codes.items():
        responses.setdefault(code, {"description": about, "content": content})
