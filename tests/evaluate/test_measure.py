from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmops.core.method import Context
from slmops.engines.minimal import write_minimal
from slmops.errors import ModelError, UsageError
from slmops.evaluate import measure
from slmops.evaluate.measure import Params, rotate, sizes


def write_rows(folder: Path, *contents: str) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"messages": [{"role": "user", "content": c}, {"role": "assistant", "content": "gold"}]} for c in contents]
    (folder / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_minimal(folder, "onnx_genai")
    (folder / "fidelity.json").write_text("{}")
    return folder


def run(params: Params, inputs: dict[str, Path], out: Path) -> dict[str, object]:
    out.mkdir()
    return measure.run(params, inputs, out, Context(seed=0, scratch=out.parent, shared=out.parent))


@pytest.mark.slow
def test_variants_are_measured_on_the_same_prompts(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", "one", "two", "x" * 100, "three")
    params = Params(variants={"a": "onnx_genai", "b": "onnx_genai"}, rounds=2, prompts=4, max_new_tokens=3)
    run(params, {"data": data, "model.a": model, "model.b": model}, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "measurement.json").read_text())
    assert found["order"] == [["a", "b"], ["b", "a"]]
    assert len(found["prompt_ids"]) == 3 and len(found["left_out"]) == 1
    for variant in found["variants"].values():
        assert len(variant["rounds"]) == 2
        assert len(variant["total_s"]) == len(variant["first_token_s"]) == len(variant["tokens"]) == 3
        assert all(0 < f <= t for f, t in zip(variant["first_token_s"], variant["total_s"], strict=True))
        for one in variant["rounds"]:
            assert one["import_bytes"] < one["baseline_bytes"]
            over = one["peak_bytes"] - one["baseline_bytes"]
            assert abs(over) < 3_000_000, "the minimal model measured against itself holds next to nothing"
        assert variant["model_bytes"] == (model / "model.onnx").stat().st_size
        assert "fidelity.json" not in variant["files"]
    assert found["environment"]["cores"] >= 1 and found["environment"]["packages"]["onnxruntime-genai"]


def test_a_process_that_fails_is_an_error_with_its_words(model: Path, tmp_path: Path) -> None:
    job = {"threads": 1, "max_new_tokens": 1, "warmup": 0, "prompts": []}
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "genai_config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        measure.fresh(job, broken, "onnx_genai", tmp_path)
    with pytest.raises(ModelError, match="ended with 1: KeyError"):
        measure.fresh({"threads": 1}, model, "onnx_genai", tmp_path)


def test_what_cannot_be_measured_is_refused_first(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", "one")
    with pytest.raises(UsageError, match=r"no input model\.a"):
        run(Params(variants={"a": "onnx_genai"}), {"data": data}, tmp_path / "1")
    with pytest.raises(ModelError, match="a is not a model for torch"):
        run(Params(variants={"a": "torch"}), {"data": data, "model.a": model}, tmp_path / "2")
    with pytest.raises(UsageError, match="nothing to measure"):
        run(Params(variants={}), {"data": data}, tmp_path / "3")


def test_every_variant_starts_a_round_once() -> None:
    orders = rotate(["a", "b", "c"], 4)
    assert [o[0] for o in orders] == ["a", "b", "c", "a"]
    assert all(sorted(o) == ["a", "b", "c"] for o in orders)


def test_sizes_tell_the_model_from_its_folder(tmp_path: Path) -> None:
    for name, size in {"model.onnx": 10, "model.onnx.data": 100, "tokenizer.json": 5, "fidelity.json": 7}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert sizes(tmp_path)["model_bytes"] == 110
    assert set(sizes(tmp_path)["files"]) == {"model.onnx", "model.onnx.data", "tokenizer.json"}
