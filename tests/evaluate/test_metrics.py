"""Scores against counts made by hand and against brute force."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.core.spec import GateSpec, Task
from slmops.errors import UsageError
from slmops.evaluate import metrics as m

INTENT = Task(type="classification", out_of_scope="oos")
CALL = Task(type="extraction")


def value(metric: str, golds: list[str], answers: list[str], task: Task, labels: tuple[str, ...] = ()) -> float | None:
    return m.columns(metric, golds, answers, task, labels).value  # type: ignore[arg-type]


def test_accuracy_strips_white_space_and_nothing_else() -> None:
    assert value("accuracy", ["a", "b", "c", "d"], [" a\n", "B", "c.", "d"], INTENT) == 0.5


def test_scope_is_split_by_gold() -> None:
    golds, answers = ["a", "a", "oos", "oos", "oos"], ["a", "oos", "oos", "a", "oos"]
    assert value("in_scope_accuracy", golds, answers, INTENT) == 0.5
    assert value("out_of_scope_recall", golds, answers, INTENT) == pytest.approx(2 / 3)
    assert value("out_of_scope_recall", ["a"], ["a"], INTENT) is None


def test_valid_label() -> None:
    assert value("valid", ["a", "b"], ["b", "nonsense"], INTENT, ("a", "b")) == 0.5


def test_macro_f1_by_hand() -> None:
    golds, answers = ["a", "a", "b", "b", "c"], ["a", "b", "b", "b", "what"]
    # a: 2*1/(2+1), b: 2*2/(2+3), c: 0; the answer `what` makes no class of its own
    assert m.macro_f1(golds, answers) == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1, max_size=30))
def test_macro_f1_is_what_precision_and_recall_say(pairs: list[tuple[str, str]]) -> None:
    golds, answers = [g for g, _ in pairs], [a for _, a in pairs]
    scores = []
    for label in set(golds):
        hits = sum(g == a == label for g, a in pairs)
        precision = hits / answers.count(label) if label in answers else 0.0
        recall = hits / golds.count(label)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert m.macro_f1(golds, answers) == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ('{"a": 1, "b": [1, 2]}', ' {"b":[1,2],"a":1.0} ', True),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', False),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": null}', "{}", False),
        ('{"a": "ü"}', '{"a": "\\u00fc"}', True),
        ('{"a": 1}', 'Sure! {"a": 1}', False),
        ('{"a": 1}', '{"a": NaN}', False),
        ("[1]", "[1]", True),
    ],
)
def test_json_equality(gold: str, answer: str, same: bool) -> None:
    assert m.same_json(gold, answer) is same


def test_deep_nesting_is_not_parsed_and_does_not_crash() -> None:
    for deep in (5_000, 300):
        assert m.parse('{"a":' * deep + "1" + "}" * deep) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=2), json_values, max_size=3)


@settings(deadline=None)
@given(objects)
def test_an_object_equals_itself_in_any_key_order(value_: dict[str, object]) -> None:
    turned = dict(reversed(value_.items()))
    assert m.same_json(json.dumps(value_), json.dumps(turned, indent=2))
    counts = m.field_counts(json.dumps(value_), json.dumps(turned))
    assert all(extra == missed == 0 for _, extra, missed in counts.values())


@settings(deadline=None)
@given(objects, objects)
def test_field_counts_add_up(gold: dict[str, object], answer: dict[str, object]) -> None:
    totals = [sum(c[i] for c in m.field_counts(json.dumps(gold), json.dumps(answer)).values()) for i in range(3)]
    assert totals[0] + totals[2] == len(m.flatten(gold))
    assert totals[0] + totals[1] == len(m.flatten(answer))


def test_field_counts_by_hand() -> None:
    gold = '{"name": "book", "args": {"day": "monday", "with": ["ann", "bo"]}}'
    answer = '{"name": "book", "args": {"day": "friday", "with": ["bo"], "x": 1}}'
    assert m.field_counts(gold, answer) == {
        "name": (1, 0, 0),
        "args.day": (0, 1, 1),
        "args.with[]": (1, 0, 1),
        "args.x": (0, 1, 0),
    }
    assert value("field_f1", [gold], [answer], CALL) == pytest.approx(2 * 2 / (2 * 2 + 2 + 2))
    assert value("field_f1", [gold], ["no json"], CALL) == 0.0
    assert value("valid", [gold, gold], [answer, "no json"], CALL) == 0.5


def test_normalised_answers() -> None:
    question = Task(type="question_answering")
    assert value("exact_match", ["The  Eiffel Tower!"], ["eiffel tower"], question) == 1.0
    assert m.token_f1("the cat sat on a mat", "a cat on the mat, a cat") == pytest.approx(2 * 3 / (4 + 4))
    assert m.token_f1("", "") == 1.0
    assert m.token_f1("", "x") == 0.0
    assert m.token_f1("größe «zwei»", "Größe zwei") == 1.0


def longest_common(left: list[str], right: list[str]) -> int:
    short, long = sorted((left, right), key=len)
    for size in range(len(short), 0, -1):
        for picked in combinations(short, size):
            rest = iter(long)
            if all(word in rest for word in picked):
                return size
    return 0


words = st.lists(st.sampled_from(["red", "blue", "größe", "猫"]), max_size=7)


@settings(deadline=None)
@given(words, words)
def test_rouge_l_is_the_longest_common_subsequence(gold: list[str], answer: list[str]) -> None:
    wanted = 1.0 if not gold and not answer else 0.0
    if gold and answer:
        wanted = 2 * longest_common(gold, answer) / (len(gold) + len(answer))
    assert m.rouge_l()(" ".join(gold), " ".join(answer)) == pytest.approx(wanted)


def test_defaults_and_metrics_that_do_not_fit() -> None:
    assert m.metrics_for(INTENT) == ("accuracy", "macro_f1", "in_scope_accuracy", "out_of_scope_recall")
    assert m.metrics_for(CALL, None, (GateSpec(metric="accuracy", at_least=0.5),))[-1] == "accuracy"
    assert "p95_ms" not in m.metrics_for(CALL, None, (GateSpec(metric="p95_ms", at_most=5.0),))
    assert m.metrics_for(CALL, ("valid",)) == ("valid",)
    for metric, task in (
        ("macro_f1", CALL),
        ("field_f1", INTENT),
        ("out_of_scope_recall", Task(type="classification")),
    ):
        with pytest.raises(UsageError) as caught:
            m.metrics_for(task, (metric,))  # type: ignore[arg-type]
        assert caught.value.hint
