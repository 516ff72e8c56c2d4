"""Answers do not depend on the company they are given in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slmops.core.engine import Sampling
from slmops.engines import open_engine
from slmops.errors import ModelError, ResourceError
from slmops.serve.engines.onnx import OnnxRows
from slmops.serve.sampling import Picked, Picking
from slmops.serve.scheduler import Request, Scheduler
from tests.serve.conftest import Converted

CHUNK = 8
HOW = (
    Picking(logprobs=0),
    Picking(logprobs=2),
    Picking(temperature=1.0, seed=7, logprobs=0),
    Picking(temperature=0.8, top_p=0.9, top_k=20, seed=3, logprobs=0),
    Picking(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2, logit_bias={9: 2.0}, logprobs=0),
)
Answer = tuple[tuple[Picked, ...], str]


def answers(scheduler: Scheduler, requests: list[Request], random_: random.Random | None = None) -> dict[int, Answer]:
    """All answers of requests that come at any time (None: at once), some of which are cancelled half way (negative ids)."""
    waiting, tokens, done = list(requests), dict[int, list[Picked]](), dict[int, Answer]()
    steps = 0
    while waiting or scheduler.waiting or scheduler.busy:
        steps += 1
        assert steps < 5000
        while waiting and (random_ is None or random_.random() < 0.4):
            scheduler.submit(waiting.pop(0))
        for progress in scheduler.step():
            tokens.setdefault(progress.id, []).append(progress.picked)
            if progress.finish:
                done[progress.id] = (tuple(tokens[progress.id]), progress.finish)
            elif progress.id < 0 and random_ is not None and random_.random() < 0.3:
                assert scheduler.cancel(progress.id)
    return done


def requests(random_: random.Random, count: int, vocabulary: int, context: int) -> list[Request]:
    """Prompts of all lengths; many begin like another."""
    found: list[Request] = []
    for number in range(1, count + 1):
        start = random_.choice(found).prompt[: random_.randrange(1, 40)] if found and random_.random() < 0.6 else ()
        more = tuple(random_.randrange(5, vocabulary) for _ in range(random_.choice((1, 3, 7, 8, 9, 17, 40))))
        prompt = (start + more)[: context - 1]
        cancelled = random_.random() < 0.15
        found.append(
            Request(
                -number if cancelled else number,
                prompt,
                random_.randrange(1, 24),
                random_.choice(HOW),
                random_.random() < 0.7,
            )
        )
    return found


@pytest.fixture(
    params=[("llama", "int4"), ("llama", "fp32"), ("qwen3", "int8"), ("phi3", "int4"), ("gemma3", "fp32")], ids="-".join
)
def folder(request: pytest.FixtureRequest, converted: Converted) -> Path:
    return converted(*request.param)


@pytest.fixture
def rows(folder: Path) -> Iterator[OnnxRows]:
    engine = OnnxRows(folder, rows=5, context=64)
    yield engine
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_an_answer_is_bit_for_bit_what_it_is_alone(rows: OnnxRows, folder: Path, seed: int) -> None:
    """Tokens and log probabilities, over random arrivals, lengths, cancellations, samplings, and prompts with one beginning."""
    random_ = random.Random(seed)
    wanted = requests(random_, 24, rows.vocabulary, rows.context_length)
    together = answers(Scheduler(rows, chunk=CHUNK), wanted, random_)
    alone = OnnxRows(folder, rows=1, context=64)
    for request in wanted:
        if request.id in together:
            fresh = answers(Scheduler(alone, chunk=CHUNK), [request])
            assert fresh[request.id] == together[request.id], request
    assert {r.id for r in wanted if r.id > 0} <= set(together)


@pytest.mark.slow
def test_greedy_answers_are_those_of_onnx_runtime_genai(rows: OnnxRows, folder: Path) -> None:
    random_ = random.Random(1)
    wanted = [
        replace(r, id=abs(r.id), how=Picking(), ignore_end=False, most=20)
        for r in requests(random_, 12, rows.vocabulary, 60)
    ]
    engine = open_engine(folder)
    found = answers(Scheduler(rows), wanted, random_)
    equal = 0
    for request in wanted:
        room = min(request.most, rows.context_length - len(request.prompt))
        (expected,) = engine.generate([request.prompt], Sampling(max_new_tokens=room))
        equal += tuple(p.token for p in found[request.id][0]) == expected.tokens
        assert (found[request.id][1] == "stop") == expected.finished
    assert equal == len(wanted)


@pytest.mark.slow
def test_a_beginning_that_was_read_is_not_read_again(converted: Converted) -> None:
    engine = OnnxRows(converted("llama", "int4"), rows=2, context=64)
    scheduler = Scheduler(engine, chunk=CHUNK)
    prompt = tuple(range(5, 5 + 30))
    first = answers(scheduler, [Request(1, prompt, 4)])
    read: list[int] = []
    feed = engine.feed
    engine.feed = lambda row, ids: read.append(len(ids)) or feed(row, ids)  # type: ignore[method-assign, func-returns-value]
    scheduler.submit(Request(2, (*prompt[:27], 99, 98, 97), 4))
    (begun,) = scheduler.step()
    assert (begun.cached, read) == (24, [6])
    assert answers(scheduler, [Request(3, prompt, 4)])[3] == first[1]


def test_a_model_that_keeps_no_state_of_a_beginning_reads_all_again(minimal_rows: OnnxRows) -> None:
    scheduler, prompt = Scheduler(minimal_rows, chunk=8), tuple(range(5, 35))
    cut = minimal_rows.cut
    minimal_rows.cut = lambda row, length: cut(row, length if length == minimal_rows.length(row) else 0)  # type: ignore[method-assign]
    first = answers(scheduler, [Request(1, prompt, 4, ignore_end=True)])[1]
    scheduler.submit(Request(2, prompt, 4, ignore_end=True))
    found = [progress for _ in range(8) for progress in scheduler.step()]
    assert found[0].cached == 0 and tuple(progress.picked for progress in found) == first[0]


def test_what_has_no_room_is_refused_and_a_row_is_free_after_a_cancel(minimal_rows: OnnxRows) -> None:
    scheduler = Scheduler(minimal_rows, queue=2)
    for prompt in ((), tuple(range(5, 5 + 64))):
        with pytest.raises(ModelError, match="tokens, but the context holds 64"):
            scheduler.submit(Request(1, prompt, 4))
    with pytest.raises(ModelError):
        scheduler.submit(Request(1, (7,), 0))
    for id in (1, 2, 3):  # one for the row, two that wait
        scheduler.submit(Request(id, (7, 8), 30, ignore_end=True))
    with pytest.raises(ResourceError):
        scheduler.submit(Request(4, (7,), 4))
    scheduler.step()
    assert (scheduler.busy, scheduler.waiting) == (1, 2)
    with pytest.raises(ResourceError):
        scheduler.submit(Request(4, (7,), 4))
    assert scheduler.cancel(3) and scheduler.cancel(2) and scheduler.cancel(1) and not scheduler.cancel(1)
    assert (scheduler.busy, scheduler.waiting) == (0, 0) and scheduler.step() == []


def test_a_long_prompt_does_not_hold_up_the_answers_beside_it(minimal_rows: OnnxRows) -> None:
    engine = OnnxRows(minimal_rows.folder, rows=2)
    scheduler = Scheduler(engine, chunk=8)
    scheduler.submit(Request(1, (7,), 40, ignore_end=True))
    scheduler.step()
    scheduler.submit(Request(2, tuple(range(5, 55)), 4))
    order = [p.id for _ in range(8) for p in scheduler.step()]
    assert order[:6] == [1] * 6 and 2 in order[6:9]


def test_short_prompts_are_read_together_up_to_a_chunk(minimal_rows: OnnxRows) -> None:
    scheduler = Scheduler(OnnxRows(minimal_rows.folder, rows=6), chunk=8)
    for id, length in enumerate((3, 4, 2, 8, 9, 1), 1):
        scheduler.submit(Request(id, tuple(range(5, 5 + length)), 40, ignore_end=True))
    begun: list[list[int]] = []
    known: set[int] = set()
    while len(known) < 6:
        begun.append(sorted({p.id for p in scheduler.step()} - known))
        known |= set(begun[-1])
    assert begun == [[1, 2], [3], [4], [], [5, 6]]


def test_idle_rows_below_a_busy_one_are_given_up(minimal_rows: OnnxRows) -> None:
    engine = OnnxRows(minimal_rows.folder, rows=6)
    scheduler = Scheduler(engine)
    for id in range(1, 7):
        scheduler.submit(Request(id, (id + 6, 9), 40, ignore_end=True))
    for _ in range(8):
        scheduler.step()
    asked: list[int] = []
    decode = engine.decode
    engine.decode = lambda tokens: asked.append(max(tokens) + 1) or decode(tokens)  # type: ignore[method-assign, func-returns-value]
    for id in (1, 2, 3, 4, 5):
        scheduler.cancel(id)
    scheduler.step()
    scheduler.step()
    assert asked == [6, 1]


@pytest.fixture
def minimal_rows(tmp_path: Path) -> OnnxRows:
    from slmops.engines.minimal import write_minimal

    write_minimal(tmp_path, "onnx_genai")
    return OnnxRows(tmp_path, rows=1)


def test_logits_are_float32_rows(minimal_rows: OnnxRows) -> None:
    first = minimal_rows.feed(0, [7, 8, 9])
    assert first.shape == (minimal_rows.vocabulary,) and first.dtype == np.float32
    minimal_rows.cut(0, 0)
    minimal_rows.feed(0, [7, 8])
    assert minimal_rows.decode({0: 9})[0] == pytest.approx(first, abs=1e-4)
