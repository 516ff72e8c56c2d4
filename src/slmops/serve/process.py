"""A process that takes lines and says lines, which are handed on where they come in.

asyncio's own streams wake a task for each line, which takes as long as a small model's token.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from slmops.serve.mailbox import Mailbox

LONGEST_LINE = 1 << 24


class Process(asyncio.SubprocessProtocol):
    """See the module. Used from one event loop.

    Attributes:
        pid: of the system.
    """

    pid = 0

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._exited: asyncio.Future[None] = loop.create_future()
        self._said: Mailbox[bytes] = Mailbox()
        self._hear: Callable[[bytes], None] = self._said.put
        self._rest = b""
        self._transport: Any = None

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str] | None = None) -> Process:
        """Start one, with this process's standard error and in a session of its own.

        Raises:
            OSError: it cannot be started.
        """
        _, process = await asyncio.get_running_loop().subprocess_exec(
            cls, *command, stderr=None, start_new_session=True, env=environment
        )
        return process

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        found: int | None = self._transport.get_returncode()
        return found

    async def first(self) -> bytes:
        """The first line that it says; empty if it ends before."""
        return await self._said.get()

    async def follow(self, hear: Callable[[bytes], None]) -> None:
        """Hand on each further line until there are no more. Once, after `first`.

        Raises:
            ValueError: a line is too long, or `hear` raised it; the process was killed.
        """
        self._hear = hear
        self._take(line for line in self._said.rest() if line)  # the empty one is its end
        await self._ended

    def write(self, line: bytes) -> None:
        """Say something to it. Who is not there any more does not hear it."""
        with contextlib.suppress(ConnectionError, RuntimeError):
            self._transport.get_pipe_transport(0).write(line)

    def close(self) -> None:
        """There is no more to say to it."""
        self._transport.get_pipe_transport(0).close()

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._transport.kill()

    async def wait(self) -> None:
        """Until it has ended."""
        await asyncio.shield(self._exited)

    def _take(self, lines: Iterable[bytes]) -> None:
        try:
            for line in lines:
                self._hear(line)
            if len(self._rest) > LONGEST_LINE:
                raise ValueError("a line is too long")
        except Exception as error:
            self._hear, self._rest = lambda line: None, b""
            self.kill()
            if not self._ended.done():
                self._ended.set_exception(error)

    def connection_made(self, transport: Any) -> None:
        """See asyncio."""
        self._transport, self.pid = transport, transport.get_pid()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        """See asyncio."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._take(lines)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        """See asyncio."""
        if fd == 1:
            self._said.put(b"")
            if not self._ended.done():
                self._ended.set_result(None)
            self._settle()

    def process_exited(self) -> None:
        """See asyncio."""
        self._exited.set_result(None)
        self._settle()

    def _settle(self) -> None:
        if self._ended.done() and self._exited.done():
            self._transport.close()
