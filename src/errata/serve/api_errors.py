"""What the server says no with: a status and OpenAI's shape of an error."""

from __future__ import annotations

from typing import Any

from errata.errors import (
    ConfigError,
    ErrataError,
    FitError,
    InputError,
    LedgerError,
    ModelError,
    PatchError,
    StorageError,
    UnknownNameError,
    WindowError,
    first_line,
    out_of_memory,
)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
_STATUS: dict[type[ErrataError], tuple[int, str]] = {
    WindowError: (400, "context_length_exceeded"),
    InputError: (400, "invalid_input"),
    ConfigError: (400, "invalid_setting"),
    UnknownNameError: (400, "unknown_name"),
    ModelError: (400, "model"),
    PatchError: (500, "patch"),
    FitError: (500, "fit"),
    StorageError: (507, "storage"),
    LedgerError: (409, "ledger"),
}


class APIError(Exception):
    """An answer other than 200.  ``param``: the field at fault; ``more``: further keys of the document."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        more: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.more, self.headers = more or {}, headers or {}

    @property
    def document(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}, **self.more}


def of(error: ErrataError) -> APIError:
    """What an error of errata is over HTTP.  Its message names commands where it tells what to do; they do the same."""
    status, code = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), (500, "internal"))
    if code == "ledger" and "another is writing" in str(error):
        return APIError(503, str(error), "busy", headers={"Retry-After": "5"})
    return APIError(status, str(error), code)


def _internal_error(error: BaseException) -> APIError:
    """Of an error that nobody foresaw: its kind and first line; the traceback is for the log."""
    if out_of_memory(error):
        return APIError(503, "out of memory; ask for less at once", "out_of_memory")
    return APIError(500, f"not foreseen: {type(error).__name__}: {first_line(error)}", "internal")


def stopping() -> APIError:
    """What is said to all that comes after the server was asked to end."""
    return APIError(503, "the server is stopping", "stopping")


def late(seconds: float, advice: str = "") -> APIError:
    """What is said where an answer took too long."""
    return APIError(504, f"not answered within {seconds:g} seconds{advice}", "timeout")


def to_api_error(error: BaseException) -> APIError:
    """Any error."""
    return error if isinstance(error, APIError) else of(error) if isinstance(error, ErrataError) else _internal_error(error)
