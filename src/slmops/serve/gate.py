"""What a request passes before any dialect reads it, and what is noted of it: ASGI middleware around the whole application.

In this order: its path, where it comes from, whether the server is about to end, its key, what that key may do and how often, its
body. A refusal comes before the body is read, except for what is wrong with the body itself. Every request gets an id, and is told to
those who want to know when it is over.
"""

from __future__ import annotations

import asyncio
import math
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from slmops.serve import record as records
from slmops.serve.keys import Key, Keys, needed
from slmops.serve.limits import Accounts, Limits, whole_seconds
from slmops.serve.origins import Origins
from slmops.serve.record import Record
from slmops.serve.refusals import DIRECT, LimitError, Receive, Refused, Scope, Send, refuse

LARGEST_BODY = 4 << 20
LONGEST_READ = 16 * LARGEST_BODY
"""A body that is too large is read to its end up to here, and thrown away: who still sends when the connection ends never reads why."""
BODY_S = 30.0
"""A body that is not there by then is not waited for: its sender would hold a connection for nothing."""
GRACE_S = 10.0
"""How long after its deadline a client may still take what is there of its answer."""
LONGEST_DEADLINE_S = 86400.0
ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""In no path: a route ends before a last line end too, so that a path with one would be another to keys than to routes."""
WORK = ("/v1/", "/api/")
"""Paths whose requests are worked on: they are finished before the server ends, and counted against limits."""
WITH_BODY = ("POST", "PUT", "PATCH", "DELETE")


@dataclass
class State:
    """What the server is at. `open`: requests that are being answered."""

    draining: bool = False
    open: int = 0


@dataclass
class Rules:
    """What is let in.

    Attributes:
        keys: None: no key is asked for.
        deadline: seconds that a request may take; None: as long as it needs.
        texts: keep what is asked and said, for logs.
        admin: whether there is `/admin` at all.
    """

    origins: Origins = field(default_factory=Origins)
    keys: Keys | None = None
    accounts: Accounts = field(default_factory=lambda: Accounts(Limits()))
    deadline: float | None = None
    texts: bool = False
    admin: bool = True
    body_s: float = BODY_S


class Gate:
    """See the module.

    Args:
        tell: each gets every request that is over; what one raises would end nothing but that connection.
    """

    def __init__(
        self, app: Any, state: State, rules: Rules | None = None, tell: Sequence[Callable[[Record], None]] = ()
    ) -> None:
        self._app, self._state, self._rules, self._tell = app, state, rules or Rules(), tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        asked = headers.get("x-request-id", "")
        record = Record(
            id=asked if ID.fullmatch(asked) else f"req_{secrets.token_hex(12)}", method=scope["method"], path=scope["path"],
            client=(scope.get("client") or ("",))[0], time=time.time(),
            parent={name: headers[name] for name in ("traceparent", "tracestate") if name in headers},
            texts=[] if self._rules.texts else None,
        )  # fmt: skip
        scope[DIRECT] = send
        mark = records.enter(record)
        noted = self._noting(record, headers, send)
        work = scope["path"].startswith(WORK)
        self._state.open += work
        try:
            await self._pass(scope, receive, noted, headers, record, work)
        except BaseException:
            record.failed = True
            raise
        finally:
            self._state.open -= work
            records.leave(mark)
            record.ended = perf_counter()
            record.route = getattr(scope.get("route"), "path", "")
            for tell in self._tell:
                tell(record)

    async def _pass(
        self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str], record: Record, work: bool
    ) -> None:
        try:
            if CONTROL.search(scope["path"]):
                raise Refused(400, "the path has a control character: leave it out", "path", "invalid_path")
            self._rules.origins.check(scope["method"], scope["path"], headers)
            before = self._rules.origins.preflight(scope["method"], headers)
            if before is not None:
                raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in before]
                await send({"type": "http.response.start", "status": 204, "headers": raw})
                await send({"type": "http.response.body"})
                return
            if work and self._state.draining:
                raise Refused(503, "the server is about to end", "draining", "draining")
            key = self._known(scope, headers, record)
            if work:
                record.account = self._rules.accounts.of(key)
                record.account.request()
                record.deadline = self._deadline(headers)
            if scope["method"] in WITH_BODY:
                body = await self._whole(receive, headers)
                if body is None:
                    return
                if record.texts is not None:
                    record.texts.append(body.decode("utf-8", "replace"))
                receive = _again(body, receive)
        except LimitError as error:
            said = [
                ("retry-after", str(whole_seconds(error.after))),
                ("retry-after-ms", str(math.ceil(error.after * 1000))),
            ]
            record.reason = "limit"
            refused = Refused(429, f"{error.message}; {error.hint}", "limit", "rate_limit_exceeded", said)
            await refuse(scope, send, refused)
            return
        except Refused as refused:
            record.reason = refused.reason
            await refuse(scope, send, refused)
            return
        if record.deadline is None:
            await self._app(scope, receive, send)
            return
        try:  # an answer whose client does not take it ends too
            async with asyncio.timeout_at(record.deadline + GRACE_S) as limit:
                await self._app(scope, receive, send)
        except TimeoutError:
            if not limit.expired():
                raise
            record.reason, record.failed = "deadline", True
            if record.status == 0:
                late = records.too_late()
                await refuse(
                    scope, send, Refused(504, f"{late.message} ({late.hint})", "deadline", "deadline_exceeded")
                )

    def _known(self, scope: Scope, headers: dict[str, str], record: Record) -> Key | None:
        """The key of a request, if keys are asked for."""
        if self._rules.keys is None:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = self._rules.keys.find(token.strip()) if scheme.lower() == "bearer" and token.strip() else None
        if key is not None:
            record.key, record.keeper = key.name, "admin" in key.scopes
        wanted = needed(scope["method"], scope["path"])
        if not wanted:
            return key
        if key is None:
            said = (
                "a key is needed: send Authorization: Bearer KEY"
                if not token
                else "the key is not known, or has expired"
            )
            raise Refused(401, said, "key", "invalid_api_key", [("www-authenticate", "Bearer")])
        if not wanted & set(key.scopes):
            said = f"the key {key.name} may not do this: it needs the scope {' or '.join(sorted(wanted))}"
            raise Refused(403, said, "scope", "missing_scope")
        return key

    def _deadline(self, headers: dict[str, str]) -> float | None:
        """When a request has to be over: the server's limit or the client's own, whichever is earlier."""
        seconds = self._rules.deadline
        given = headers.get("x-request-timeout")
        if given is not None:
            try:
                own = float(given)
            except ValueError:
                own = 0.0
            if not 0 < own <= LONGEST_DEADLINE_S:
                said = f"x-request-timeout is a number of seconds up to {LONGEST_DEADLINE_S:.0f}, not {given[:40]!r}"
                raise Refused(400, said, "timeout", "invalid_timeout")
            seconds = own if seconds is None else min(seconds, own)
        return None if seconds is None else asyncio.get_running_loop().time() + seconds

    async def _whole(self, receive: Receive, headers: dict[str, str]) -> bytes | None:
        """The body; None if the client left."""
        close = [("connection", "close")]
        too_large = Refused(413, f"the body has more than {LARGEST_BODY} bytes", "body_size", "body_too_large", close)
        if int(headers.get("content-length", "0")) > LONGEST_READ:
            raise too_large
        parts, seen = [], 0
        try:
            async with asyncio.timeout(self._rules.body_s):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    part = message.get("body", b"")
                    seen += len(part)
                    if seen <= LARGEST_BODY:
                        parts.append(part)
                    if seen > LONGEST_READ or (seen > LARGEST_BODY and not message.get("more_body", False)):
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            late = f"the body was not there within {self._rules.body_s:g} s"
            raise Refused(408, late, "body_time", "body_too_slow", close) from error

    def _noting(self, record: Record, headers: dict[str, str], send: Send) -> Send:
        """`send` that adds what every answer has, and notes the status."""
        shared = self._rules.origins.answered(headers)

        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                more = [("x-request-id", record.id), *shared, *(record.account.headers() if record.account else ())]
                raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in more]
                message = {**message, "headers": [*message.get("headers", ()), *raw]}
            await send(message)

        return noting


def _again(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives a body that was read once more."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
