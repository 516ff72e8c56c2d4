"""data.filter: what is dropped, why, and that nothing of the evaluation data passes."""

from __future__ import annotations

import json

import pytest

from slmops.core.spec import Endpoint, Filters, Overlap, Task
from slmops.data import filter as data_filter
from slmops.engines.stand_in import StandIn
from slmops.errors import DataError, LeakError
from slmops.store.rows import read_rows, write_rows

LABELS = ["refund", "parcel"]
TASK = Task(type="classification")


@pytest.fixture
def answers(tmp_path, example):
    """An answers folder from (text, answer, extra columns) triples."""

    def make(*rows):
        folder = tmp_path / f"answers{len(list(tmp_path.glob('answers*')))}"
        folder.mkdir()
        write_rows(
            folder / "answers.jsonl",
            (
                example(text, answer, "teacher").to_json()
                | {"finished": True, "agreement": 1.0}
                | (extra[0] if extra else {})
                for text, answer, *extra in rows
            ),
        )
        return folder

    return make


def run(ctx, out, data, answered, *, task=TASK, endpoint=None, overlap=None, **filters):
    folder = out()
    params = data_filter.Params(filters=Filters(**filters), task=task, endpoint=endpoint, overlap=overlap or Overlap())
    facts = data_filter.run(params, {"data": data, "answers": answered}, folder, ctx)
    kept = [row["messages"][0]["content"] for row in read_rows(folder / "train.jsonl")]
    why = {row["messages"][0]["content"]: (row["filter"], row["reason"]) for row in read_rows(folder / "dropped.jsonl")}
    return kept, why, json.loads((folder / "stats.json").read_text()), facts


LONG = "please tell me where the blue parcel that I sent to my aunt last week may be by now"


def test_every_filter_says_what_it_dropped_and_why(ctx, out, dataset, answers, example):
    data = dataset(
        {"labels": LABELS},
        gold=[example("I want my money", "refund")],
        validation=[example(LONG, "parcel")],
        test=[example("Where is my box?", "parcel")],
    )
    answered = answers(
        ("give it back", "refund"),
        ("not a label", "banana"),
        ("cut off", "ref", {"finished": False}),
        ("?", "refund"),
        ("far too long " * 9, "refund"),
        ("they differ", "refund", {"agreement": 0.4}),
        ("where is my BOX", "parcel"),
        (LONG + " please", "parcel"),
        ("I want my money!", "refund"),
        ("Give it back!!", "refund"),
        ("send it again", "parcel"),
    )
    kept, why, stats, facts = run(ctx, out, data, answered, min_agreement=0.5, max_characters=100)
    assert kept == ["give it back", "send it again"]
    assert why == {
        "not a label": ("valid", "invalid"),
        "cut off": ("valid", "unfinished"),
        "?": ("length", "too short"),
        "far too long " * 9: ("length", "too long"),
        "they differ": ("agreement", "disagreement"),
        "where is my BOX": ("contamination", "copy of evaluation data"),
        LONG + " please": ("contamination", "nearly the same as evaluation data"),
        "I want my money!": ("duplicate", "copy of gold"),
        "Give it back!!": ("duplicate", "copy of one kept"),
    }
    assert stats["seen"] == 11 == stats["kept"] + stats["dropped"] and stats["labels"] == {"parcel": 1, "refund": 1}
    assert stats["filters"]["contamination"]["dropped"] == 2 == facts["dropped"]["contamination"]
    assert stats["filters"]["duplicate"]["examples"][0]["detail"] == "1.00: I want my money"


def test_parts_of_the_answers_are_read_in_the_order_of_their_numbers(ctx, out, dataset, answers):
    data = dataset({"labels": LABELS})
    folder = out()
    parts = {f"answers.{n}": answers((f"this is message number {n} of many", "refund")) for n in (1, 2, 10)}
    data_filter.run(
        data_filter.Params(task=TASK, filters=Filters(near_duplicate=1)), {"data": data} | parts, folder, ctx
    )
    kept = [row["messages"][0]["content"].split()[4] for row in read_rows(folder / "train.jsonl")]
    assert kept == ["1", "2", "10"]


def test_near_duplicates_of_kept_ones(ctx, out, dataset, answers):
    rows = answers((LONG, "parcel"), (LONG + " please", "parcel"))
    assert run(ctx, out, dataset({"labels": LABELS}), rows, near_duplicate=0.8)[0] == [LONG]
    assert len(run(ctx, out, dataset({"labels": LABELS}), rows, near_duplicate=1.0)[0]) == 2


def test_a_copy_of_a_contaminated_prompt_does_not_hide_behind_it(ctx, out, dataset, answers, example):
    """Contamination is looked at first: what is left is compared among itself."""
    near_test = LONG + " please"
    data = dataset({"labels": LABELS}, test=[example(LONG, "parcel")])
    other = near_test + " do tell me"
    rows = answers((near_test, "parcel"), (other, "parcel"))
    kept, why, _, _ = run(ctx, out, data, rows, near_duplicate=0.8, overlap=Overlap(near_duplicate=0.9))
    assert kept == [other] and why[near_test][0] == "contamination"


def test_shared_runs_of_words(ctx, out, dataset, answers, example):
    data = dataset({"labels": LABELS}, test=[example("my blue parcel did not come on monday", "parcel")])
    rows = answers(("hello my blue parcel did not arrive", "parcel"), ("a green one", "parcel"))
    assert run(ctx, out, data, rows, ngram=5)[1]["hello my blue parcel did not arrive"][0] == "contamination"
    assert len(run(ctx, out, data, rows, ngram=0)[0]) == 2


def test_strict_makes_leaks_an_error(ctx, out, dataset, answers, example):
    data = dataset({"labels": LABELS}, test=[example("where is it", "parcel")])
    rows = answers(("Where is it?", "parcel"), ("other", "refund"))
    ctx.strict = True
    with pytest.raises(LeakError, match="1 prompts of the pool"):
        run(ctx, out, data, rows)
    ctx.strict = False
    assert run(ctx, out, data, rows)[0] == ["other"]


@pytest.mark.parametrize("method", ["sample", "paraphrase", "template"])
def test_a_generated_copy_of_a_test_prompt_is_chance_and_only_dropped(method, ctx, out, dataset, answers, example):
    data = dataset({"labels": LABELS}, test=[example("where is it", "parcel")])
    ctx.strict = True
    kept, why, _, _ = run(ctx, out, data, answers(("Where is it?", "parcel", {"source": method}), ("other", "refund")))
    assert kept == ["other"] and why["Where is it?"][0] == "contamination"


def test_when_nothing_is_left_the_error_shows_an_example(ctx, out, dataset, answers):
    with pytest.raises(DataError, match="`valid` dropped 2, for instance 'banana' to 'one'"):
        run(ctx, out, dataset({"labels": LABELS}), answers(("one", "banana"), ("two", "kiwi")))


def test_no_answers_leave_empty_files(ctx, out, dataset, answers):
    kept, why, stats, _ = run(ctx, out, dataset({"labels": LABELS}), answers())
    assert kept == [] and why == {} and stats["labels_without_examples"] == LABELS


def test_valid_can_be_switched_off(ctx, out, dataset, answers):
    assert run(ctx, out, dataset({"labels": LABELS}), answers(("one", "banana")), valid=False)[0] == ["one"]


def test_function_calls_are_held_against_training_answers(ctx, out, dataset, answers, example):
    taught = [example("t", '{"name": "order", "arguments": {"item": "tea"}}')]
    good, bad = '{"name": "order", "arguments": {"item": "milk"}}', '{"name": "fly", "arguments": {}}'
    rows = answers(("milk please", good), ("fly me", bad))
    kept, why, stats, _ = run(ctx, out, dataset(teacher=taught), rows, task=Task(type="extraction"))
    assert kept == ["milk please"] and why["fly me"] == ("valid", "invalid") and "labels" not in stats


def test_the_judge_has_the_last_word(ctx, out, dataset, answers):
    def verdict(messages):
        text = messages[-1]["content"]
        return "No." if "nonsense" in text else "hm" if "unclear" in text else "Yes"

    rows = answers(("good one", "refund"), ("nonsense", "refund"), ("an unclear one", "parcel"), ("bad label", "x"))
    desk = StandIn(verdict)
    with desk.serve() as url:
        data = dataset({"labels": LABELS})
        kept, why, *_ = run(ctx, out, data, rows, judge=True, endpoint=Endpoint(url=url, model="m"))
        again = run(ctx, out, data, rows, judge=True, endpoint=Endpoint(url=url, model="m"))
    assert kept == ["good one", "an unclear one"] == again[0] and why["nonsense"][0] == "judge"
    assert len(desk.requests) == 3
    assert any("no clear verdict on 1 of 3" in line for line in ctx.progress.lines)


def test_the_same_inputs_give_the_same_bytes(ctx, out, dataset, answers, example):
    data = dataset({"labels": LABELS}, test=[example("t e s t", "refund")])
    rows = answers(*((f"text {n % 7} é\ud800", LABELS[n % 2]) for n in range(20)))
    folders = []
    for _ in range(2):
        folders.append(out())
        data_filter.run(data_filter.Params(task=TASK), {"data": data, "answers": rows}, folders[-1], ctx)
    for name in ("train.jsonl", "dropped.jsonl", "stats.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_planning_stays_light():
    import subprocess
    import sys

    heavy = "('torch', 'numpy', 'httpx', 'transformers', 'sqlite3', 'asyncio')"
    code = "import sys; import slmops.data.generate, slmops.data.answer, slmops.data.filter, slmops.engines.endpoint_address; "
    done = subprocess.run(
        [sys.executable, "-c", code + f"print([m for m in {heavy} if m in sys.modules])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
