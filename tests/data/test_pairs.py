"""Preference pairs: every usual shape reads the same, bad pairs say where, and preparing keeps the pairs of a prompt."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from slmops.core.example import Example
from slmops.core.method import Context, SilentProgress
from slmops.core.spec import Columns, Data, Gold, Splits, Task
from slmops.data import prepare
from slmops.data.readers import Record, read
from slmops.errors import DataError

CHAT = Task(type="chat")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, content: Any) -> Path:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def train(path: Path, **settings: Any) -> list[Record]:
    return read(Data(path=str(path), **settings)).splits["train"]


ROW = {"prompt": "why?", "chosen": "because", "rejected": "dunno"}
MAPPED = {"columns": Columns(prompt="q", answer="good", rejected="bad")}
SHAPES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "texts": ("a.jsonl", [ROW], {}),
    "texts, said so": ("a.jsonl", [ROW], {"format": "preference"}),
    "messages": ("a.jsonl", [{"prompt": [user("why?")], "chosen": [says("because")], "rejected": [says("dunno")]}], {}),
    "implicit prompt": (
        "a.jsonl", [{"chosen": [user("why?"), says("because")], "rejected": [user("why?"), says("dunno")]}], {},
    ),
    "prompt and whole conversations": (
        "a.jsonl",
        [{"prompt": "why?", "chosen": [user("why?"), says("because")], "rejected": [user("why?"), says("dunno")], "messages": []}],
        {},
    ),
    "prompt messages and whole conversations": (
        "a.jsonl",
        [{"prompt": [user("why?")], "chosen": [user("why?"), says("because")], "rejected": [user("why?"), says("dunno")]}],
        {},
    ),
    "one message each": ("a.jsonl", [{"prompt": "why?", "chosen": says("because"), "rejected": says("dunno")}], {}),
    "sharegpt ranking": (
        "a.jsonl",
        [{"conversations": [{"from": "human", "value": "why?"}], "chosen": {"from": "gpt", "value": "because"},
          "rejected": {"from": "gpt", "value": "dunno"}}],
        {},
    ),
    "alpaca ranking": ("a.jsonl", [{"instruction": "why?", "input": "", "chosen": "because", "rejected": "dunno"}], {}),
    "another name": ("a.jsonl", [{"question": "why?", "chosen": "because", "rejected": "dunno"}], {}),
    "CSV": ("a.csv", "prompt,chosen,rejected\nwhy?,because,dunno\n", {}),
    "CSV columns": ("a.csv", "q,good,bad\nwhy?,because,dunno\n", MAPPED),
    "CSV columns, said so": ("a.csv", "q,good,bad\nwhy?,because,dunno\n", MAPPED | {"format": "preference"}),
    "positions": ("a.tsv", "why?\tbecause\tdunno\n", {"columns": Columns(prompt=0, answer=1, rejected=2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_reads_the_same(name: str, tmp_path: Path) -> None:
    file, content, settings = SHAPES[name]
    (record,) = train(write(tmp_path / file, content), **settings)
    example = record.example
    assert [(m.role, m.content) for m in example.prompt] == [("user", "why?")]
    assert (example.answer, example.rejected, example.origin) == ("because", "dunno", "gold")
    assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example


def test_system_messages_turns_and_json_answers(tmp_path: Path) -> None:
    before = [{"role": "system", "content": "Be brief."}, user("hi"), says("hello"), user("why?")]
    rows = [
        {"prompt": before, "chosen": [says("a")], "rejected": [says("b")]},
        {"chosen": [*before, says("a")], "rejected": [*before, says("b")]},
        {
            "system": "Be brief.",
            "prompt": "why?",
            "chosen": [*before[1:], says("a")],
            "rejected": [*before[1:], says("b")],
        },
        {
            "system": "Be brief.",
            "prompt": before[1:2],
            "chosen": [*before[2:], says("a")],
            "rejected": [*before[2:], says("b")],
        },
    ]
    for record in train(write(tmp_path / "a.jsonl", rows)):
        assert record.example.prompt_messages() == before
        assert (record.example.answer, record.example.rejected) == ("a", "b")
    (record,) = train(
        write(tmp_path / "b.jsonl", [{"prompt": "go", "chosen": {"name": "x"}, "rejected": {"name": "y"}}])
    )
    assert (record.example.answer, record.example.rejected) == ('{"name": "x"}', '{"name": "y"}')


PAIR = {"format": "preference"}
BAD: list[tuple[str, str, Any, dict[str, Any], str, int | None]] = [
    ("no rejected", "a.jsonl", [ROW, {"prompt": "a", "chosen": "b"}], {}, "no 'rejected' in this row", 2),
    ("no rejected at all", "a.jsonl", [{"prompt": "a", "chosen": "b"}], {}, "no 'rejected' in this row", 1),
    ("no chosen", "a.jsonl", [ROW, {"prompt": "a", "rejected": "b"}], {}, "no 'chosen' in this row", 2),
    ("no chosen at all", "a.jsonl", [{"prompt": "a", "rejected": "b"}], {}, "no 'chosen' in this row", 1),
    ("no pair at all", "a.jsonl", [{"prompt": "a", "completion": "b"}], PAIR, "no 'chosen' in this row", 1),
    ("blank rejected", "a.jsonl", [ROW, ROW | {"rejected": " "}], {}, "the rejected answer is empty", 2),
    ("null chosen", "a.jsonl", [ROW | {"chosen": None}], {}, "the chosen answer is empty", 1),
    ("equal", "a.jsonl", [ROW, ROW, ROW | {"rejected": "because "}], {}, "chosen and the rejected answer are the same", 3),
    ("equal cells", "a.csv", "prompt,chosen,rejected\na,b,c\na,b,b\n", {}, "are the same", 3),
    ("blank cell", "a.csv", "q,good,bad\na,b,c\na,b,\n", MAPPED, "the rejected answer is empty", 3),
    ("no prompt", "a.jsonl", [{"chosen": "b", "rejected": "c"}], {}, "the pair has no prompt", 1),
    ("two beginnings", "a.jsonl", [{"chosen": [user("a"), says("b")], "rejected": [user("x"), says("c")]}], {},
     "differ before their last message", 1),
    ("another prompt", "a.jsonl", [{"prompt": "z", "chosen": [user("a"), says("b")], "rejected": [user("a"), says("c")]}], {},
     "do not begin with the prompt", 1),
    ("ends with the user", "a.jsonl", [{"prompt": "a", "chosen": [says("b")], "rejected": [user("c")]}], {},
     "'rejected' does not end with the assistant", 1),
    ("no message", "a.jsonl", [{"prompt": "a", "chosen": [], "rejected": [says("c")]}], {}, "'chosen' does not end", 1),
    ("no content", "a.jsonl", [{"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "c"}], {}, "no 'content'", 1),
    ("tools", "a.jsonl", [ROW | {"tools": [1]}], {}, "'tools'", 1),
    ("unknown column", "a.csv", "q,good,bd\na,b,c\n", MAPPED, "no column 'bad' (data.columns.rejected)", 2),
    ("rejected alone", "a.csv", "q,bad\na,b\n", {"columns": Columns(prompt="q", rejected="bad")}, "rejected answer alone", 2),
    ("columns without rejected", "a.csv", "q,good\na,b\n", PAIR | {"columns": Columns(prompt="q", answer="good")},
     "names no rejected answer", 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "settings", "message", "line"), [b[1:] for b in BAD], ids=[b[0] for b in BAD]
)
def test_bad_pairs_say_what_and_where(
    name: str, content: Any, settings: dict[str, Any], message: str, line: int | None, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        train(write(tmp_path / name, content), **settings)
    assert message in str(caught.value)
    assert caught.value.hint
    assert caught.value.line == line


def prepared(
    folder: Path, rows: list[dict[str, Any]], task: Task = CHAT, **data: Any
) -> tuple[Path, dict[str, Any], list[str]]:
    folder.mkdir()
    source, out, progress = write(folder / "rows.jsonl", rows), folder / "out", SilentProgress()
    out.mkdir()
    params = prepare.Params(data=Data(path="rows.jsonl", **data), task=task, needs_teacher=False)
    prepare.run(params, {"source": source}, out, Context(0, folder, folder, progress=progress))
    return out, json.loads((out / "info.json").read_text()), progress.lines


def examples(file: Path) -> list[Example]:
    return [Example.from_json(json.loads(line)) for line in file.read_text().splitlines()]


def many(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"alpha{i} beta{i * 7} gamma{i * 13}", "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(count)
    ]


def test_pairs_stay_whole_through_preparing(tmp_path: Path) -> None:
    rows = many(200)
    out, info, _lines = prepared(tmp_path / "a", rows)
    total = 0
    for name in ("gold", "validation", "test"):
        found = examples(out / f"{name}.jsonl")
        assert all(e.rejected == f"bad {(e.answer or '').split()[1]}" for e in found)
        assert info["files"][name]["pairs"] == info["files"][name]["examples"] == len(found) > 5
        total += len(found)
    assert total == 200
    random.Random(1).shuffle(rows)
    again, _, _ = prepared(tmp_path / "b", rows)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in again.iterdir()}


def test_all_different_pairs_of_a_prompt_are_kept_and_copies_merged(tmp_path: Path) -> None:
    def pair(chosen: str, rejected: str) -> dict[str, str]:
        return {"prompt": "same question", "chosen": chosen, "rejected": rejected}

    rows = [
        pair("a", "b"),
        pair("a", "c"),
        pair("a", "b"),
        pair("c", "b"),
        pair("b", "c"),
        pair("b", "c"),
        pair("d", "e"),
        pair("e", "d"),
    ]
    outs = []
    for number in range(2):
        given = [*many(30), *rows][:: 1 - 2 * number]
        out, info, lines = prepared(tmp_path / str(number), given, splits=Splits(validation=0.0))
        kept = {(e.answer, e.rejected) for e in examples(out / "gold.jsonl") if e.text == "same question"}
        assert kept == {("a", "b"), ("a", "c"), ("b", "c"), ("d", "e")}
        assert {k: v["count"] for k, v in info["removed"].items()} == {"duplicate": 4, "conflict": 2}
        assert any("merged 4 copies" in line for line in lines)
        outs.append({f.name: f.read_bytes() for f in out.iterdir()})
    assert outs[0] == outs[1]


def test_what_is_not_gold_is_asked_once(tmp_path: Path) -> None:
    rows = [{"prompt": "one question", "chosen": "a", "rejected": f"b{i}"} for i in range(6)]
    out, _info, _lines = prepared(tmp_path / "a", [*many(20), *rows], gold=Gold(total=0), splits=Splits(validation=0.0))
    pool = examples(out / "pool.jsonl")
    assert [e.text for e in pool].count("one question") == 1
    assert all(e.answer is None and e.rejected is None for e in pool)


def test_answers_in_the_task_s_form(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"alpha{i} beta{i} gamma{i}",
            "chosen": '{"name":"x"}',
            "rejected": ['{"name" : "y"}', "not json"][i % 2],
        }
        for i in range(40)
    ]
    out, _info, _lines = prepared(tmp_path / "a", rows, Task(type="extraction"))
    assert {(e.answer, e.rejected) for e in examples(out / "gold.jsonl")} == {
        ('{"name": "x"}', '{"name": "y"}'),
        ('{"name": "x"}', "not json"),
    }
    rows[7] |= {"rejected": '{"name":   "x"}'}
    with pytest.raises(DataError, match=r"rows.jsonl:8: the chosen and the rejected answer are the same"):
        prepared(tmp_path / "b", rows, Task(type="extraction"))


def test_a_method_that_needs_pairs_is_told_the_rows_without(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", many(30))
    write(tmp_path / "test.jsonl", [{"prompt": "delta epsilon zeta", "completion": "good"}])
    write(tmp_path / "more.jsonl", [{"prompt": "eta theta iota", "completion": ""}])
    given = Data(path="d", splits=Splits(train=("train.jsonl", "more.jsonl"), test=("test.jsonl",), validation=0.0))
    out = tmp_path / "out"
    out.mkdir()
    params = prepare.Params(data=given, task=CHAT, needs_teacher=False, needs_pairs=True)
    context = Context(0, tmp_path, tmp_path)
    prepare.run(params, {"source": tmp_path}, out, context)  # plain test rows and prompts for a teacher are no pairs
    assert len(examples(out / "gold.jsonl")) == 30
    write(tmp_path / "more.jsonl", [{"prompt": "eta theta iota", "completion": "x"}])
    (tmp_path / "again").mkdir()
    with pytest.raises(DataError, match=r"more.jsonl:1: the row has no rejected answer"):
        prepare.run(params, {"source": tmp_path}, tmp_path / "again", context)
