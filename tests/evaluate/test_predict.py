from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmops.core.method import Context, SilentProgress
from slmops.engines.minimal import write_minimal
from slmops.errors import DataError
from slmops.evaluate import predict
from slmops.evaluate.predict import Params, read_split, read_test


def write_rows(folder: Path, *contents: str) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [
        {"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "gold"}], "origin": "gold"}
        for c in contents
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.mark.parametrize("runtime", ["torch", "onnx_genai"])
def test_every_example_gets_a_row(tmp_path: Path, runtime: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_minimal(model, runtime)  # type: ignore[arg-type]
    data = write_rows(tmp_path / "data", "zwei", "eins", "x" * 200, "drei")
    progress = SilentProgress()
    results = []
    for name in ("a", "b"):
        out = tmp_path / name
        out.mkdir()
        context = Context(seed=0, scratch=tmp_path, shared=tmp_path, progress=progress)
        facts = predict.run(Params(max_new_tokens=5), {"model": model, "data": data}, out, context)
        results.append((out / "predictions.jsonl").read_bytes())
    assert results[0] == results[1]
    rows = [json.loads(line) for line in results[0].decode().splitlines()]
    assert [r["prompt"] for r in rows] == ["zwei", "eins", "x" * 200, "drei"]
    assert all(r["gold"] == "gold" for r in rows)
    long = rows[2]
    assert (long["answer"], long["finished"], long["tokens"]) == ("", False, 0)
    assert facts["too_long"] == 1 and facts["examples"] == 4
    assert any("do not fit" in line for line in progress.lines)


def test_a_part_is_chosen_by_digest_and_keeps_its_order(tmp_path: Path) -> None:
    words = [f"message {i}" for i in range(30)]
    some = [e.text for e in read_test(write_rows(tmp_path / "a", *words), 7)]
    turned = [e.text for e in read_test(write_rows(tmp_path / "b", *reversed(words)), 7)]
    assert set(some) == set(turned) and len(some) == 7
    assert some == [w for w in words if w in some]


def test_bad_test_data_is_an_error_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no test split"):
        read_test(tmp_path, None)
    (tmp_path / "test.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        read_test(tmp_path, None)
    (tmp_path / "test.jsonl").write_text('\n{"messages": [{"role": "user", "content": "no label"}]}\n')
    with pytest.raises(DataError, match=r"test\.jsonl:2: .*no answer"):
        read_test(tmp_path, None)


def test_a_search_asks_for_validation_data_and_gets_nothing_else(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_minimal(model, "onnx_genai")
    data = write_rows(tmp_path / "data", "in validation")
    (data / "test.jsonl").rename(data / "validation.jsonl")
    (tmp_path / "out").mkdir()
    context = Context(seed=0, scratch=tmp_path, shared=tmp_path)
    predict.run(Params(max_new_tokens=2, split="validation"), {"model": model, "data": data}, tmp_path / "out", context)
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in rows] == ["in validation"]
    with pytest.raises(DataError, match="no test split"):
        predict.run(Params(), {"model": model, "data": data}, tmp_path / "out", context)
    with pytest.raises(DataError, match="no validation split"):
        read_split(tmp_path, "validation", None)
