"""What the process of a model tells, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from slmops.serve.grammar import Reading
from slmops.serve.sampling import Picked
from slmops.serve.scheduler import Finish, Progress
from slmops.serve.worker import Teller, _listen


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def told(
    steps: Sequence[tuple[float, Sequence[tuple[int, int, Finish | None]]]], whole: Sequence[int] = ()
) -> list[list[tuple[int, int]]]:
    """Steps at their times, each with (answer, token, finish); the lines that were told, each with (answer, token)."""
    clock, lines = Clock(), list[list[tuple[int, int]]]()

    def say(line: dict[str, Any]) -> None:
        lines.append([(row[0], row[1]) for row in line["tokens"]])

    teller = Teller(say, 0.01, clock)
    for id in whole:
        teller.hold(id)
    for when, found in steps:
        clock.now = 100 + when
        teller.add([Progress(id, Picked(token), finish) for id, token, finish in found])
    return lines


def test_the_first_and_the_last_token_are_told_at_once_and_others_together() -> None:
    steps = [(0.001 * n, [(1, n, "length" if n == 29 else None)]) for n in range(30)]
    lines = told(steps)
    assert [token for line in lines for _, token in line] == list(range(30))
    assert lines[0] == [(1, 0)] and lines[-1][-1] == (1, 29)
    assert len(lines) <= 5


def test_an_answer_that_ends_does_not_tell_of_the_others() -> None:
    lines = told(
        [(0.0, [(1, 7, None), (2, 8, None)]), (0.001, [(1, 9, None), (2, 10, "stop")]), (0.02, [(1, 11, None)])]
    )
    assert lines == [[(1, 7), (2, 8)], [(2, 10)], [(1, 9), (1, 11)]]


def test_many_answers_are_told_less_often() -> None:
    lines = told([(0.001 * n, [(id, n, None) for id in range(8)]) for n in range(60)])
    assert len(lines[0]) == 8 and len(lines) == 3 and all(len(line) in (8 * 20, 8 * 21) for line in lines[1:])


def test_an_answer_that_is_wanted_whole_is_told_at_its_beginning_and_its_end() -> None:
    steps = [(0.02 * n, [(1, n, "stop" if n == 9 else None), (2, 100 + n, None)]) for n in range(10)]
    lines = told(steps, whole=[1])
    assert lines[0] == [(1, 0), (2, 100)] and lines[-1][:9] == [(1, n) for n in range(1, 10)]
    assert lines[1:-1] == [[(2, 100 + n)] for n in range(1, 9)]


def test_of_a_long_answer_that_is_wanted_whole_it_is_told_seldom() -> None:
    """So that what was written is known when it is left, and no line has all of it."""
    lines = told([(0.002 * n, [(1, n, None), (2, n, None)]) for n in range(1000)], whole=[1])
    for id in (1, 2):
        tokens = [token for line in lines for own, token in line if own == id]
        assert tokens == list(range(len(tokens))) and len(tokens) > 850
    assert sum(any(id == 1 for id, _ in line) for line in lines) == 8
    assert sum(any(id == 2 for id, _ in line) for line in lines) > 150


def test_steps_that_take_long_are_told_one_by_one() -> None:
    lines = told([(0.05 * n, [(1, n, None), (2, 100 + n, None)]) for n in range(4)])
    assert lines == [[(1, n), (2, 100 + n)] for n in range(4)]


def test_a_line_that_cannot_be_read_ends_the_process() -> None:
    through: list[Any] = []
    with pytest.raises(ValueError):
        _listen(['{"cancel": 1}', '{"ask": '], Reading(None, through.append))  # type: ignore[arg-type]
    assert through == [{"cancel": 1}, None]
