"""Another version takes over when it answers as it should, and nobody who was answered notices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.engines import minimal
from slmops.engines.minimal import write_minimal
from slmops.errors import DataError, ModelError, NoRoomError, ResourceError
from slmops.evaluate import statistics
from slmops.serve import pairs, versions
from slmops.serve.model import Ask, Model, Settings
from slmops.serve.pairs import Answered, Pairs
from slmops.serve.pool import Pool
from slmops.serve.sampling import Picking
from slmops.serve.versions import Canary, CanaryError, Candidate, ConflictError
from tests.serve.test_model import children

ENDLESS = Picking(logit_bias={4: -100.0})
HELLO = Canary.model_validate_json('{"messages": [{"role": "user", "content": "a parcel?"}], "max_tokens": 6}')
PLAIN = Canary(prompt="hello", max_tokens=6)
EACH = 10**8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("version")
    write_minimal(folder, "onnx_genai")
    return folder


@pytest.fixture(scope="module")
def other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, but the head's weights are turned around, so that it says something else."""
    import onnx
    from onnx import numpy_helper

    changed = tmp_path_factory.mktemp("other")
    for file in folder.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    model = onnx.load(changed / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
    for file in changed.glob("model.onnx*"):
        file.unlink()
    onnx.save(model, changed / "model.onnx")
    return changed


def using(folder: Path, work: Callable[[Pool, Settings], Awaitable[None]], **more: Any) -> None:
    async def main() -> None:
        settings = Settings(folder, "m", rows=2)
        pool = Pool([settings], **{"reserve": lambda s: EACH, "free": lambda: None, "budget": 2 * EACH} | more)
        pool.grace = 0.0
        try:
            await work(pool, settings)
        finally:
            await pool.stop()
        assert children() == [] and not pool.trying

    asyncio.run(asyncio.wait_for(main(), 120))


async def text(model: Model, most: int = 6, how: Picking = ENDLESS) -> str:
    return "".join([piece.text async for piece in model.answer(Ask([9, 8, 7], most, how))])


@pytest.mark.slow
def test_a_swap_lets_old_answers_finish_on_the_old_version_and_can_be_taken_back(folder: Path, other: Path) -> None:
    async def work(pool: Pool, settings: Settings) -> None:
        old = pool.find("m")
        assert old is not None
        said = await text(old, 30)
        answer = old.answer(Ask([9, 8, 7], 30, ENDLESS))
        begun = [await anext(answer)]
        expected = await versions.say(old, HELLO)
        exact = HELLO.model_copy(update={"expect": f" {expected}\n"})
        found = await versions.swap(pool, "m", replace(settings, folder=folder), [HELLO, PLAIN, exact])
        assert found == {"version": 2, "before": 1, "canaries": 3, "passed": 3}
        new = pool.find("m")
        assert new is not None and new is not old and new.version == 2 and len(children()) == 2
        await pool.tend()
        assert old.ready, "an answer is open"
        assert "".join([p.text for p in begun] + [piece.text async for piece in answer]) == said
        await pool.tend()
        assert len(children()) == 1 and pool.reserved == EACH
        with pytest.raises(ResourceError, match="replaced"):
            await text(old)
        assert await text(new) == said[:6]
        assert (await versions.rollback(pool, "m"))["version"] == 1
        back = pool.find("m")
        assert back is not None and back.version == 1 and back.settings.folder == settings.folder
        assert (await versions.rollback(pool, "m"))["version"] == 2, "and forward again"
        assert pool.find("m") is new, "its process was still there"
        assert await text(new) == said[:6]

    using(folder, work)


@pytest.mark.slow
def test_a_version_that_does_not_answer_as_it_should_changes_nothing(folder: Path, other: Path, tmp_path: Path) -> None:
    async def work(pool: Pool, settings: Settings) -> None:
        old = pool.find("m")
        assert old is not None
        before = await text(old)
        new = replace(settings, folder=other)
        with pytest.raises(CanaryError, match="0 of 1") as failed:
            await versions.swap(pool, "m", new, [PLAIN])
        assert failed.value.failed[0]["wanted"] != failed.value.failed[0]["got"]
        with pytest.raises(CanaryError, match="1 of 2"):
            await versions.swap(
                pool, "m", new, [PLAIN, PLAIN.model_copy(update={"expect": failed.value.failed[0]["got"]})]
            )
        with pytest.raises(ConflictError, match="canaries"):
            await versions.swap(pool, "m", new)
        with pytest.raises(ConflictError, match="no other version"):
            await versions.rollback(pool, "m")
        with pytest.raises(KeyError):
            await versions.swap(pool, "none", new, [PLAIN])
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ModelError):
            await versions.swap(pool, "m", replace(settings, folder=tmp_path), [PLAIN])
        assert pool.find("m") is old and await text(old) == before and len(children()) == 1
        pool.budget = 2 * EACH - 1
        with pytest.raises(NoRoomError):
            await versions.swap(pool, "m", new, [PLAIN])
        pool.budget = 2 * EACH
        found = await versions.swap(pool, "m", new, [PLAIN], agreement=0.0)
        assert found["passed"] == 0
        swapped = pool.find("m")
        assert swapped is not None and await text(swapped) != before

    using(folder, work)


@pytest.mark.slow
def test_a_candidate_answers_its_share_and_copies_are_compared(folder: Path, other: Path) -> None:
    async def work(pool: Pool, settings: Settings) -> None:
        await versions.try_out(pool, "m", replace(settings, folder=other), 0.5, 1.0)
        slot = pool.slots["m"]
        assert slot.candidate is not None
        picked = [await pool.pick("m", f"user {n}") for n in range(40)]
        assert picked == [await pool.pick("m", f"user {n}") for n in range(40)], "the same asker, the same version"
        assert 8 < picked.count(slot.candidate.model) < 32
        with pytest.raises(ConflictError):
            await versions.swap(pool, "m", settings, [PLAIN])
        warm = replace(ENDLESS, temperature=1.0)
        one = await text(slot.current)
        two = await text(slot.candidate.model)
        await text(slot.current, 5, warm)
        left = slot.current.answer(Ask([9], None, ENDLESS))
        await anext(left)
        await left.aclose()
        while slot.candidate._mirrors:
            await asyncio.sleep(0.01)
        told = slot.candidate.pairs.report()
        assert told["requests"] == {
            "current": {"answered": 2, "failed": 0, "left": 1}, "candidate": {"answered": 1, "failed": 0, "left": 0},
        }  # fmt: skip
        assert told["shadow"]["pairs"] == 2 and told["shadow"]["tokens"]["candidate"] == 5.5
        first, mirrored = slot.candidate.pairs.kept[0]
        assert (first.text, mirrored.text) == (one, two) and one != two
        with pytest.raises(CanaryError):
            await versions.settle(pool, "m", True, [PLAIN])
        assert slot.candidate is not None, "it stays a candidate"
        candidate = slot.candidate.model
        ended = await versions.settle(
            pool, "m", True, [PLAIN.model_copy(update={"expect": await versions.say(candidate, PLAIN)})]
        )
        assert ended["report"]["shadow"]["pairs"] == 2 and pool.find("m") is candidate and slot.candidate is None
        await versions.try_out(pool, "m", replace(settings, folder=folder), 0.0, 1.0)
        await text(candidate)
        found = await versions.settle(pool, "m", False)
        assert found["version"] == 2 and pool.find("m") is candidate
        await pool.tend()
        assert len(children()) == 1

    using(folder, work, budget=3 * EACH)


def test_of_two_candidates_at_once_one_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Model] = []

    async def enter(pool: Pool, slot: Any, model: Model, *more: Any) -> dict[str, Any]:
        entered.append(model)
        await asyncio.sleep(0)
        return {}

    async def main() -> None:
        settings = Settings(folder, "m")
        pool = Pool([settings])
        tried = [versions.try_out(pool, "m", settings, 0.5, 0.5) for _ in range(2)]
        found = await asyncio.gather(*tried, return_exceptions=True)
        assert [type(one) for one in found] == [dict, ConflictError]
        slot = pool.slots["m"]
        assert len(entered) == 1 and slot.candidate is not None and slot.candidate.model is entered[0]
        assert not slot.changing

    monkeypatch.setattr(versions, "_enter", enter)
    asyncio.run(main())


@pytest.mark.slow
def test_the_same_version_agrees_with_itself_whatever_the_chance(folder: Path) -> None:
    async def work(pool: Pool, settings: Settings) -> None:
        await versions.try_out(pool, "m", settings, 0.0, 1.0, [HELLO])
        slot = pool.slots["m"]
        assert slot.candidate is not None
        for _ in range(5):
            await text(slot.current, 12, replace(ENDLESS, temperature=1.5))
            while slot.candidate._mirrors:
                await asyncio.sleep(0.01)
        assert slot.candidate.pairs.report()["shadow"]["agreement"]["value"] == 1.0

    using(folder, work)


def test_a_gguf_file_is_shadowed_only_with_its_own_tokens_and_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra `llamacpp`")
    folders = {}
    alphabet = minimal.byte_alphabet()
    for name, part, value in (
        ("one", "CONTEXT", 32), ("longer", "CONTEXT", 128), ("told", "TEMPLATE", minimal.TEMPLATE + "!"),
        ("swapped", "byte_alphabet", lambda: [*reversed(alphabet)]),
    ):  # fmt: skip
        folders[name] = tmp_path / name
        folders[name].mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(minimal, part, value)
            write_minimal(folders[name], "llama_cpp")
    (tmp_path / "plain").mkdir()
    minimal._write_tokenizer(tmp_path / "plain")
    one, file = folders["one"], folders["one"] / "model.gguf"
    assert (
        versions._same(one, file)
        and versions._same(file, folders["longer"])
        and versions._same(tmp_path / "plain", one)
    )
    assert not versions._same(file, folders["told"] / "model.gguf") and not versions._same(folders["told"], one)
    assert not versions._same(one, folders["swapped"]) and not versions._same(folders["swapped"], tmp_path / "plain")

    async def work(pool: Pool, settings: Settings) -> None:
        with pytest.raises(ConflictError, match="other tokenizers"):
            await versions.try_out(pool, "m", replace(settings, folder=folders["swapped"] / "model.gguf"), 0.0, 1.0)

    using(file, work)


def test_a_share_is_a_share_of_askers() -> None:
    class Named:
        settings = Settings(Path(), "m")
        version = 2

    candidate = Candidate(Named(), 0.2)  # type: ignore[arg-type]
    taken = [n for n in range(5000) if candidate.takes(f"user {n}")]
    assert 850 < len(taken) < 1150
    candidate.share = 0.4
    assert all(candidate.takes(f"user {n}") for n in taken), "a larger share takes those too"
    candidate.share = 0.0
    assert not any(candidate.takes(None) for _ in range(100))
    candidate.share = 1.0
    assert all(candidate.takes(None) for _ in range(100))


def test_intervals_are_those_of_the_evaluation() -> None:
    for hits, n in ((0, 7), (3, 9), (50, 50), (9_999, 10_000)):
        assert pairs.wilson(hits, n) == pytest.approx(statistics.wilson(hits, n, 0.95))
    gaps = np.random.default_rng(1).normal(0.5, 2.0, 400)
    found = pairs.resampled(list(gaps))
    spread = 1.96 * gaps.std() / 20
    assert found["value"] == pytest.approx(gaps.mean())
    assert found["low"] == pytest.approx(gaps.mean() - spread, abs=0.04)
    assert found["high"] == pytest.approx(gaps.mean() + spread, abs=0.04)
    kept = Pairs()
    assert kept.report()["shadow"] == {"pairs": 0, "seen": 0, "missed": 0, "failed": 0}
    kept.add(Answered("a", 3, 0.1, 0.5), Answered("a ", 4, 0.2, 0.4))
    told = kept.report()["shadow"]
    assert told["agreement"]["value"] == 0.0
    assert told["total_s"]["difference"] == {"value": pytest.approx(-0.1), "low": None, "high": None}
    json.dumps(told, allow_nan=False)


def test_canaries_that_cannot_be_read_are_said_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "canaries.jsonl"
    file.write_text('{"prompt": "a", "expect": "b"}\n\n{"messages": [{"role": "user", "content": "c"}]}\n')
    assert [canary.expect for canary in versions.read_canaries(file)] == ["b", None]
    for line in (
        '{"prompt": "a", "messages": []}',
        '{"expect": "b"}',
        '{"promt": "a"}',
        "[",
        '{"prompt": "a", "max_tokens": 0}',
    ):
        file.write_text(f'{{"prompt": "a"}}\n{line}\n')
        with pytest.raises(DataError, match=r"canaries.jsonl:2"):
            versions.read_canaries(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="no canary"):
        versions.read_canaries(file)
