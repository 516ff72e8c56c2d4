"""Connections that send nothing, send a header a byte at a time or without end, or take nothing of their answer, are closed: each would
hold a place for nothing. More than there is room for are told so and closed, before they take the descriptors that models are loaded with.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from slmops.serve.refusals import PATIENCE_S, body_of

HEADERS_S = 15.0
TAKEN_S = 60.0
MOST_HEADERS = 1 << 19
"""Bytes without the end of a request's headers. More than one reading from the network gives, which may hold a part of a body."""
MOST = 2048
"""Connections at a time, where the process may have so many descriptors."""
KEPT = 128
"""Descriptors that no connection takes: for the pipes of models, files, and those that are just being refused."""


def room() -> int:
    """How many connections can be open at a time, here."""
    try:
        import resource
    except ImportError:  # not on this system
        return MOST
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(1, min(MOST, soft - KEPT))


def protocol(seconds: float = HEADERS_S, taken_s: float = TAKEN_S, most: int = MOST) -> Any:
    """uvicorn's protocol, which waits so long for the headers of a request, and for a client to take what it was sent; one connection
    more than `most` gets 503."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol  # httptools, where it is installed

    class Patient(AutoHTTPProtocol):  # type: ignore[misc]
        """Counts from the first byte of a request, or from the connection's beginning."""

        _late: asyncio.TimerHandle | None = None
        _full: asyncio.TimerHandle | None = None
        _headers = 0
        _refused = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                self._refused = True
                transport.write(_full_house(most))
                transport.close()
            else:
                self._wait()

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            self._headers += len(data)
            if self._headers > MOST_HEADERS and (self.cycle is None or self.cycle.response_complete):
                self.transport.abort()
                return
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._headers = 0
                self._stop()
            elif self._late is None and not self.transport.is_closing():
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            self._taken()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._full = self.loop.call_later(taken_s, self.transport.abort)

        def resume_writing(self) -> None:
            self._taken()
            super().resume_writing()

        def _taken(self) -> None:
            if self._full is not None:
                self._full.cancel()
                self._full = None

        def _wait(self) -> None:
            self._late = self.loop.call_later(seconds, self.transport.close)

        def _stop(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Patient


def _full_house(most: int) -> bytes:
    """The answer to one connection too many."""
    body = json.dumps(
        body_of("/", 503, f"{most} connections are open already; try again later", "too_many_connections")
    ).encode()
    head = ("HTTP/1.1 503 Service Unavailable", "content-type: application/json", f"content-length: {len(body)}",
            f"retry-after: {PATIENCE_S}", "connection: close", "", "")  # fmt: skip
    return "\r\n".join(head).encode() + body
