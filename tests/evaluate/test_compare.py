"""`slmops compare`: paired, honest about what it cannot tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.core.spec import Task
from slmops.errors import DataError, UsageError
from slmops.evaluate.compare import Side, compare, render_comparison
from tests.evaluate import made_up

TASK = Task(type="classification")


def rows(n: int, wrong: set[int]) -> list[dict[str, Any]]:
    return [
        {"id": f"{i:016x}", "prompt": f"message {i}", "gold": "a", "answer": "b" if i in wrong else "a"}
        for i in range(n)
    ]


def side(tmp_path: Path, name: str, n: int, wrong: set[int]) -> Side:
    return Side(name, made_up.predictions(tmp_path / name, rows(n, wrong)))


def test_a_clear_difference(tmp_path: Path) -> None:
    old, new = side(tmp_path, "old", 200, set(range(40))), side(tmp_path, "new", 200, {39, 100})
    found = compare(old, new, TASK, resamples=300)
    assert found["verdict"] == "better" and found["difference"]["value"] == pytest.approx(0.19)
    assert (found["gained"]["count"], found["lost"]["count"]) == (39, 1)
    assert len(found["gained"]["examples"]) == 10
    assert found["lost"]["examples"] == [
        {"id": f"{100:016x}", "prompt": "message 100", "gold": "a", "reference": "a", "candidate": "b"}
    ]
    assert compare(new, old, TASK, resamples=300)["verdict"] == "worse"
    text = render_comparison(found)
    assert "new is better than old" in text and "39 examples are better with new, 10 of them:" in text
    json.dumps(found, allow_nan=False)


def test_no_difference_says_what_would_be_seen(tmp_path: Path) -> None:
    found = compare(side(tmp_path, "a", 100, {1, 2}), side(tmp_path, "b", 100, {2, 3}), TASK, resamples=300)
    assert found["verdict"] == "no difference found" and "would show" in found["says"]
    assert found["difference"]["p"] == 1.0
    same = compare(side(tmp_path, "c", 100, {1}), side(tmp_path, "d", 100, {1}), TASK, resamples=300)
    assert same["difference"]["low"] < 0 < same["difference"]["high"]
    assert "No example is worse" in render_comparison(same)


def test_other_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="share 90 examples of 100 and 90") as caught:
        compare(side(tmp_path, "a", 100, set()), side(tmp_path, "b", 90, set()), TASK)
    assert "same data" in caught.value.hint
    with pytest.raises(UsageError, match="both sides"):
        compare(side(tmp_path, "c", 9, set()), side(tmp_path, "c", 9, set()), TASK)
    with pytest.raises(DataError, match="there are no predictions"):
        compare(Side("x", tmp_path / "nowhere"), Side("y", tmp_path / "nowhere"), TASK)


def test_measurements(tmp_path: Path) -> None:
    inputs = made_up.classification(tmp_path, n=60)
    teacher, student = (
        Side(name, inputs[f"predictions.{name}"], inputs["measurement"]) for name in ("teacher-fp32", "student-int4")
    )
    found = compare(teacher, student, TASK, resamples=200)
    assert found["time_reduction"]["value"] == pytest.approx(1 - 3.5 / 30, abs=0.01) and not found["notes"]
    assert found["memory_reduction"]["low"] > 0.9
    other = made_up.write(tmp_path / "other", "measurement.json", made_up.measurement(seed=9, rounds=2))
    apart = compare(teacher, Side("new", student.predictions, other, "student-int4"), TASK, resamples=200)
    assert apart["time_reduction"]["value"] is None and len(apart["notes"]) == 2
    absent = compare(teacher, Side("new", student.predictions, other), TASK, resamples=200)
    assert "was not measured" in absent["notes"][0]


def test_another_metric(tmp_path: Path) -> None:
    found = compare(
        side(tmp_path, "a", 50, {1}), side(tmp_path, "b", 50, set()), Task(type="chat"), metric="rouge_l", resamples=200
    )
    assert found["metric"] == "rouge_l" and list(found["scores"]) == ["rouge_l"] and found["gained"]["count"] == 1
