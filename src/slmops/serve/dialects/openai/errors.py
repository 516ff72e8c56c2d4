"""Errors in OpenAI's shape."""

from __future__ import annotations

import math

from starlette.responses import JSONResponse, Response

from slmops.errors import SlmopsError
from slmops.serve.refusals import PATIENCE_S, kind_of, patience_of, status_of
from slmops.serve.scheduler import GrammarError

CODES = {429: "rate_limit_exceeded", 503: "overloaded", 504: "deadline_exceeded", 507: "no_memory"}


def error(
    status: int, message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None,
    retry_after: float | None = None,
) -> Response:  # fmt: skip
    """An error in OpenAI's shape."""
    headers = {"Retry-After": str(math.ceil(retry_after or PATIENCE_S))} if status in (429, 503, 507) else None
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": param, "code": code}}, status, headers=headers
    )


def of(failure: SlmopsError, param: str, grammar: str | None = None) -> Response:
    """An error of slmops in OpenAI's shape.

    Args:
        param: the field that holds the prompt.
        grammar: the one that says what the answer shall look like.
    """
    said = f"{failure.message} ({failure.hint})" if failure.hint else failure.message
    if isinstance(failure, GrammarError):
        return error(400, said, param=grammar, code="unsupported_schema")
    status = status_of(failure)
    if status == 400:
        return error(400, said, param=param, code="context_length_exceeded" if "context" in failure.message else None)
    return error(status, said, kind_of(status), code=CODES.get(status), retry_after=patience_of(failure))
