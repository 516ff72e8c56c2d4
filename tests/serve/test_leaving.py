"""Work for a client that goes away, and what it does not take away from others who end it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from slmops.serve.leaving import WhileThere


class Client:
    """Goes away when it is told to."""

    def __init__(self) -> None:
        self.leaves = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}


def run(work: Callable[[Client], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(Client()), 10)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nobody listens any more"

    asyncio.run(main())


def test_work_ends_when_the_client_goes_away_and_what_is_behind_it_goes_on() -> None:
    async def work(client: Client) -> None:
        ended = False
        asyncio.get_running_loop().call_later(0.01, client.leaves.set)
        with WhileThere(client.receive) as there:
            try:
                await asyncio.sleep(60)
            finally:
                ended = True
        assert ended and there.gone
        await asyncio.sleep(0.01)  # is not cancelled

    run(work)


def test_work_that_ends_before_is_left_alone() -> None:
    async def work(client: Client) -> None:
        with WhileThere(client.receive) as there:
            await asyncio.sleep(0.01)
        client.leaves.set()
        await asyncio.sleep(0.01)
        assert not there.gone

    run(work)


def test_an_error_passes_and_so_does_one_that_the_leaving_leads_to() -> None:
    async def work(client: Client) -> None:
        with pytest.raises(KeyError), WhileThere(client.receive):
            raise KeyError
        asyncio.get_running_loop().call_later(0.01, client.leaves.set)
        with pytest.raises(ValueError), WhileThere(client.receive):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise ValueError from None
        await asyncio.sleep(0.01)

    run(work)


def test_who_cancels_the_request_or_ends_its_time_is_heard_whether_the_client_is_there_or_not() -> None:
    async def work(client: Client) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                with WhileThere(client.receive):
                    await asyncio.sleep(60)

        async def request() -> None:
            with WhileThere(client.receive):
                await asyncio.sleep(60)

        for leaves in (False, True):
            task = asyncio.create_task(request())
            await asyncio.sleep(0.01)
            if leaves:
                client.leaves.set()
                await asyncio.sleep(0)  # the listener is about to hear it
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

    run(work)
