"""The made-up support desk: reproducible, varied, right by construction, and not solved by keywords."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from slmops.core.example import Example
from slmops.templates import wording
from slmops.templates.support_desk import _Writer, generate

ROWS = generate(2500, 7)
TEXTS = [row["messages"][0]["content"] for row in ROWS]
CALLS = [json.loads(row["messages"][1]["content"]) for row in ROWS]


@pytest.fixture(scope="module")
def rule() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rule_of_thumb", Path(__file__).with_name("rule_of_thumb.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_seed_gives_the_same_messages_and_a_shorter_list_is_its_beginning():
    assert generate(300, 7) == ROWS[:300]
    assert generate(300, 8) != ROWS[:300]


def test_the_messages_of_a_seed_stay_the_same_between_versions():
    """A change of the words changes every demo number: then this digest, and the numbers in the docs, change too."""
    text = json.dumps(generate(1000, 0), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "635378324e7347c5"


def test_rows_are_canonical_and_answers_are_compact_calls_with_known_values():
    arguments = {f.name: f.arguments for f in wording.FUNCTIONS} | {"none": ()}
    for row, call in zip(ROWS, CALLS, strict=True):
        example = Example.from_json(row)
        assert example.answer == json.dumps(call, separators=(",", ":"))
        assert tuple(call["arguments"]) == arguments[call["name"]]
        assert all(value in wording.VALUES[slot] for slot, value in call["arguments"].items())


def test_every_function_and_every_value_occurs_about_as_often_as_meant():
    names = Counter(call["name"] for call in CALLS)
    assert set(names) == {f.name for f in wording.FUNCTIONS} | {"none"}
    assert min(names.values()) > 0.04 * len(CALLS)
    values = Counter((slot, value) for call in CALLS for slot, value in call["arguments"].items())
    wanted = {(slot, value) for f in wording.FUNCTIONS for slot in f.arguments for value in wording.VALUES[slot]}
    assert set(values) == wanted


def test_no_mark_of_the_grammar_is_left_in_a_message():
    assert not [text for text in TEXTS if re.search(r"[\[\]{}|]|\?\.", text)]
    assert max(map(len, TEXTS)) < 400


def test_more_than_95_percent_are_distinct_before_copies_are_dropped():
    writer = _Writer(3)
    assert len({writer.message()[0] for _ in range(4000)}) > 0.95 * 4000


def test_fewer_than_2_percent_have_a_near_copy():
    """Near: Jaccard similarity of word 3-shingles at or above 0.9, as the leak check of `data` counts it."""
    shingles = []
    for text in TEXTS:
        words = re.findall(r"\w+", text.lower())
        shingles.append({tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))})
    holders: dict[tuple[str, ...], list[int]] = {}
    near = 0
    for index, own in enumerate(shingles):
        candidates = Counter(other for shingle in own for other in holders.get(shingle, ()))
        near += any(both / (len(own) + len(shingles[other]) - both) >= 0.9 for other, both in candidates.items())
        for shingle in own:
            holders.setdefault(shingle, []).append(index)
    assert near < 0.02 * len(TEXTS), near


def test_a_rule_of_thumb_scores_low_even_with_all_the_word_lists_of_the_desk(rule: ModuleType):
    right = sum(json.loads(rule.answer(text)) == call for text, call in zip(TEXTS, CALLS, strict=True))
    assert 0.3 * len(TEXTS) < right < 0.6 * len(TEXTS)


def test_the_rule_of_thumb_does_solve_plain_messages(rule: ModuleType):
    """It is an honest rule: without noise and traps it is right."""
    plain = {
        "please cancel my lamp": {"name": "cancel", "arguments": {"item": "lamp"}},
        "where is my kettle?": {"name": "track", "arguments": {"item": "kettle"}},
        "call me on monday in the evening": {"name": "callback", "arguments": {"day": "monday", "time": "evening"}},
        "deliver the desk on friday instead": {"name": "reschedule", "arguments": {"item": "desk", "day": "friday"}},
        "do you have a jacket in navy?": {"name": "stock", "arguments": {"item": "jacket", "colour": "blue"}},
    }
    assert {text: json.loads(rule.answer(text)) for text in plain} == plain
