"""A served model without HTTP: what its process is told, and what becomes of answers when it ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from slmops.engines.minimal import write_minimal
from slmops.errors import ModelError, ResourceError
from slmops.serve.model import Ask, Model, Settings
from slmops.serve.sampling import Picking
from slmops.serve.scheduler import RequestError

pytestmark = pytest.mark.slow
ENDLESS = Picking(logit_bias={4: -100.0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_minimal(folder, "onnx_genai")
    return folder


def using(folder: Path, work: Callable[[Model], Awaitable[None]], rows: int = 2) -> None:
    async def main() -> None:
        model = Model(Settings(folder, "tiny", rows=rows))
        try:
            await work(model)
        finally:
            await model.stop()
        assert model.active == 0

    asyncio.run(asyncio.wait_for(main(), 120))


def test_who_leaves_an_answer_has_it_cancelled(folder: Path) -> None:
    async def work(model: Model) -> None:
        told: list[dict[str, Any]] = []
        await model.start()
        write = model._write
        model._write = lambda command: (told.append(command), write(command))[1]  # type: ignore[method-assign, func-returns-value]
        answer = model.answer(Ask([7, 8], None, ENDLESS))
        await anext(answer)
        await answer.aclose()
        assert "ask" in told[0] and told[1:] == [{"cancel": told[0]["ask"]["id"]}]
        whole = [piece async for piece in model.answer(Ask([7, 8], 3, ENDLESS))]
        assert len(whole) == 3 and len(told) == 3, "an answer that ended is not cancelled"

    using(folder, work)


def test_joined_pieces_are_the_same_answer(folder: Path) -> None:
    async def work(model: Model) -> None:
        single = [piece async for piece in model.answer(Ask([7, 8], 60, ENDLESS))]
        joined = [piece async for piece in model.answer(Ask([7, 8], 60, ENDLESS, joined=True))]
        assert "".join(piece.text for piece in joined) == "".join(piece.text for piece in single)
        assert len(single) == sum(piece.tokens for piece in joined) == 60 and len(joined) < 60
        assert [piece.finish for piece in joined] == [None] * (len(joined) - 1) + ["length"]
        for apart in (
            Ask([7, 8], 9, Picking(logprobs=1, logit_bias={4: -100.0}), joined=True),
            Ask([7, 8], 9, ENDLESS, ["\n\n"], joined=True),
        ):
            assert {piece.tokens async for piece in model.answer(apart)} == {1}

    using(folder, work)


def test_impatient_clients_neither_stop_the_loading_nor_start_it_again(folder: Path) -> None:
    async def work(model: Model) -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(model.answer(Ask([7], 2, Picking()))), 0.001)
        assert [piece async for piece in model.answer(Ask([7], 2, ENDLESS))] and model.deaths == 0
        assert model.pid is not None and len(children()) == 1

    using(folder, work)
    assert children() == []


def test_what_the_model_cannot_take_is_the_client_s_and_harms_nobody(folder: Path) -> None:
    async def work(model: Model) -> None:
        other = model.answer(Ask([7, 8], 40, ENDLESS))
        await anext(other)
        bad: list[tuple[list[int], Picking]] = [
            ([300], Picking(repetition_penalty=1.1)), ([7], Picking(logit_bias={300: 1.0})), ([], Picking()), ([7] * 64, Picking()),
        ]  # fmt: skip
        for prompt, how in bad:
            with pytest.raises(RequestError):
                await anext(model.answer(Ask(prompt, 2, how)))
        assert len([piece async for piece in other]) == 39 and model.deaths == 0

    using(folder, work)


def test_embeddings_come_beside_answers_and_what_they_cannot_take_is_the_client_s(folder: Path) -> None:
    async def work(model: Model) -> None:
        other = model.answer(Ask([7, 8], None, ENDLESS))
        await anext(other)
        texts = [[7, 8, 9], list(range(5, 64)), [7, 8, 9]]
        found = await model.embed(texts)
        assert len(found) == 3 and found[0] == found[2] != found[1]
        assert [sum(x * x for x in vector) for vector in found] == pytest.approx([1.0] * 3)
        assert await model.embed([]) == []
        for bad in ([[7], []], [[7] * 65], [[300]]):
            with pytest.raises(RequestError):
                await model.embed(bad)
        with pytest.raises(RequestError, match="no adapter"):
            await model.embed([[7]], "tone")
        late = asyncio.ensure_future(model.embed([[7] * 60] * 400))
        await asyncio.sleep(0)
        late.cancel()
        assert await asyncio.wait_for(model.embed([[7, 8, 9]]), 30) == found[:1]
        assert len([piece async for piece in other]) == 61 and model.deaths == 0

    using(folder, work)


def test_a_process_that_dies_is_said_and_comes_back_by_itself(folder: Path) -> None:
    async def work(model: Model) -> None:
        await model.start()
        assert model.pid is not None
        os.kill(model.pid, signal.SIGSTOP)  # so that none is finished before
        answers = [asyncio.ensure_future(anext(model.answer(Ask([7, 8], None, ENDLESS)))) for _ in range(6)]
        while model.active < 6:
            await asyncio.sleep(0.01)
        os.kill(model.pid, signal.SIGKILL)
        found = await asyncio.gather(*answers, return_exceptions=True)
        assert all(isinstance(one, ModelError) and "ended" in one.message for one in found)
        while not model.ready:
            await asyncio.sleep(0.01)
        assert model.deaths == 1
        os.kill(model.pid, signal.SIGKILL)
        while model.deaths < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(ResourceError, match="has failed"):
            await model.start()

    using(folder, work)


def test_a_folder_that_is_no_model_is_said(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(b"" if file.suffix == ".onnx" else file.read_bytes())

    async def work(model: Model) -> None:
        with pytest.raises(ModelError, match="cannot be loaded"):
            await model.start()

    using(tmp_path, work)
    assert children() == []


def children() -> list[int]:
    """Processes of models that this process has started and that run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if f"\nPPid:\t{os.getpid()}\n" in text and b"slmops.serve.worker" in command:
            found.append(int(status.parent.name))
    return found
