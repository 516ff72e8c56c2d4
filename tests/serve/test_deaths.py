"""What becomes of requests around the death of a model's process, step by step, with processes that are none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from slmops.errors import ModelError, ResourceError
from slmops.serve import model as served
from slmops.serve.model import Ask, Model, Settings
from slmops.serve.process import Process
from tests.serve.test_worker import Clock

READY = {"ready": {"context": 64, "vocabulary": 300, "threads": 1}}
pause = asyncio.sleep


async def turns() -> None:
    """Let everybody go on as far as they can."""
    for _ in range(50):
        await pause(0)


class Fake(Process):
    """Says what it is told to, and ends when it is told to."""

    pid = 1
    returncode: int | None = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self._transport = Mock()
        self.asked: list[Any] = []

    def write(self, line: bytes) -> None:
        self.asked.append(json.loads(line))

    def say(self, line: dict[str, Any]) -> None:
        if self.returncode is None:
            self.pipe_data_received(1, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        self.kill()

    def kill(self) -> None:
        if self.returncode is None:
            self.silent()
            self.gone()

    def silent(self) -> None:
        self.pipe_connection_lost(1, None)

    def gone(self) -> None:
        self.returncode = -9
        self.process_exited()


class World:
    """The processes in the order in which they were started, and a clock that goes on when pauses end."""

    def __init__(self) -> None:
        self.processes: list[Fake] = []
        self.clock, self.awake = Clock(), asyncio.Event()
        self.model = Model(Settings(Path("none"), "tiny"), clock=self.clock)

    async def start(self, command: Sequence[str], environment: object) -> Fake:
        self.processes.append(Fake())
        return self.processes[-1]

    async def sleep(self, seconds: float) -> None:
        if seconds > 0:
            await self.awake.wait()
            self.awake.clear()
            self.clock.now += seconds
        await pause(0)

    async def load(self) -> Fake:
        """Start the model."""
        loading = asyncio.create_task(self.model.start())
        await turns()
        self.processes[-1].say(READY)
        await loading
        return self.processes[-1]


@pytest.fixture
def using(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    monkeypatch.setattr(served, "kind_of", lambda folder, engine: "onnx_genai")
    monkeypatch.setattr(served, "tokenizer_of", lambda folder, extra: None)
    monkeypatch.setattr(served, "find_adapters", lambda folder, engine, given: {})

    def run(work: Callable[[World], Awaitable[None]]) -> None:
        async def main() -> None:
            world = World()
            monkeypatch.setattr(Process, "start", world.start)
            monkeypatch.setattr(asyncio, "sleep", world.sleep)
            await work(world)
            await world.model.stop()
            assert all(process.returncode is not None for process in world.processes), "none is left behind"
            world.awake.set()
            count = len(world.processes)
            await turns()
            assert len(world.processes) == count, "nothing is started after the end"

        try:
            asyncio.run(asyncio.wait_for(main(), 60))
        finally:
            monkeypatch.setattr(asyncio, "sleep", pause)

    return run


Using = Callable[[Callable[[World], Awaitable[None]]], None]


def test_a_request_while_a_process_ends_starts_no_second_one(using: Using) -> None:
    async def work(world: World) -> None:
        first = await world.load()
        first.silent()
        await turns()
        assert not world.model.ready and first.returncode is None, "it is about to end"
        asked = asyncio.create_task(anext(world.model.answer(Ask([7, 8]))))
        await turns()
        first.gone()
        for _ in range(3):
            await turns()
            world.processes[-1].say(READY)
        await turns()
        assert len(world.processes) == 2 and world.model.ready and world.model.active == 1
        assert not asked.done(), "the end of the one before is no failure of this answer"
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    using(work)


def test_who_waits_for_a_dead_model_hears_of_the_next_attempt(using: Using) -> None:
    async def work(world: World) -> None:
        (await world.load()).kill()
        await turns()
        model, (_, second) = world.model, world.processes
        asked = [asyncio.create_task(anext(model.answer(Ask([7])))) for _ in range(2)]
        await turns()
        second.say({"failed": "the file is gone"})
        await turns()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [str(one) for one in found] == ["the file is gone"] * 2 and not model.busy
        with pytest.raises(ResourceError, match="has failed") as refused:
            await model.start()
        assert refused.value.retry_after and model.state == "failed" and len(world.processes) == 2
        for count in (3, 4):  # it goes on by itself
            world.awake.set()
            await turns()
            assert len(world.processes) == count
            world.processes[-1].say(READY if count == 4 else {"failed": "still gone"})
            await turns()
        assert model.ready

    using(work)


def test_a_model_that_a_request_has_brought_back_is_not_loaded_again_when_it_is_unloaded(using: Using) -> None:
    async def work(world: World) -> None:
        (await world.load()).kill()
        await turns()
        world.processes[1].say({"failed": "the file is gone"})
        await turns()
        world.clock.now += 10  # the pause is over, and who sleeps has not noticed yet
        await world.load()
        assert len(world.processes) == 3 and await world.model.unload()
        world.awake.set()
        await turns()
        assert len(world.processes) == 3 and world.model.state == "unloaded"

    using(work)


@pytest.mark.parametrize("attempted", [True, False])
def test_a_dead_model_that_is_unloaded_stays_so_and_frees_who_waits(using: Using, attempted: bool) -> None:
    async def work(world: World) -> None:
        (await world.load()).kill()
        await turns()
        model = world.model
        if attempted:
            waiting = asyncio.create_task(model.start())
            await turns()
        else:
            world.processes[1].say({"failed": "the file is gone"})
            await turns()
        assert await model.unload() and model.state == "unloaded"
        if attempted:
            with pytest.raises(ResourceError, match="was unloaded"):
                await waiting
        world.awake.set()
        await turns()
        assert len(world.processes) == 2

    using(work)


def test_room_that_was_reserved_is_kept_while_a_dead_model_is_loaded_again(using: Using) -> None:
    async def work(world: World) -> None:
        admitted = []

        async def admit(model: Model) -> None:
            admitted.append(model)
            model.reserved = 5

        world.model.admit = admit
        (await world.load()).kill()
        await turns()
        asked = asyncio.create_task(world.model.start())
        await turns()
        world.processes[1].say({"failed": "the file is gone"})
        with pytest.raises(ModelError, match="is gone"):
            await asked
        assert world.model.reserved == 5 and len(admitted) == 1
        await world.model.unload()
        assert world.model.reserved == 0

    using(work)


def test_a_process_that_cannot_be_started_is_said_and_not_tried_without_a_pause(
    using: Using, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(world: World) -> None:
        first, tries = await world.load(), []

        async def fail(command: Sequence[str], environment: object) -> Fake:
            tries.append(command)
            raise OSError("no memory")

        monkeypatch.setattr(Process, "start", fail)
        first.kill()
        await turns()
        assert len(tries) == 1, "the next one waits"
        world.clock.now += 10
        with pytest.raises(ModelError, match="no memory"):
            await world.model.start()

    using(work)
