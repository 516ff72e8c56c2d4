"""Connections that send nothing, send a header a byte at a time or without end, or take nothing of their answer, are closed: each would
hold a place for nothing."""

from __future__ import annotations

import asyncio
from typing import Any

HEADERS_S = 15.0
TAKEN_S = 60.0
MOST_HEADERS = 1 << 19
"""Bytes without the end of a request's headers. More than one reading from the network gives, which may hold a part of a body."""


def protocol(seconds: float = HEADERS_S, taken_s: float = TAKEN_S) -> Any:
    """uvicorn's protocol, which waits so long for the headers of a request, and for a client to take what it was sent."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol  # httptools, where it is installed

    class Patient(AutoHTTPProtocol):  # type: ignore[misc]
        """Counts from the first byte of a request, or from the connection's beginning."""

        _late: asyncio.TimerHandle | None = None
        _full: asyncio.TimerHandle | None = None
        _headers = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
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
