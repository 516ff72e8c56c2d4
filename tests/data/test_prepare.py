"""Prepared data cannot leak, does not depend on the order of rows, and says what it removed."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from slmops.core.digest import digest_file
from slmops.core.example import Example
from slmops.core.method import Context, SilentProgress
from slmops.core.spec import Columns, Data, Gold, Overlap, Splits, Task
from slmops.data import prepare
from slmops.data.overlap import normalise
from slmops.errors import DataError, LeakError

NAMES = ("teacher", "gold", "pool", "oracle", "validation", "test")
CLASSES = Task(type="classification")
POSITIONS = Columns(prompt=0, answer=1)
COUNTER = itertools.count()


class Prepared:
    """What one run wrote."""

    def __init__(self, folder: Path, facts: dict[str, Any], lines: list[str]) -> None:
        self.folder, self.facts, self.lines = folder, facts, lines
        self.info = json.loads((folder / "info.json").read_text("utf-8"))
        for name in NAMES:
            rows = (folder / f"{name}.jsonl").read_text("utf-8").splitlines()
            setattr(self, name, [Example.from_json(json.loads(row)) for row in rows])

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def removed(self) -> dict[str, int]:
        return {kind: value["count"] for kind, value in self.info["removed"].items()}

    def bytes(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in sorted(self.folder.iterdir())}


def run(
    folder: Path, rows: Any, task: Task = CLASSES, *, teacher: bool = True, strict: bool = False, **data: Any
) -> Prepared:
    place = folder / f"run{next(COUNTER)}"
    place.mkdir()
    source = place / "data.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    out = place / "out"
    out.mkdir()
    progress = SilentProgress()
    context = Context(seed=0, scratch=place, shared=place, progress=progress, strict=strict)
    given = Data(**{"path": "data.json", "columns": POSITIONS, **data})
    params = prepare.Params(data=given, task=task, needs_teacher=teacher)
    facts = prepare.run(params, {"source": source}, out, context)
    return Prepared(out, facts, progress.lines)


def rows_of(count: int, labels: int = 4, tag: str = "row") -> list[list[str]]:
    """Distinct rows, no two of them alike."""
    return [[f"{tag}{i} alpha{i} beta{i * 7} gamma{i * 13}", f"label{i % labels}"] for i in range(count)]


def texts(examples: list[Example]) -> set[str]:
    return {e.text for e in examples}


def test_shares_are_about_what_was_asked_and_nothing_is_lost(tmp_path: Path) -> None:
    got = run(tmp_path, rows_of(2000))
    assert 240 < len(got.test) < 360
    assert 150 < len(got.validation) < 250
    parts = [got.teacher, got.pool, got.validation, got.test]
    assert sum(len(part) for part in parts) == 2000
    assert len(set().union(*map(texts, parts))) == 2000
    assert got.info["labels"] == ["label0", "label1", "label2", "label3"]
    assert got.facts["test"] == got.info["files"]["test"]["examples"] == len(got.test)
    assert sum(got.info["files"]["test"]["labels"].values()) == len(got.test)
    for name in NAMES:
        assert got.info["files"][name]["digest"] == digest_file(got.folder / f"{name}.jsonl")


WORDS = ["pay", "card", "lost", "my", "new", "Pay", "card!"]
ROW = st.tuples(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join), st.sampled_from("xyz"))


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROW, min_size=8, max_size=60), seed=st.integers(0, 99), share=st.sampled_from([0.3, 0.5, 1.0]))
def test_laws_of_any_data(
    rows: list[tuple[str, str]], seed: int, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("law")
    data: dict[str, Any] = {"teacher_share": share, "gold": Gold(per_label=2), "overlap": Overlap(near_duplicate=0.6)}
    try:
        got = run(folder, rows, **data)
    except DataError as error:
        event("refused")
        assert error.hint
        return
    event("prepared")
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    assert run(folder, shuffled, **data).bytes() == got.bytes()
    train = got.teacher + got.pool
    evaluation = {normalise(e.text) for e in got.validation + got.test}
    assert not evaluation & {normalise(e.text) for e in train}
    assert not {normalise(e.text) for e in got.validation} & {normalise(e.text) for e in got.test}
    assert not {normalise(e.text) for e in got.teacher} & {normalise(e.text) for e in got.pool}
    assert texts(got.gold) <= texts(got.teacher)
    assert texts(got.oracle) == texts(got.gold) | texts(got.pool)
    assert all(e.answer is None for e in got.pool)
    assert all(e.answer is not None for e in got.oracle)
    assert len({e.id for e in train}) == len(train)


def test_a_prompt_stays_in_its_split_when_rows_are_added(tmp_path: Path) -> None:
    small, large = run(tmp_path, rows_of(300)), run(tmp_path, rows_of(900))
    assert texts(small.test) <= texts(large.test)
    assert texts(small.validation) <= texts(large.validation)


def test_leaks_leave_the_training_side_and_are_shown(tmp_path: Path) -> None:
    long = "please tell me how i can change the pin of my new card today"
    rows = {
        "train": [*rows_of(20), ["Row3t?", "label0"], [long + " thanks", "label1"], ["say row row 1 now", "label1"]],
        "val": [*rows_of(4, tag="v"), ["row3T!", "label0"], ["only here", "label2"]],
        "test": [*rows_of(8, tag="t"), ["row3t", "label0"], [long, "label1"], ["then say row row 1", "label1"]],
    }
    got = run(tmp_path, rows, overlap=Overlap(near_duplicate=0.8, ngram=4))
    assert got.removed() == {"train_exact": 1, "train_near": 1, "train_ngram": 1, "validation_exact": 1}
    assert got.info["removed"]["train_near"]["examples"] == [[long, long + " thanks", pytest.approx(12 / 13, abs=1e-4)]]
    assert (len(got.test), len(got.validation), len(got.teacher)) == (11, 5, 20)
    assert any("near copies" in line for line in got.lines)
    with pytest.raises(LeakError, match="1 train examples are exact copies") as caught:
        run(tmp_path, rows, strict=True)
    assert caught.value.hint


def test_copies_are_merged_and_the_majority_wins(tmp_path: Path) -> None:
    copies = [
        ["same", "label1"],
        ["same", "label2"],
        ["same", "label2"],
        ["same", ""],
        ["tie", "label3"],
        ["tie", "label0"],
    ]
    rows = {"train": rows_of(8) + copies, "test": rows_of(4, tag="t")}
    got = run(tmp_path, rows, splits=Splits(validation=0.0))
    answers = {e.text: e.answer for e in got.teacher}
    assert (answers["same"], answers["tie"]) == ("label2", "label0")
    assert got.removed() == {"conflict": 2, "duplicate": 4}
    assert got.info["removed"]["conflict"]["examples"][0][1].endswith(("→ label1", "→ label3"))


def test_shares_of_teacher_and_gold_are_per_label(tmp_path: Path) -> None:
    rows = {"train": [*rows_of(80), ["prompt only", ""]], "test": rows_of(8, tag="t")}
    named = Splits(validation=0.0)
    got = run(tmp_path, rows, splits=named, teacher_share=0.5, gold=Gold(per_label=3))
    counts = got.info["files"]
    assert set(counts["teacher"]["labels"].values()) == {10}
    assert set(counts["gold"]["labels"].values()) == {3}
    assert (len(got.pool), len(got.oracle)) == (41, 52)
    assert "prompt only" in texts(got.pool)
    assert b"label" not in (got.folder / "pool.jsonl").read_bytes()

    without = run(tmp_path, rows, splits=named, teacher=False, gold=Gold(total=20))
    assert (len(without.teacher), len(without.gold), len(without.pool), len(without.oracle)) == (0, 20, 61, 80)
    everything = run(tmp_path, rows, splits=named)
    assert (len(everything.teacher), len(everything.gold), len(everything.pool)) == (80, 80, 1)
    none = run(tmp_path, rows, splits=named, gold=Gold(per_label=0), teacher_share=0.5)
    assert (len(none.gold), len(none.pool)) == (0, 41)
    few = run(tmp_path, rows, splits=named, max_examples=30)
    assert len(few.teacher) + len(few.pool) == 30
    assert few.removed() == {"limit": 51}


def test_an_empty_pool_is_said(tmp_path: Path) -> None:
    rows = {"train": rows_of(20), "test": rows_of(4, tag="t")}
    assert any("pool is empty" in line for line in run(tmp_path, rows, gold=Gold(total=4)).lines)


def test_instruction_and_labels_are_put_in_form(tmp_path: Path) -> None:
    rows = {"train": [["a b c", " x "], ["d e f", "y"]], "test": [["g h i", "x"]]}
    got = run(
        tmp_path, rows, Task(type="classification", instruction="Name the intent."), splits=Splits(validation=0.0)
    )
    assert [m.role for m in got.test[0].prompt] == ["system", "user"]
    assert got.info["labels"] == ["x", "y"]
    assert got.info["files"]["test"]["longest_prompt_characters"] == len("Name the intent.") + 5


def test_the_same_question_about_another_document_is_no_leak(tmp_path: Path) -> None:
    def row(document: str) -> dict[str, str]:
        return {"s": document, "q": "who wrote this", "a": "me"}

    rows = {"train": [row("one"), row("two")], "test": [row("three"), row("two")]}
    columns = Columns(prompt="q", answer="a", system="s")
    got = run(tmp_path, rows, Task(type="chat"), columns=columns, splits=Splits(validation=0.0))
    assert got.removed() == {"train_exact": 1}


def test_out_of_scope_may_be_missing_in_training(tmp_path: Path) -> None:
    rows = {"train": rows_of(8), "test": [*rows_of(4, tag="t"), ["what is love", "oos"]]}
    got = run(tmp_path, rows, Task(type="classification", out_of_scope="oos"))
    assert got.info["labels"][-1] == "oos"


def test_labels_that_training_lacks_are_told_or_refused(tmp_path: Path) -> None:
    task = Task(type="classification", labels=("label0", "label1", "label2", "label3", "never"))
    rows = {"train": rows_of(8), "test": rows_of(4, tag="t")}
    got = run(tmp_path, rows, task)
    assert got.info["labels_without_examples"] == ["never"]
    with pytest.raises(DataError, match="never"):
        run(tmp_path, rows, task, strict=True)


def test_prompts_alone_do_for_a_teacher_that_exists(tmp_path: Path) -> None:
    rows = {"train": [[text, ""] for text, _ in rows_of(8)], "test": rows_of(4, tag="t")}
    task = Task(type="classification", labels=("label0", "label1", "label2", "label3"))
    got = run(tmp_path, rows, task, teacher=False)
    assert (len(got.pool), len(got.gold)) == (8, 0)


def test_extraction_answers_get_one_form(tmp_path: Path) -> None:
    rows = {
        "train": [["a", '{"name":"x","arguments":{"b":"ü"}}'], ["b", {"name": "y"}]],
        "test": [["c d", '{ "name" : "x" }']],
    }
    got = run(tmp_path, rows, Task(type="extraction"), splits=Splits(validation=0.0))
    assert {e.answer for e in got.teacher} == {'{"name": "x", "arguments": {"b": "ü"}}', '{"name": "y"}'}
    assert got.test[0].answer == '{"name": "x"}'


OK = {"train": rows_of(8), "test": rows_of(4, tag="t")}
BAD: list[tuple[str, Any, Task, dict[str, Any], str]] = [
    ("one class", {"train": rows_of(8, 1), "test": rows_of(4, 1, "t")}, CLASSES, {}, "one label only: 'label0'"),
    ("unseen label", {**OK, "test": [["x y", "other"], ["z", "other"]]}, CLASSES, {}, r"test has labels .*: 'other' \(2\)"),
    ("unknown label", OK, Task(type="classification", labels=("label0", "lable1")), {}, "'label1' is not in task.labels"),
    ("no label at all", {**OK, "train": [["a", ""], ["b", ""]]}, CLASSES, {}, "no training row has a label"),
    ("no answer at all", {**OK, "train": [["a", ""], ["b", ""]]}, Task(type="chat"), {}, "no teacher can be trained"),
    ("not an object", {"train": [["a", "[1]"]], "test": [["b", "{}"]]}, Task(type="extraction"), {}, "data.json:1: .*it is a list"),
    ("not JSON", {"train": [["a", "{"]], "test": [["b", "{}"]]}, Task(type="extraction"), {}, "not a JSON object"),
    ("all leaked", {"train": [["a b", "x"], ["a  b", "y"]], "test": [["A b.", "x"]]}, CLASSES, {}, "every train example"),
    ("no test", rows_of(3), CLASSES, {}, "no examples for"),
    ("shares over 1", rows_of(9), CLASSES, {"splits": Splits(validation=0.5, test=0.5)}, "nothing for training"),
    ("threshold 0", OK, CLASSES, {"overlap": Overlap(near_duplicate=0.0)}, "near_duplicate"),
    ("gold per label", OK, Task(type="chat"), {"gold": Gold(per_label=2)}, "gold.per_label"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "task", "data", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_data_that_cannot_work_is_refused(
    tmp_path: Path, rows: Any, task: Task, data: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says) as caught:
        run(tmp_path, rows, task, **data)
    assert caught.value.hint
    assert not list(tmp_path.glob("run*/out/*"))
