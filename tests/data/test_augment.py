"""`data.augment`: copies whose answers stay right, from the given examples alone, and nothing that gives a test away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.core.example import Example, Message
from slmops.core.method import Context
from slmops.core.spec import Augment, Training
from slmops.core.validity import dump, leaves, with_leaves
from slmops.data import augment
from slmops.errors import DataError
from slmops.store.rows import read_examples, write_rows
from slmops.train.encode import Row
from slmops.train.sft import hold_out

CITIES = ["Fair Bluff", "Long Bridge", "Ålesund", "Lamar", "Wauseon", "New York", "Oslo", "Bergen", "Turku", "Kiel"]


def call(text: str, name: str = "weather", **arguments: object) -> Example:
    return Example((Message("user", text),), json.dumps({"name": name, "arguments": arguments}), "gold", "train.jsonl")


def desk() -> list[Example]:
    weather = [call(f"will it rain in {city} {day}?", city=city, day=day)
               for city, day in zip(CITIES, ["today", "tomorrow"] * 5, strict=True)]  # fmt: skip
    return [*weather, call("play Oslo by Kiara", "play", track="Oslo", artist="Kiara"), call("stop it", "stop")]


def folder(tmp_path: Path, rows: list[Example], test: list[Example] | None = None) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    write_rows(path / "gold.jsonl", (e.to_json() for e in rows))
    write_rows(path / "test.jsonl", (e.to_json() for e in test or []))
    return path


def run(tmp_path: Path, data: Path, seed: int = 0, **settings: object) -> tuple[list[Example], dict]:
    out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    out.mkdir()
    params = augment.Params(augment=Augment.model_validate(settings), files=("data/gold.jsonl",))
    augment.run(params, {"data": data}, out, Context(seed=seed, scratch=tmp_path, shared=tmp_path))
    return read_examples(out / "train.jsonl"), json.loads((out / "stats.json").read_text())


def test_message_and_answer_change_together(tmp_path: Path) -> None:
    rows = desk()
    by_id = {row.id: row for row in rows}
    copies, stats = run(tmp_path, folder(tmp_path, rows), copies=5)
    assert stats["kept"] == len(copies) > 3 * len(CITIES)
    for copy in copies:
        parent = by_id[copy.parent]
        old, new = json.loads(parent.answer or ""), json.loads(copy.answer or "")
        assert copy.source == "swap" and copy.origin == "gold"
        assert list(new) == list(old) and list(new["arguments"]) == list(old["arguments"])
        assert new["name"] == old["name"]
        text = parent.text
        for key, value in new["arguments"].items():
            assert value in copy.text
            text = text.replace(old["arguments"][key], value)
        assert text == copy.text != parent.text
    assert len({copy.id for copy in copies}) == len(copies), "no copy twice"
    assert not {copy.id for copy in copies} & set(by_id), "no original again"


def test_closed_arguments_take_known_values_and_functions_keep_theirs(tmp_path: Path) -> None:
    copies, stats = run(tmp_path, folder(tmp_path, desk()), copies=20, made_up=1.0)
    weather = [json.loads(c.answer or "") for c in copies if c.text.startswith("will")]
    assert {answer["arguments"]["day"] for answer in weather} == {"today", "tomorrow"}
    cities = {answer["arguments"]["city"] for answer in weather}
    assert cities - set(CITIES), "names are made up"
    assert stats["novelty"]["weather.arguments.city"] == 1
    assert stats["novelty"]["weather.arguments.day"] == 0
    known, _ = run(tmp_path, tmp_path / "data", copies=20, made_up=0.0)
    places = {json.loads(c.answer or "")["arguments"]["city"] for c in known if c.text.startswith("will")}
    assert places <= set(CITIES)
    assert not any("Kiara" in c.text for c in known if c.text.startswith("will"))


@pytest.mark.parametrize(
    "row",
    [
        call("from Oslo to Oslo", city="Oslo"),  # which of the two is meant?
        call("to Oslofjord", city="Oslo"),  # a part of a word
        call("somewhere", city="Oslo"),  # not in the message
        call("four people", size=4),  # no text
    ],
    ids=["twice", "part of a word", "absent", "number"],
)  # fmt: skip
def test_a_value_that_is_not_plainly_copied_stays(row: Example, tmp_path: Path) -> None:
    copies, _ = run(tmp_path, folder(tmp_path, [row, *desk()]), copies=3)
    assert copies
    assert row.id not in {copy.parent for copy in copies}


def test_nothing_to_swap_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of 1 examples") as caught:
        run(tmp_path, folder(tmp_path, [call("stop", "stop")]))
    assert "data.augment" in caught.value.hint


def test_evaluation_messages_do_not_come_back(tmp_path: Path) -> None:
    data = folder(tmp_path, desk(), [call("will it rain in Oslo tomorrow?", city="Oslo", day="tomorrow")])
    found = 0
    for seed in range(8):
        copies, stats = run(tmp_path, data, seed=seed, copies=30, made_up=0.0)
        found += stats["dropped_as_evaluation_data"]
        assert all(copy.text != "will it rain in Oslo tomorrow?" for copy in copies)
    assert found, "it came, and was dropped"


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    data = folder(tmp_path, desk())
    first, again, other = run(tmp_path, data), run(tmp_path, data), run(tmp_path, data, seed=1)
    assert first == again != other


def test_copies_of_a_held_out_example_are_not_trained_on(tmp_path: Path) -> None:
    rows = [call(f"weather in {city}{n}", city=f"{city}{n}") for city in CITIES for n in range(10)]
    copies, _ = run(tmp_path, folder(tmp_path, rows))
    everything = [Row(example, "f", n) for n, example in enumerate([*rows, *copies])]
    kept, held = hold_out(everything, Training().holdout)
    assert held and not any(row.example.parent for row in held)
    gone = {row.example.id for row in held}
    assert not any(row.example.parent in gone for row in kept)
    assert hold_out([r for r in everything if not r.example.parent], Training().holdout)[1] == held


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_leaves_name_every_value_and_nothing_else(value: object) -> None:
    found = leaves(value)
    assert with_leaves(value, dict(found)) == value
    assert with_leaves(value, {}) == value
    marked = with_leaves(value, {path: "#" for path, _ in found})
    assert [leaf for _, leaf in leaves(marked)] == ["#"] * len(found)
    assert dump({"v": marked}, compact=True).count("#") >= len(found)
