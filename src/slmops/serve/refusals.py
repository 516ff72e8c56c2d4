"""Refusals: which status an error of slmops has, and its body in the shape of the dialect that its path belongs to.

Whatever refuses before a dialect has read anything (a wrong key, a limit, a body too long) does so through here; a dialect
takes the status of its errors from here too.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slmops.errors import ModelError, NoRoomError, ResourceError, SlmopsError
from slmops.serve.scheduler import RequestError

Headers = Sequence[tuple[str, str]]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
PATIENCE_S = 1
DIRECT = "slmops.send"
"""Where a scope holds the server's own `send`, past all that looks at how an answer begins: for what follows its beginning."""


class DeadlineError(ModelError):
    """An answer was not there in the time that it had."""


class ScopeError(SlmopsError):
    """A key may not do this."""


class LimitError(SlmopsError):
    """A key has asked for as much as it may for now. `after`: seconds until it may ask again."""

    def __init__(self, message: str, hint: str, after: float) -> None:
        super().__init__(message, hint)
        self.after = after


@dataclass(eq=False)
class Refused(Exception):
    """A request that goes no further. `reason`: a word for metrics and logs, of a fixed set; `code`: for OpenAI's clients."""

    status: int
    message: str
    reason: str
    code: str | None = None
    headers: Headers = field(default=())


def status_of(failure: SlmopsError) -> int:
    """The status of an error that a model or a limit raised."""
    if isinstance(failure, NoRoomError):
        return 507
    if isinstance(failure, ResourceError):
        return 503
    if isinstance(failure, LimitError):
        return 429
    if isinstance(failure, DeadlineError):
        return 504
    if isinstance(failure, ScopeError):
        return 403
    return 400 if isinstance(failure, RequestError) else 500


def patience_of(failure: SlmopsError) -> float | None:
    """Seconds until it is worth to ask again; None: nobody knows."""
    if isinstance(failure, LimitError):
        return failure.after
    return failure.retry_after if isinstance(failure, ResourceError) else None


def kind_of(status: int) -> str:
    """OpenAI's `type` of an error."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")


def body_of(path: str, status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """An error as the clients of a path read it: Ollama's under /api, OpenAI's elsewhere."""
    if path == "/api" or path.startswith("/api/"):
        return {"error": message}
    return {"error": {"message": message, "type": kind_of(status), "param": None, "code": code}}


async def refuse(scope: Scope, send: Send, refused: Refused) -> None:
    """Send a refusal."""
    body = json.dumps(body_of(scope["path"], refused.status, refused.message, refused.code)).encode()
    headers = [("content-type", "application/json"), ("content-length", str(len(body))), *refused.headers]
    if refused.status in (429, 503) and not any(name == "retry-after" for name, _ in headers):
        headers.append(("retry-after", str(PATIENCE_S)))
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
