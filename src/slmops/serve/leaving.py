"""Work for a client that may go away: it is cancelled then, at once.

It is done in the task that asks for it; all that listens to the client is one small task, since each costs as much as a small
model's token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

from slmops.serve.refusals import Receive

Done = TypeVar("Done")


class WhileThere:
    """What is done inside is cancelled when the client goes away, and goes on behind it, as `asyncio.timeout` does with time.

    Args:
        receive: of ASGI; the request has been read.

    Attributes:
        gone: the client went away.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.gone = False

    def __enter__(self) -> WhileThere:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._asked = task, task.cancelling()
        self._listening = asyncio.create_task(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._listening.cancel()
        if not self.gone:
            return False
        others = self._task.uncancel() > self._asked  # somebody else has cancelled it too
        return not others and kind is not None and issubclass(kind, asyncio.CancelledError)

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._task.cancel()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Done]) -> Done | None:
    """What comes of some work, None if the client goes away before."""
    with WhileThere(receive):
        return await work
    return None
