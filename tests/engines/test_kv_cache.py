"""A cache of keys and values in fewer bits: smaller as its type says, close to the full one, refused where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.cli.main import main
from slmops.core.engine import KvCache, Sampling
from slmops.engines import open_engine
from slmops.engines.minimal import write_minimal
from slmops.errors import ModelError, SpecError
from slmops.flow.project import load
from tests.tiny import write_project
from tests.train import bases
from tests.train.conftest import data as data
from tests.train.conftest import tokenizer as tokenizer


@pytest.mark.parametrize(("runtime", "reason"), [("onnx_genai", "in float32"), ("torch", "full precision")])
def test_where_there_is_none_it_is_said(runtime: Any, reason: str, tmp_path: Path) -> None:
    write_minimal(tmp_path, runtime)
    with pytest.raises(ModelError, match=reason) as caught:
        open_engine(tmp_path, kv_cache="q8_0")
    assert "gguf" in caught.value.hint
    assert main(["bench", str(tmp_path), "--kv-cache", "q8_0"]) == 1


@pytest.fixture(scope="module")
def model(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from slmops.convert import gguf
    from slmops.core.method import Context

    base = bases.save("llama", tokenizer, tmp_path_factory.mktemp("base"), hidden=256, context=256)
    out = tmp_path_factory.mktemp("gguf")
    gguf.run(gguf.Params(precision="fp16"), {"model": base}, out, Context(0, out, out))
    return out


@pytest.mark.slow
def test_its_size_is_that_of_the_type_and_what_it_holds_is_near(model: Path) -> None:
    ids = np.random.default_rng(0).integers(10, 300, 200).tolist()
    rows, sizes = {}, {}
    kinds: tuple[KvCache | None, ...] = (None, "f32", "f16", "q8_0", "q4_0")
    for kind in kinds:
        engine: Any = open_engine(model, kv_cache=kind)
        rows[kind] = engine.logits(ids)
        sizes[kind] = engine._lib.llama_state_seq_get_size(engine._context, 0)
        assert len(engine.generate([ids], Sampling(max_new_tokens=5, ignore_end=True))[0].tokens) == 5
        engine.close()
    numbers = 2 * 200 * 2 * 2 * 64  # keys and values, tokens, layers, heads of keys, their size
    for kind, bits in (("f32", 32), ("f16", 16), ("q8_0", 8.5), ("q4_0", 4.5)):
        assert sizes[kind] == pytest.approx(numbers * bits / 8, rel=0.05)
    assert sizes[None] == sizes["f16"] and np.array_equal(rows[None], rows["f16"])
    away = {kind: float(np.abs(rows[kind] - rows["f32"]).mean()) for kind in ("f16", "q8_0", "q4_0")}
    assert 0 < away["f16"] < away["q8_0"] < away["q4_0"] / 5
    assert away["q4_0"] < float(rows["f32"].std()) / 3


@pytest.mark.slow
def test_heads_that_do_not_fit_are_refused_at_once(tmp_path: Path) -> None:
    write_minimal(tmp_path, "llama_cpp")
    open_engine(tmp_path, kv_cache="f32").close()
    with pytest.raises(ModelError, match="heads of size 16 do not fit a cache in q4_0, which has blocks of 32"):
        open_engine(tmp_path, kv_cache="q4_0")


@pytest.mark.slow
def test_bench_runs_each_in_turn(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kv-cache", "f16", "q4_0", "--rounds", "1", "--repeats", "1", "--new", "2", "--prompt", "8", "--json"]
    assert main(["bench", f"m={model}", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["models"]) == ["m, cache f16", "m, cache q4_0"]


def test_a_project_says_how_its_gguf_forms_hold_keys_and_values(tmp_path: Path) -> None:
    project = write_project(tmp_path)
    plain = {step.id: step for step in load(project, ["convert.also=[gguf-q8_0]"]).plan()}
    steps = {step.id: step for step in load(project, ["convert.also=[gguf-q8_0]", "evaluate.kv_cache=q8_0"]).plan()}
    changed = {id for id, step in steps.items() if step != plain[id]}
    assert changed == {"predict-student-gguf-q8_0", "measure", "report"}
    assert steps["predict-student-gguf-q8_0"].params["kv_cache"] == steps["measure"].params["kv_cache"] == "q8_0"
    assert "kv_cache" not in plain["report"].params["evaluate"]
    with pytest.raises(SpecError, match="ONNX Runtime GenAI has no quantised cache on the CPU"):
        load(project, ["evaluate.kv_cache=q8_0"]).plan()
