"""data.answer: who is asked, how votes are counted, what a kill costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slmops.engines
from slmops.core.spec import Endpoint, Task
from slmops.core.validity import AnswerRules, Shape
from slmops.data import answer
from slmops.data.teacher import PART, Answer, EngineTeacher
from slmops.engines.memory_engine import MemoryEngine
from slmops.engines.stand_in import StandIn
from slmops.errors import DataError, UsageError
from slmops.store.rows import read_rows

LABELS = ["refund", "parcel", "none"]
TASK = Task(type="classification", instruction="Pick a label.", labels=tuple(LABELS), out_of_scope="none")


def run(ctx, out, params, **inputs):
    folder = out()
    facts = answer.run(params, {k: v for k, v in inputs.items() if v}, folder, ctx)
    return read_rows(folder / "answers.jsonl"), facts, folder


@pytest.fixture
def local(monkeypatch):
    """A local teacher that answers by a function of the prompt text and the seed; counts its calls."""

    def use(function, **kind):
        calls = []

        def counted(text, sampling):
            calls.append(text)
            return function(text, sampling)

        monkeypatch.setattr(slmops.engines, "open_engine", lambda folder, threads: MemoryEngine(counted, **kind))
        return calls

    return use


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_the_parts_in_their_order_are_the_whole(parts, ctx, out, dataset, example, local, tmp_path):
    """Five prompts in up to seven parts: some are empty."""
    local(lambda text, _s: "refund" if "1" in text else "parcel")
    data = dataset({"labels": LABELS}, pool=[example(f"prompt {n}") for n in range(5)])
    whole, _, _ = run(ctx, out, answer.Params(task=TASK), data=data, teacher=tmp_path)
    found = []
    for part in range(parts):
        params = answer.Params(task=TASK, part=part, parts=parts)
        rows, facts, _ = run(ctx, out, params, data=data, teacher=tmp_path)
        assert facts["asked"] == len(rows)
        found.append(rows)
    assert [row for rows in found for row in rows] == whole and len(whole) == 5
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_pool_and_prompts_are_answered_gold_and_tests_are_not(ctx, out, dataset, example, local, tmp_path):
    calls = local(lambda text, _s: "refund")
    data = dataset(
        {"labels": LABELS},
        gold=[example("gold one", "parcel")],
        pool=[example("pool one"), example("pool two"), example("gold one")],
        validation=[example("VALIDATION", "refund")],
        test=[example("TEST", "refund")],
    )
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "prompts.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": t}], "source": "seed"}) + "\n"
            for t in ("new", "pool two")
        )
    )
    rows, facts, _ = run(ctx, out, answer.Params(task=TASK), data=data, prompts=prompts, teacher=tmp_path)
    assert [row["messages"][0]["content"] for row in rows] == ["pool one", "pool two", "new"]
    assert all(row["messages"][-1]["content"] == "refund" and row["origin"] == "teacher" for row in rows)
    assert rows[2]["source"] == "seed" and rows[0]["agreement"] == 1.0 and rows[0]["finished"]
    assert facts["asked"] == facts["answered"] == 3
    assert not any("TEST" in text or "VALIDATION" in text for text in calls)
    rows, _, _ = run(ctx, out, answer.Params(task=TASK, label_pool=False), data=data, prompts=prompts, teacher=tmp_path)
    assert [row["messages"][0]["content"] for row in rows] == ["new", "pool two"]


def test_a_trained_teacher_sees_the_students_prompt(ctx, out, dataset, example, local, tmp_path):
    calls = local(lambda text, _s: "refund")
    data = dataset({"labels": LABELS}, pool=[example("hello", system="Pick a label.")])
    run(ctx, out, answer.Params(task=TASK), data=data, teacher=tmp_path)
    assert calls == ["system: Pick a label.\nuser: hello\nassistant: "]
    run(ctx, out, answer.Params(task=TASK, guided=True), data=data, teacher=tmp_path)
    assert "parcel" in calls[1] and calls[1].count("Pick a label.") == 1


def test_an_endpoint_is_told_the_task_and_its_answer_is_tidied(ctx, out, dataset, example):
    desk = StandIn(lambda messages: 'The label is: "Refund".')
    data = dataset({"labels": LABELS}, gold=[example("my box is late", "parcel")], pool=[example("money back")])
    with desk.serve() as url:
        params = answer.Params(task=TASK, endpoint=Endpoint(url=url, model="big", max_output_tokens=99))
        rows, facts, _ = run(ctx, out, params, data=data)
    assert rows[0]["messages"] == [
        {"role": "user", "content": "money back"},
        {"role": "assistant", "content": "refund"},
    ]
    asked = desk.requests[0].body
    assert asked["max_tokens"] == 99
    assert [m["role"] for m in asked["messages"]] == ["system", "user", "assistant", "user"]
    assert all(label in asked["messages"][0]["content"] for label in LABELS)
    assert asked["messages"][2]["content"] == "parcel" and facts["teacher"]["requests"] == 1


def test_votes_are_sampled_and_the_most_frequent_wins(ctx, out, dataset, example, local, tmp_path):
    said = iter(["refund", "parcel", "refund", "none", "refund"])
    local(lambda _text, sampling: next(said) if sampling.temperature > 0 else "greedy")
    data = dataset({"labels": LABELS}, pool=[example("money")])
    rows, facts, folder = run(ctx, out, answer.Params(task=TASK, votes=5), data=data, teacher=tmp_path)
    assert rows[0]["messages"][-1]["content"] == "refund" and rows[0]["agreement"] == 0.6 == facts["agreement"]
    votes = read_rows(folder / "votes.jsonl")
    assert votes[0]["answers"][0] == {"text": "refund", "count": 3} and votes[0]["id"] == example("money").id


def test_json_votes_count_by_value():
    rules = AnswerRules.of(Task(type="extraction"), (), ['{"name": "a", "x": 1}'])
    answers = [Answer('{"x":2,"name":"a"}'), Answer('{"name": "a", "x": 1}'), Answer('{"x": 1, "name": "a"}'), None]
    text, finished, agreement, _ = answer.decide(answers, rules, tidy=False)
    assert (json.loads(text), finished, agreement) == ({"name": "a", "x": 1}, True, round(2 / 3, 6))


def test_finished_votes_come_before_cut_ones():
    rules = AnswerRules.of(Task(type="chat"), (), [])
    decided = answer.decide([Answer("long", False), Answer("long", False), Answer("done")], rules, tidy=False)
    assert decided[:3] == ("done", True, round(1 / 3, 6))
    assert answer.decide([None, None], rules, tidy=False) is None


def test_prompts_that_do_not_fit_have_no_answer(ctx, out, dataset, example, local, tmp_path):
    local(lambda _text, _s: "refund", context_length=60)
    data = dataset({"labels": LABELS}, pool=[example("short"), example("long " * 50)])
    rows, facts, _ = run(ctx, out, answer.Params(task=TASK), data=data, teacher=tmp_path)
    assert len(rows) == 1 and facts["missing"] == 1 and facts["teacher"]["too_long"] == 1
    data = dataset({"labels": LABELS}, pool=[example("long " * 50)])
    with pytest.raises(DataError, match="none of 1 prompts"):
        run(ctx, out, answer.Params(task=TASK), data=data, teacher=tmp_path)


def test_nothing_to_ask_needs_no_teacher(ctx, out, dataset, example):
    data = dataset({"labels": LABELS}, gold=[example("a", "refund")])
    rows, facts, _ = run(ctx, out, answer.Params(task=TASK), data=data)
    assert rows == [] and facts["asked"] == 0
    with pytest.raises(UsageError, match="needs a teacher"):
        run(ctx, out, answer.Params(task=TASK), data=dataset(pool=[example("b")]))


def test_a_local_teacher_goes_on_where_it_was_killed(ctx, example):
    class Killed(BaseException): ...

    calls = []

    def die(text, _sampling):
        calls.append(text)
        if len(calls) == PART + 5:
            raise Killed
        return f"to {text}"

    messages = [[{"role": "user", "content": f"m{n}"}] for n in range(2 * PART)]
    sampling = answer.Sampling(50, 0.7, seed=3)
    with pytest.raises(Killed):
        EngineTeacher(MemoryEngine(die), ctx, scratch=ctx.scratch).answers(messages, sampling)
    calls.clear()
    again = EngineTeacher(MemoryEngine(lambda text, _s: calls.append(text) or f"to {text}"), ctx, scratch=ctx.scratch)
    resumed = again.answers(messages, sampling)
    assert len(calls) == PART
    fresh = EngineTeacher(MemoryEngine(lambda text, _s: f"to {text}"), ctx).answers(messages, sampling)
    assert resumed == fresh


def test_samples_and_parts_have_seeds_of_their_own(ctx):
    seeds = []
    engine = MemoryEngine(lambda _text, sampling: seeds.append(sampling.seed) or "x")
    teacher = EngineTeacher(engine, ctx)
    teacher.answers([[{"role": "user", "content": "a"}]] * (PART + 1), answer.Sampling(9, 1.0, seed=1), samples=2)
    assert len(set(seeds)) == 4


# --- what is an answer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ("refund", "refund"),
        (" Refund.\n", "refund"),
        ("**refund**", "refund"),
        ("Intent: card arrival", "card_arrival"),
        ("<think>hm, parcel?</think>\nrefund", "refund"),
        ("```\nrefund\n```", "refund"),
        ("something else", "something else"),
    ],
)
def test_labels_are_found_in_what_models_say(said, label):
    rules = AnswerRules.of(Task(type="classification"), ["refund", "card_arrival"], [])
    assert rules.tidy(said) == label
    assert (rules.problem(label) is None) == (label in rules.labels)


GOLD = [
    '{"name": "order", "arguments": {"item": "tea", "count": 2}}',
    '{"name": "cancel", "arguments": {"id": "7", "why": null}}',
]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"name": "order", "arguments": {"count": 3}}', None),
        ('{"name": "order", "arguments": {}}', None),
        ('{"name": "pay", "arguments": {}}', "'pay' does not occur"),
        ('{"name": "order"}', "'arguments' is missing"),
        ('{"name": "order", "arguments": {"colour": "red"}}', "'arguments.colour' does not occur"),
        ('{"name": "order", "arguments": {"count": "3"}}', "is a string, not a number"),
        ('{"name": "order", "arguments": {"count": NaN}}', "NaN"),
        ('{"name": "order", "name": "cancel", "arguments": {}}', "twice"),
        ('{"name": "order", "argum', "not JSON"),
        ("[1]", "not a JSON object"),
        ("", "empty"),
    ],
)
def test_extraction_answers_look_like_those_in_training(text, problem):
    found = AnswerRules.of(Task(type="extraction"), (), GOLD).problem(text)
    assert found is None if problem is None else problem in found


def test_json_gets_the_layout_of_the_training_answers():
    said = '```json\n{ "name" : "order",\n "arguments": {"item": "té"} }\n```'
    spaced = AnswerRules.of(Task(type="extraction"), (), GOLD)
    compact = AnswerRules.of(Task(type="extraction"), (), ['{"name":"order","arguments":{"item":"x"}}'])
    assert spaced.tidy(said) == '{"name": "order", "arguments": {"item": "té"}}'
    assert compact.tidy(said) == '{"name":"order","arguments":{"item":"té"}}'


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(max_size=4), _VALUES, max_size=4), min_size=1, max_size=5))
def test_every_training_answer_is_valid(values):
    shape = Shape.of(json.dumps(value) for value in values)
    assert all(shape.problem(value) is None for value in values)


@given(st.text())
def test_any_text_can_be_tidied_and_judged(text):
    for kind in ("classification", "extraction", "chat"):
        rules = AnswerRules.of(Task(type=kind), ["a", "b"], GOLD)
        tidy = rules.tidy(text)
        assert rules.tidy(tidy) == tidy or text.lstrip().startswith(("<", "`"))
        rules.problem(tidy), rules.vote_key(tidy)


# --- kill -9 --------------------------------------------------------------------------------------------------------

CHILD = """
import json, sys
from pathlib import Path
from slmops.core.method import Context
from slmops.data import answer
url, data, out, shared = sys.argv[1:]
params = answer.Params.model_validate_json(json.dumps({
    "task": {"type": "classification"},
    "endpoint": {"url": url, "model": "big", "concurrency": 4, "timeout_s": 20.0},
}))
answer.run(params, {"data": Path(data)}, Path(out), Context(seed=1, scratch=Path(shared), shared=Path(shared)))
"""


@pytest.mark.slow
def test_kill_9_while_answering_pays_nothing_twice(out, dataset, example, tmp_path):
    texts = [f"message {n}" for n in range(120)]
    data = dataset({"labels": LABELS}, pool=[example(text) for text in texts])
    desk = StandIn(lambda messages: LABELS[len(messages[-1]["content"]) % 3], delay_s=0.01)
    environment = os.environ | {"PYTHONPATH": str(Path(slmops.engines.__file__).parents[2])}
    with desk.serve() as url:

        def start(folder):
            command = [sys.executable, "-c", CHILD, url, str(data), str(folder), str(tmp_path / "shared")]
            return subprocess.Popen(command, env=environment)

        for stop_at in (25, 60, 90):
            child = start(out())
            deadline = time.monotonic() + 60
            while len(desk.requests) < stop_at and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            child.send_signal(signal.SIGKILL)
            child.wait()
            assert len(desk.requests) < 120
        final = out()
        assert start(final).wait(timeout=60) == 0
        paid_twice = len(desk.requests) - 120
        assert paid_twice <= 3 * 4  # what was under way when it was killed, at most `concurrency` each time
        before = len(desk.requests)
        repeated = out()
        assert start(repeated).wait(timeout=60) == 0
        assert len(desk.requests) == before
    rows = read_rows(final / "answers.jsonl")
    assert [row["messages"][0]["content"] for row in rows] == texts
    assert (final / "answers.jsonl").read_bytes() == (repeated / "answers.jsonl").read_bytes()


@pytest.mark.slow
def test_two_processes_share_the_answers(out, dataset, example, tmp_path):
    data = dataset({"labels": LABELS}, pool=[example(f"message {n}") for n in range(60)])
    desk = StandIn(lambda _messages: "refund")
    environment = os.environ | {"PYTHONPATH": str(Path(slmops.engines.__file__).parents[2])}
    with desk.serve() as url:
        folders = [out(), out()]
        children = [
            subprocess.Popen(
                [sys.executable, "-c", CHILD, url, str(data), str(folder), str(tmp_path / "shared")], env=environment
            )
            for folder in folders
        ]
        assert [child.wait(timeout=60) for child in children] == [0, 0]
    assert folders[0].joinpath("answers.jsonl").read_bytes() == folders[1].joinpath("answers.jsonl").read_bytes()
