"""A stand-in for an OpenAI-compatible endpoint: in memory (an httpx transport) or as a real server on this machine.

It answers by a function of the messages, counts every request, asks for a key if told to, and fails as its script
says. It ships with the library so that projects and their tests can rehearse a teacher before paying for one.

    desk = StandIn(lambda messages: "refund", faults=[Fault("status", status=429, headers={"retry-after": "1"})])
    teacher = EndpointTeacher(endpoint, ctx, transport=desk.transport())
    with desk.serve() as url: ...
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import httpx

Kind = Literal[
    "status", "garbage", "html", "no_choices", "error_object", "empty", "blank", "cut", "stream", "trickle", "never", "refused"
]  # fmt: skip
Reply = Callable[[list[dict[str, str]]], str]


@dataclass(frozen=True)
class Fault:
    """How one request fails.

    status: an error reply of that `status`, with `headers` and `body` (default: an OpenAI-like error object);
    garbage, html, no_choices, error_object, empty (no body), blank (no text): replies of status 200 without an answer;
    cut: the body ends in its middle; stream: server-sent events that nobody asked for; trickle: a byte now and then;
    never: the connection stays open without a reply; refused: there is no connection (in memory only).
    """

    kind: Kind
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None


@dataclass(frozen=True)
class Request:
    """One request as the stand-in saw it. `number` counts from 0; header names are in lower case."""

    number: int
    path: str
    headers: Mapping[str, str]
    body: Any

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages it asked with."""
        return list(self.body.get("messages", []))


@dataclass(frozen=True)
class _Planned:
    status: int
    headers: dict[str, str]
    body: bytes
    fault: Kind | None = None


Faults = Iterable[Fault | None] | Callable[[Request], Fault | None]


class StandIn:
    """The stand-in.

    Args:
        reply: the answer to a list of messages.
        faults: what happens to the first, second, … request (None or past the end: an answer), or a function of it.
        key: the key it wants, as a bearer token or in `api-key`; None: none.
        delay_s: how long an answer takes.
        finish_reason: what it says about the end of each answer.
        usage: whether it counts tokens (words, here).
        headers: sent with every answer, for instance rate limits.

    Attributes:
        requests: all requests so far, in order of arrival.
        answered: how many of them it answered.
        most_at_once: the most that were under way at one time.
    """

    def __init__(
        self,
        reply: Reply,
        faults: Faults = (),
        *,
        key: str | None = None,
        delay_s: float = 0.0,
        finish_reason: str = "stop",
        usage: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.reply, self.key, self.delay_s = reply, key, delay_s
        self.finish_reason, self.usage, self.headers = finish_reason, usage, dict(headers or {})
        self.requests: list[Request] = []
        self.answered = self.most_at_once = 0
        self._faults = faults if callable(faults) else _scripted(faults)
        self._active = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def transport(self) -> httpx.MockTransport:
        """An in-memory transport for `httpx.AsyncClient`."""
        import asyncio

        import httpx

        async def handle(request: httpx.Request) -> httpx.Response:
            body = await request.aread()
            planned = self._begin(request.url.raw_path.decode(), dict(request.headers), body)
            try:
                if planned.fault == "refused":
                    raise httpx.ConnectError("connection refused", request=request)
                if planned.fault == "never":
                    await asyncio.sleep(3600)
                await asyncio.sleep(self.delay_s)
                return httpx.Response(planned.status, headers=planned.headers, stream=_Body(planned))
            finally:
                self._end()

        return httpx.MockTransport(handle)

    @contextlib.contextmanager
    def serve(self, port: int = 0) -> Iterator[str]:
        """Run a real HTTP server on 127.0.0.1 for the time of the block; gives the base URL (ending in /v1)."""
        self._closing.clear()
        server = _Server(("127.0.0.1", port), _Handler)
        server.stand_in = self
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            self._closing.set()
            server.shutdown()
            server.server_close()

    def _begin(self, path: str, headers: Mapping[str, str], body: bytes) -> _Planned:
        lower = {name.lower(): value for name, value in headers.items()}
        try:
            value = json.loads(body)
        except ValueError:
            value = {}
        with self._lock:
            request = Request(len(self.requests), path, lower, value)
            self.requests.append(request)
            self._active += 1
            self.most_at_once = max(self.most_at_once, self._active)
            fault = self._faults(request)
        return self._plan(request, fault)

    def _end(self) -> None:
        with self._lock:
            self._active -= 1

    def _plan(self, request: Request, fault: Fault | None) -> _Planned:
        if not request.path.partition("?")[0].endswith("/chat/completions"):
            return _error(404, "no such path")
        given = request.headers.get("api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and given != self.key:
            return _error(401, f"Incorrect API key provided: {given}")
        if fault is not None and fault.kind in _BODIES:
            kind, default = _BODIES[fault.kind]
            return _Planned(200, {"content-type": kind, **fault.headers}, (fault.body or default).encode())
        if fault is not None and fault.kind == "status":
            planned = _error(fault.status, f"stand-in says {fault.status}")
            body = planned.body if fault.body is None else fault.body.encode()
            return _Planned(fault.status, {**planned.headers, **fault.headers}, body)
        text = "" if fault is not None and fault.kind == "blank" else self.reply(request.messages)
        words = sum(len(m["content"].split()) for m in request.messages)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish_reason}
        answer: dict[str, Any] = {"object": "chat.completion", "model": request.body.get("model"), "choices": [choice]}
        if self.usage:
            answer["usage"] = {"prompt_tokens": words, "completion_tokens": len(text.split())}
        if fault is None:
            with self._lock:
                self.answered += 1
        body = json.dumps(answer).encode()
        return _Planned(200, {"content-type": "application/json", **self.headers}, body, fault.kind if fault else None)


def _scripted(faults: Iterable[Fault | None]) -> Callable[[Request], Fault | None]:
    script = iter(faults)
    return lambda _request: next(script, None)


_BODIES: dict[Kind, tuple[str, str]] = {
    "garbage": ("application/json", '{"choices": [{"mess\x00\x01 oops'),
    "html": ("text/html", "<!doctype html><title>502 Bad Gateway</title><h1>nginx</h1>"),
    "no_choices": ("application/json", '{"object": "chat.completion", "usage": {"prompt_tokens": 1, "completion_tokens": 0}}'),
    "error_object": ("application/json", '{"error": {"message": "the model is having a moment", "code": "overloaded"}}'),
    "empty": ("application/json", ""),
    "stream": ("text/event-stream", 'data: {"choices": [{"delta": {"content": "ref"}}]}\n\n'),
}  # fmt: skip


def _error(status: int, message: str) -> _Planned:
    body = {"error": {"message": message, "type": "stand_in", "code": status}}
    return _Planned(status, {"content-type": "application/json"}, json.dumps(body).encode())


def _body_class() -> type:
    import httpx

    class Body(httpx.AsyncByteStream):
        def __init__(self, planned: _Planned) -> None:
            self.planned = planned

        async def __aiter__(self) -> AsyncIterator[bytes]:
            import asyncio

            body = self.planned.body
            if self.planned.fault == "cut":
                yield body[: len(body) // 2]
                raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")
            if self.planned.fault == "trickle":
                for offset in range(len(body)):
                    yield body[offset : offset + 1]
                    await asyncio.sleep(0.05)
                return
            yield body

    return Body


def _Body(planned: _Planned) -> Any:
    return _body_class()(planned)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    stand_in: StandIn

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        """Answer one request."""
        desk = self.server.stand_in
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        planned = desk._begin(self.path, dict(self.headers.items()), body)
        try:
            if planned.fault == "never":
                desk._closing.wait(3600)
                self.close_connection = True
                return
            if desk.delay_s:
                time.sleep(desk.delay_s)
            self._send(planned)
        except OSError:
            self.close_connection = True
        finally:
            desk._end()

    def _send(self, planned: _Planned) -> None:
        self.send_response(planned.status)
        for name, value in planned.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(planned.body)))
        self.end_headers()
        if planned.fault == "cut":
            self.wfile.write(planned.body[: len(planned.body) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif planned.fault == "trickle":
            for offset in range(len(planned.body)):
                self.wfile.write(planned.body[offset : offset + 1])
                self.wfile.flush()
                if self.server.stand_in._closing.wait(0.05):
                    break
        else:
            self.wfile.write(planned.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""
