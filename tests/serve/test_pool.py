"""Many models: loaded when they are asked, unloaded when they are idle, never beyond the memory that they may take."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from slmops.engines.minimal import write_minimal
from slmops.errors import ModelError, NoRoomError, ResourceError
from slmops.serve import memory
from slmops.serve.model import Ask, Model, Settings
from slmops.serve.pool import Pool
from slmops.serve.sampling import Picking
from tests.serve.test_model import children

pytestmark = pytest.mark.slow
ENDLESS = Picking(logit_bias={4: -100.0})
EACH = 10**8
"""Bytes that are reserved for a model: more than it takes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pooled")
    write_minimal(folder, "onnx_genai")
    return folder


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def using(wanted: list[Settings], work: Callable[[Pool, Clock], Awaitable[None]], **more: Any) -> None:
    """Some work with a pool whose models have 100 MB each, and whose clock stands still."""

    async def main() -> None:
        clock = Clock()
        pool = Pool(
            wanted, clock=clock, **{"reserve": lambda s: EACH, "free": lambda: None, "budget": 10 * EACH} | more
        )
        try:
            await work(pool, clock)
        finally:
            await pool.stop()
        assert children() == [] and pool.reserved == 0

    asyncio.run(asyncio.wait_for(main(), 120))


def some(folder: Path, *names: str, **more: Any) -> list[Settings]:
    return [Settings(folder, name, rows=2, **more) for name in names]


async def ask(pool: Pool, name: str, most: int = 2) -> Model:
    model = await pool.pick(name)
    assert model is not None
    assert [piece async for piece in model.answer(Ask([7, 8], most, ENDLESS))]
    return model


def loaded(pool: Pool) -> list[str]:
    return [model.settings.name for model in pool if model.ready]


def test_models_are_loaded_on_demand_and_unloaded_when_they_are_idle(folder: Path) -> None:
    async def work(pool: Pool, clock: Clock) -> None:
        await pool.start()
        assert loaded(pool) == ["a"] and len(children()) == 1 and pool.names == ["a", "b"]
        await ask(pool, "b")
        assert loaded(pool) == ["a", "b"] and pool.reserved == 2 * EACH
        clock.now += 59
        await ask(pool, "a")
        await pool.tend()
        assert loaded(pool) == ["a", "b"]
        clock.now += 1
        await pool.tend()
        assert loaded(pool) == ["a"], "a was asked one second ago, b sixty"
        assert pool.names == ["a", "b"] and len(children()) == 1
        b = await ask(pool, "b")
        assert b.deaths == 0, "an unloaded model has not died"

    using([*some(folder, "a", idle=60.0), *some(folder, "b", idle=60.0, load="demand")], work)


def test_keeping_a_model_changes_when_it_is_unloaded_and_never_hits_an_open_answer(folder: Path) -> None:
    async def work(pool: Pool, clock: Clock) -> None:
        model = await ask(pool, "a")
        assert model.left is None
        clock.now += 1e6
        await pool.tend()
        assert model.ready
        model.keep(10.0)
        clock.now += 4
        assert model.left == 6.0
        answer = model.answer(Ask([7], None, ENDLESS))
        await anext(answer)
        model.keep(0.0)
        clock.now += 100
        await pool.tend()
        assert model.ready and not await model.unload(), "somebody waits for an answer"
        assert len([piece async for piece in answer]) > 30
        await pool.tend()
        assert not model.ready and model.reserved == 0 and children() == []

    using(some(folder, "a"), work)


def test_room_is_made_by_the_model_that_was_asked_longest_ago(folder: Path) -> None:
    async def work(pool: Pool, clock: Clock) -> None:
        for name in "ab":
            clock.now += 1
            await ask(pool, name)
        clock.now += 1
        await ask(pool, "a")
        await ask(pool, "c")
        assert loaded(pool) == ["a", "c"] and len(children()) == 2

    using(some(folder, "a", "b", "c"), work, budget=2 * EACH + EACH // 2)


def test_there_is_no_room_beside_models_that_are_in_use(folder: Path) -> None:
    async def work(pool: Pool, clock: Clock) -> None:
        model = pool.find("a")
        assert model is not None
        answer = model.answer(Ask([7], None, ENDLESS))
        await anext(answer)
        with pytest.raises(NoRoomError, match="in use") as refused:
            await ask(pool, "b")
        assert refused.value.retry_after and loaded(pool) == ["a"] and pool.reserved == EACH
        assert (await ask(pool, "c")).settings.name == "a", "c may fall back to it"
        await answer.aclose()
        await ask(pool, "b")
        assert loaded(pool) == ["b"]

    wanted = [*some(folder, "a", "b"), *some(folder, "c", fallback="a")]
    using(wanted, work, budget=EACH)


def test_what_the_machine_has_left_counts_too_with_what_others_may_still_take(folder: Path) -> None:
    left = [EACH]

    async def work(pool: Pool, clock: Clock) -> None:
        model = await ask(pool, "a")
        taken = memory.resident(model.pid)
        assert 0 < taken < EACH
        answer = model.answer(Ask([7], None, ENDLESS))
        await anext(answer)
        with pytest.raises(NoRoomError, match="in use"):
            await ask(pool, "b")  # a may still take what it has not
        left[0] = 2 * EACH
        await ask(pool, "b")
        assert loaded(pool) == ["a", "b"]
        await answer.aclose()

    using(some(folder, "a", "b"), work, free=lambda: left[0])


def test_a_model_that_dies_while_it_loads_gives_its_room_back_and_is_left_alone_for_longer(
    folder: Path, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(b"x" if file.suffix == ".onnx" else file.read_bytes())

    async def work(pool: Pool, clock: Clock) -> None:
        model = pool.find("broken")
        assert model is not None
        for pause in (0, 0, 2, 4):
            clock.now += pause
            with pytest.raises(ModelError, match="cannot be loaded"):
                await model.start()
            assert pool.reserved == 0 and model.state == "failed"
        clock.now += 7
        with pytest.raises(ResourceError, match="has failed"):
            await model.start()
        assert model.deaths == 4

    using([Settings(tmp_path, "broken")], work)


def test_settings_that_cannot_work_are_refused_before_anything_is_loaded(folder: Path) -> None:
    for wanted, said in (
        (some(folder, "a", fallback="b"), "falls back to b"),
        (some(folder, "a", fallback="a"), "falls back to a"),
        (some(folder, "a"), "may take"),
    ):
        pool = Pool(wanted, reserve=lambda s: EACH, budget=EACH - 1)
        with pytest.raises(ModelError, match=said):
            asyncio.run(pool.start())
    assert children() == []


def test_who_cannot_answer_in_time_leaves_it_to_the_smaller_model(folder: Path) -> None:
    async def work(pool: Pool, clock: Clock) -> None:
        big = pool.find("big")
        assert big is not None
        assert await pool.pick("big", within=0.0) is pool.find("small"), (
            "it is not loaded, and there is no time to do so"
        )
        await big.start()
        assert await pool.pick("big", within=1.0) is big, "nobody knows yet how long it takes"
        big.answer_s = 2.0
        small = await pool.pick("big", within=1.0)
        assert small is not None and small.settings.name == "small"
        assert await pool.pick("big", within=3.0) is big and await pool.pick("big") is big
        answers = [big.answer(Ask([7], None, ENDLESS)) for _ in range(3)]
        for answer in answers[:2]:
            await anext(answer)
        third = asyncio.ensure_future(anext(answers[2]))
        await asyncio.sleep(0)
        assert big.full and await pool.pick("big") is pool.find("small")
        third.cancel()
        await asyncio.gather(third, return_exceptions=True)
        for answer in answers:
            await answer.aclose()
        assert await pool.pick("none") is None

    using([Settings(folder, "big", rows=2, queue=1, fallback="small"), Settings(folder, "small", rows=2)], work)


def test_a_model_takes_no_more_memory_than_was_reserved_for_it(folder: Path) -> None:
    async def main() -> None:
        settings = Settings(folder, "tiny", rows=4)
        pool = Pool([settings])
        try:
            model = pool.find("tiny")
            assert model is not None
            answers = [model.answer(Ask([7] * 20, None, ENDLESS)) for _ in range(4)]
            await asyncio.gather(*(_all(answer) for answer in answers))
            peak = memory.peak(model.pid)
            assert 0 < peak <= model.reserved == memory.reservation(settings).total
            await pool.tend()
            assert model.reserved == memory.reservation(settings).total
        finally:
            await pool.stop()

    async def _all(answer: Any) -> None:
        assert [piece async for piece in answer]

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_model_that_dies_is_started_again_unless_it_is_unloaded(folder: Path) -> None:
    async def work(pool: Pool, clock: Clock) -> None:
        model = await ask(pool, "a")
        for deaths in (1, 2):
            assert model.pid is not None
            os.kill(model.pid, signal.SIGKILL)
            while model.deaths < deaths:
                await asyncio.sleep(0.01)
            assert model.state == "failed" and model.reserved == EACH, "its room is kept for it"
            if deaths == 1:
                while not model.ready:
                    await asyncio.sleep(0.01)
        assert await model.unload() and model.state == "unloaded" and pool.reserved == 0
        clock.now += 3
        assert (await ask(pool, "a")).ready

    using(some(folder, "a"), work)
