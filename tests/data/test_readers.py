"""Every format gives the same examples, and every bad file says where and how it is bad."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.core.example import Example
from slmops.core.spec import Columns, Data, Splits
from slmops.data.readers import Record, read, source_files
from slmops.errors import DataError

Write = Callable[[str, Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8", newline="")
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        else:
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return path

    return put


def train(path: Path, **kwargs: Any) -> list[Record]:
    return read(Data(path=str(path), **kwargs)).splits["train"]


def pairs(records: list[Record]) -> list[tuple[str, str | None]]:
    return [(r.example.text, r.example.answer) for r in records]


def turns(record: Record) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in record.example.prompt]


ROWS = [("where is my card?", "card"), ('say "hi", naïve – 日本', "greet")]
COLUMNS = Columns(prompt="text", answer="label")


@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        (
            "a.jsonl",
            [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]} for p, a in ROWS],
            {},
        ),
        ("a.json", [{"instruction": p, "input": "", "output": a} for p, a in ROWS], {}),
        (
            "a.jsonl",
            [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": a}]} for p, a in ROWS],
            {},
        ),
        ("a.jsonl", [{"prompt": p, "completion": a} for p, a in ROWS], {}),
        ("a.jsonl", [{"id": 1, "text": p, "label": a} for p, a in ROWS], {"columns": COLUMNS}),
        ("a.jsonl", [{"id": 1, "text": p, "label": a} for p, a in ROWS], {}),
        ("a.json", [{"text": p, "label": a} for p, a in ROWS], {"format": "json"}),
        ("a.json", [[p, a] for p, a in ROWS], {"columns": Columns(prompt=0, answer=1)}),
        ("a.json", {"version": "2", "data": [[p, a] for p, a in ROWS]}, {"columns": Columns(prompt=0, answer=1)}),
        ("a.json", "".join(json.dumps({"text": p, "label": a}) + "\n" for p, a in ROWS), {}),
        ("a.txt", "".join(json.dumps({"prompt": p, "completion": a}) + "\n" for p, a in ROWS), {"format": "prompt_completion"}),
        ("a.csv", 'text,label\r\nwhere is my card?,card\r\n"say ""hi"", naïve – 日本",greet\r\n', {}),
        ("a.csv", b'\xef\xbb\xbftext,label\n' + 'where is my card?,card\n\n"say ""hi"", naïve – 日本",greet'.encode(), {}),
        ("a.csv", 'where is my card?,card\n"say ""hi"", naïve – 日本",greet\n', {"columns": Columns(prompt=0, answer=1)}),
        ("a.tsv", 'text\tlabel\nwhere is my card?\tcard\nsay "hi", naïve – 日本\tgreet\n', {}),
        ("a.tsv", 'text\tlabel\r\nwhere is my card?\tcard\r\n"say ""hi"", naïve – 日本"\tgreet\r\n', {}),
        ("a.dat", 'text\tlabel\nwhere is my card?\tcard\nsay "hi", naïve – 日本\tgreet\n', {"format": "tsv"}),
    ],
)  # fmt: skip
def test_every_format_reads_the_same(write: Write, name: str, content: Any, settings: dict[str, Any]) -> None:
    assert pairs(train(write(name, content), **settings)) == ROWS


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1).filter(lambda t: bool(t.strip()))


@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
def test_csv_and_json_round_trip(rows: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("x")
    with (folder / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    (folder / "b.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert pairs(train(folder / "a.csv", columns=COLUMNS)) == rows
    assert pairs(train(folder / "b.json", columns=Columns(prompt=0, answer=1))) == rows


def test_canonical_rows_come_back_as_they_were(write: Write) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": '{"name": "weather"}'},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "It is sunny."},
        ]
    }
    (record,) = train(write("a.jsonl", [row]))
    assert record.example.messages() == row["messages"]
    assert Example.from_json(record.example.to_json()) == record.example
    assert (record.example.origin, record.example.source, record.line) == ("gold", "a.jsonl", 1)


def test_other_names_of_roles_parts_and_tool_calls(write: Write) -> None:
    call = {"type": "function", "function": {"name": "go", "arguments": '{"to": "Zürich"}'}}
    rows = [
        {
            "messages": [
                {"role": "developer", "content": "d"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ]
        }
    ]
    (record,) = train(write("a.jsonl", rows))
    assert turns(record) == [("system", "d"), ("user", "ab")]
    assert record.example.answer == '{"name": "go", "arguments": {"to": "Zürich"}}'


def test_alpaca_input_system_and_history(write: Write) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "s", "history": [["q", "a"]]}
    (record,) = train(write("a.json", [row]))
    assert turns(record) == [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "Add.\n\n1 2")]


def test_context_and_system_columns(write: Write) -> None:
    path = write("a.csv", "doc,q,a,sys\nCats purr.,Who purrs?,cats,Be brief.\n,Who?,me,\n")
    columns = Columns(prompt="q", answer="a", context="doc", system="sys")
    first, second = train(path, columns=columns)
    assert turns(first) == [("system", "Be brief."), ("user", "Cats purr.\n\nWho purrs?")]
    assert turns(second) == [("user", "Who?")]


def test_an_object_as_answer_is_one_line_of_json(write: Write) -> None:
    rows = [{"text": "go", "call": {"name": "x", "arguments": {"b": 1, "a": "ü"}}}, {"text": "n", "call": 5}]
    records = train(write("a.jsonl", rows), columns=Columns(prompt="text", answer="call"))
    assert [r.example.answer for r in records] == ['{"name": "x", "arguments": {"b": 1, "a": "ü"}}', "5"]


def test_rows_without_answers_are_prompts_for_the_teacher(write: Write) -> None:
    records = train(write("a.csv", "text,label\na b,x\nc d,\n"))
    assert pairs(records) == [("a b", "x"), ("c d", None)]
    assert records[1].example.origin == "none"
    (record,) = train(write("b.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}]))
    assert record.example.answer is None


def test_lines_are_those_of_the_file(write: Write) -> None:
    assert [r.line for r in train(write("a.csv", 'text,label\n"a\nb",x\n\nc,y\n'))] == [2, 5]
    assert [
        r.line for r in train(write("a.jsonl", '\n{"text": "a", "label": "x"}\n\n{"text": "b", "label": "y"}'))
    ] == [2, 4]
    text = '{"n": 1, "train": [\n{"text": "a",\n "label": "x"},\n {"text": "b", "label": "y"}]}'
    assert [r.line for r in train(write("a.json", text))] == [2, 4]


def test_splits_by_usual_names(write: Write) -> None:
    write("d/train.csv", "text,label\na,x\n")
    write("d/dev.tsv", "text\tlabel\nb\tx\n")
    path = write("d/test.jsonl", [{"text": "c", "label": "x"}]).parent
    write("d/README.md", "not data")
    reading = read(Data(path=str(path)))
    assert {k: pairs(v) for k, v in reading.splits.items()} == {
        "train": [("a", "x")],
        "validation": [("b", "x")],
        "test": [("c", "x")],
    }
    assert reading.columns == {"prompt": "text", "answer": "label"}
    assert [p.name for p in source_files(Data(path=str(path)))] == ["dev.tsv", "test.jsonl", "train.csv"]


def test_splits_by_keys_of_a_json_file(write: Write) -> None:
    path = write("a.json", {"oos_test": [["d", "o"]], "train": [["a", "x"]], "oos": [["b", "o"]], "test": [["c", "x"]]})
    data = Data(
        path=str(path),
        columns=Columns(prompt=0, answer=1),
        splits=Splits(train=("train", "oos"), test=("test", "oos_test"), validation=0.2),
    )
    reading = read(data)
    assert {k: pairs(v) for k, v in reading.splits.items()} == {
        "train": [("a", "x"), ("b", "o")],
        "test": [("c", "x"), ("d", "o")],
    }
    assert reading.splits["test"][1].example.source == "a.json:oos_test"


def test_splits_by_files_in_and_beside_the_path(write: Write) -> None:
    first = write("d/big.csv", "text,label\na,x\n")
    write("d/small.csv", "text,label\nb,x\n")
    beside = Data(path=str(first), splits=Splits(test=("small.csv",)))
    inside = Data(path=str(first.parent), splits=Splits(train=("big",), test=("small.csv",)))
    for data in (beside, inside):
        assert {k: pairs(v) for k, v in read(data).splits.items()} == {"train": [("a", "x")], "test": [("b", "x")]}
        assert [p.name for p in source_files(data)] == ["big.csv", "small.csv"]


BAD: list[tuple[str, str, Any, dict[str, Any], str, int | None]] = [
    ("missing file", "", None, {}, "no such file", None),
    ("empty file", "a.jsonl", "\n \n", {}, "empty", None),
    ("header only", "a.csv", "text,label\n", {}, "no rows for train", None),
    ("bad JSON line", "a.jsonl", '{"text": "a", "label": "b"}\n' * 16 + '{"text": "a" "label"}\n', {}, "bad JSON at column 14", 17),
    ("bad JSON file", "a.json", '[\n["a", "b"],\n["a" "b"]]', {}, "bad JSON", 3),
    ("cut JSON file", "a.json", '{"train": [["a", "b"]', {}, "ends early", 1),
    ("two JSON values", "a.json", '[["a", "b"]] []', {}, "after the end", 1),
    ("NaN", "a.jsonl", '{"text": "a", "label": NaN}', {}, "NaN is not JSON", 1),
    ("key twice", "a.jsonl", '{"text": "a", "text": "b"}', {}, "stands twice", 1),
    ("scalar rows", "a.json", '["a", "b"]', {}, "2 bad rows", 1),
    ("no rows at all", "a.json", '{"a": 1}', {}, "no list of rows", None),
    ("Latin-1", "a.csv", b"text,label\nok,x\ncaf\xe9,y\n", {}, "byte 0xe9 at position 19 is not UTF-8", 3),
    ("Latin-1 after a mark", "a.csv", b"\xef\xbb\xbftext,label\ncaf\xe9,y\n", {}, "byte 0xe9 at position 17", 2),
    ("UTF-16", "a.csv", "text,label\n".encode("utf-16"), {}, "UTF-16", None),
    ("NUL byte", "a.csv", b"text,label\na\0b,x\n", {}, "NUL", 2),
    ("NUL in JSON", "a.jsonl", '{"text": "a\\u0000", "label": "x"}', {}, "NUL", 1),
    ("half a surrogate", "a.jsonl", '{"text": "a\\ud800", "label": "x"}', {}, "surrogate", 1),
    ("column twice", "a.csv", "text,label,text\na,b,c\n", {}, "'text' more than once", 1),
    ("ragged row", "a.csv", "text,label\na,b\nhello, you,b\n", {}, "3 cells where 2", 3),
    ("open quote", "a.csv", 'text,label\n"a,b\nc,d\n', {}, "bad CSV", 2),
    ("unknown column", "a.csv", "text,label\na,b\n", {"columns": Columns(prompt="txt", answer="label")}, "no column 'txt'", 2),
    ("unknown answer column", "a.jsonl", [{"text": "a", "l": "b"}], {"columns": Columns(prompt="text", answer="label")}, "'label'", 1),
    ("names for lists", "a.json", [["a", "b"]], {"columns": Columns(prompt="a")}, "rows are lists", 2),
    ("position too high", "a.json", [["a", "b"]], {"columns": Columns(prompt=0, answer=2)}, "no column 2", 2),
    ("lists without mapping", "a.json", [["a", "b"]], {}, "the rows are lists", 2),
    ("no prompt column", "a.csv", "x,y\na,b\n", {}, "cannot tell which column", 2),
    ("empty prompt", "a.csv", "text,label\n  ,b\n", {}, "prompt is empty", 2),
    ("no user", "a.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}], {}, "prompt is empty", 1),
    ("no messages", "a.jsonl", [{"mesages": []}], {"format": "messages"}, "no 'messages'", 1),
    ("unknown role", "a.jsonl", [{"messages": [{"role": "usr", "content": "a"}]}], {}, "unknown role 'usr'", 1),
    ("no content", "a.jsonl", [{"messages": [{"role": "user", "contnt": "a"}]}], {}, "no 'content'", 1),
    ("image", "a.jsonl", [{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}], {}, "image_url", 1),
    ("tools", "a.jsonl", [{"messages": [{"role": "user", "content": "a"}], "tools": [1]}], {}, "'tools'", 1),
    ("late system", "a.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}], {}, "system", 1),
    ("unknown suffix", "a.xlsx", "x", {}, "cannot tell the format", None),
    ("unknown split", "a.json", {"train": [["a", "b"]]}, {"splits": Splits(test=("tset",))}, "'tset', which is not there", None),
    ("split twice", "a.json", {"train": [["a", "b"]], "b": []}, {"splits": Splits(train=("b",), test=("b",))}, "twice", None),
    ("no train", "a.json", {"a": [["a", "b"]], "b": [["a", "b"]]}, {}, "which part is for training", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "settings", "says", "line"), [row[1:] for row in BAD], ids=[r[0] for r in BAD]
)
def test_bad_files_say_what_and_where(
    write: Write, tmp_path: Path, name: str, content: Any, settings: dict[str, Any], says: str, line: int | None
) -> None:
    path = write(name, content) if name else tmp_path / "nothing.csv"
    with pytest.raises(DataError) as caught:
        read(Data(path=str(path), **settings))
    assert says in str(caught.value)
    assert caught.value.hint
    assert caught.value.line == line
    assert caught.value.exit_code == 2


def test_misspelt_names_are_suggested(write: Write) -> None:
    path = write("a.csv", "utterance,intent\na,b\n")
    with pytest.raises(DataError) as caught:
        train(path, columns=Columns(prompt="uterance", answer="intent"))
    assert "did you mean 'utterance'?" in caught.value.hint
    with pytest.raises(DataError) as caught:
        train(path.with_name("b.csv"))
    assert "did you mean 'a.csv'?" in caught.value.hint


def test_evaluation_rows_need_an_answer(write: Write) -> None:
    path = write("a.json", {"train": [["a", "b"]], "test": [["a", ""]]})
    with pytest.raises(DataError, match="no answer"):
        train(path, columns=Columns(prompt=0, answer=1))


def test_bad_rows_come_together_up_to_twenty(write: Write) -> None:
    with pytest.raises(DataError) as caught:
        train(write("a.csv", "text,label\n" + ",x\n" * 3 + "ok,x\n" + "a,b,c\n"))
    assert "4 bad rows" in str(caught.value)
    assert all(f"a.csv:{n}: " in str(caught.value) for n in (2, 3, 4, 6))
    with pytest.raises(DataError) as caught:
        train(write("a.jsonl", "{\n" * 500))
    assert "20 bad rows (reading stopped" in str(caught.value)


def test_folders_of_datasets_and_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra `hub`")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    part = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    wanted = [("a", "yes"), ("b", "no"), ("c", None)]
    datasets.DatasetDict({"train": part, "test": part.select([0])}).save_to_disk(tmp_path / "saved")
    part.save_to_disk(tmp_path / "single")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    part.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet")
    part.select([0]).to_parquet(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet")
    part.select([1]).to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")

    saved = read(Data(path=str(tmp_path / "saved")))
    assert pairs(saved.splits["train"]) == wanted
    assert pairs(saved.splits["test"]) == [("a", "yes")]
    assert saved.splits["train"][1].file.endswith("(train) row 2")
    assert pairs(train(tmp_path / "single", format="huggingface")) == wanted
    hub = Data(path=str(tmp_path / "hub"), splits=Splits(train=("train",), test=("test",)))
    assert pairs(read(hub).splits["train"]) == [*wanted, ("a", "yes")]
    assert pairs(read(Data(path=str(tmp_path / "hub"))).splits["test"]) == [("b", "no")]
    assert len(source_files(hub)) == 3
    with pytest.raises(DataError, match="Parquet"):
        (tmp_path / "x.parquet").write_text("no")
        train(tmp_path / "x.parquet")


def test_a_source_under_another_name_is_read_by_the_name_in_the_file(write: Write) -> None:
    blob = write("blob", "text,label\na,x\n")
    (record,) = read(Data(path="data/train.csv"), blob).splits["train"]
    assert (record.file, record.example.source) == ("data/train.csv", "train.csv")
