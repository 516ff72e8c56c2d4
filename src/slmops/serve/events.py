"""An answer that is sent in parts, for as little work as a part can take.

Starlette's own response for streams goes through a task group and two generators, which costs more than a small model's token.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.responses import Response

from slmops.serve.leaving import WhileThere
from slmops.serve.refusals import DIRECT


class Last(str):
    """The last part of an answer, which is sent with its end."""


class Events(Response):  # type: ignore[misc]
    """Parts of text as they come. When the client goes away, the parts are left (closed) at once.

    Args:
        parts: each is sent as it is.
        headers: more than those of a stream.
    """

    def __init__(
        self, parts: AsyncGenerator[str, None], headers: Mapping[str, str] | None = None, media_type: str = "text/event-stream"
    ) -> None:  # fmt: skip
        self._parts = parts
        super().__init__(None, 200, {"cache-control": "no-cache", **(headers or {})}, media_type)
        del self.headers["content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        try:
            with WhileThere(receive):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await self._send(scope.get(DIRECT, send))
        finally:
            await self._parts.aclose()

    async def _send(self, send: Any) -> None:
        more = True
        async for part in self._parts:
            more = not isinstance(part, Last)
            await send({"type": "http.response.body", "body": part.encode(), "more_body": more})
        if more:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
