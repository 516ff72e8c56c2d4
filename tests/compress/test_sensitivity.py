"""Sensitivity and widths: harms against a plain computation, the choice against all choices, the real file against the bound."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from slmops.compress import sensitivity
from slmops.convert.rounding import round_matrix
from slmops.core import widths as core
from slmops.core.method import Context, SilentProgress
from slmops.engines.tokenizer import load_tokenizer, rendered
from slmops.errors import CompressionError
from slmops.store.rows import read_examples
from tests.compress.test_awq import uneven
from tests.train import bases


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=3, max_size=3), min_size=1, max_size=5
    ),
    st.integers(0, 40),
)
@settings(max_examples=300, deadline=None)
def test_the_choice_is_the_best_of_all(rows: list[list[tuple[int, int]]], bound: int) -> None:
    options = {
        f"{n}": {b: core.Option(size, float(harm)) for b, (size, harm) in zip(core.WIDTHS, row, strict=True)}
        for n, row in enumerate(rows)
    }
    found = core.choose(options, bound)
    every = []
    for trial in itertools.product(core.WIDTHS, repeat=len(rows)):
        picked = [options[unit][bits] for unit, bits in zip(options, trial, strict=True)]
        if sum(o.bytes for o in picked) <= bound:
            every.append((sum(o.harm for o in picked), sum(o.bytes for o in picked)))
    if not every:
        assert found is None
    else:
        assert found is not None and list(found) == list(options)
        mine = [options[unit][bits] for unit, bits in found.items()]
        assert (sum(o.harm for o in mine), sum(o.bytes for o in mine)) == min(every)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "11.qkv"), ("/model/layers.11/attn/qkv_proj/MatMul", "11.qkv"),
        ("layers.0.self_attn.o_proj", "0.o"), ("/model/layers.0/mlp/gate_up_proj/MatMul", "0.gate_up"),
        ("model.layers.3.mlp.up_proj", "3.gate_up"), ("/model/layers.3/mlp/down_proj/MatMul", "3.down"),
        ("model.embed_tokens.weight", "table"), ("/lm_head/MatMul", "table"), ("model.norm", None), ("layers.3.mlp.router", None),
    ],
)  # fmt: skip
def test_names_of_both_forms_lead_to_the_same_unit(name: str, unit: str | None) -> None:
    assert core.unit_of(name) == unit


def run(model: Path, data: Path, out: Path, file_mb: float, **params: Any) -> dict[str, Any]:
    out.mkdir()
    ctx = Context(0, out, out, progress=SilentProgress())
    files = ("data/gold.jsonl", "data/pool.jsonl")
    given = sensitivity.Params(files=files, file_mb=file_mb, **params)
    facts = sensitivity.run(given, {"model": model, "data": data}, out, ctx)
    return {**facts, "lines": ctx.progress.lines}  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_harm_is_the_divergence_of_answers_with_one_unit_rounded(
    kind: str, tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    whole = uneven(kind, tokenizer, tmp_path / "whole")
    run(whole, data, tmp_path / "out", 1.0, block_size=16)
    table = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert set(table) == {"table"} | {f"{n}.{role}" for n in range(2) for role in core.ROLES}
    before, after = (AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval() for _ in range(2))
    for name, weight in after.named_parameters():
        if core.unit_of(name) == "1.gate_up" and "proj" in name:
            weight.data = torch.from_numpy(round_matrix(weight.detach().numpy(), 2, 16, search=True).values())
    words, total, count = load_tokenizer(tokenizer), 0.0, 0
    for file in ("gold", "pool"):
        for example in read_examples(data / f"{file}.jsonl"):
            prompt, answer = rendered(words, example)
            start = words(prompt, add_special_tokens=False)["input_ids"]
            ids = start + (words(answer, add_special_tokens=False)["input_ids"] if example.answer else [])
            with torch.no_grad():
                p, q = (m(torch.tensor([ids])).logits[0, len(start) - 1 :].log_softmax(-1) for m in (before, after))
            total += float((p.exp() * (p - q)).sum())
            count += len(p)
    assert table["1.gate_up"]["2"]["harm"] == pytest.approx(total / count, rel=0.1)
    for unit in table.values():
        assert unit["8"]["harm"] < unit["4"]["harm"] < unit["2"]["harm"]


def test_a_larger_file_means_less_harm_and_the_table_says_so(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    whole = uneven("llama", tokenizer, tmp_path / "whole")
    with pytest.raises(CompressionError, match="still has") as caught:
        run(whole, data, tmp_path / "none", 0.01)
    assert "convert.file_mb" in caught.value.hint
    least = float(caught.value.hint.split()[3])
    found = [run(whole, data, tmp_path / str(n), least + 0.012 * n, examples=8) for n in range(4)]
    assert [f["harm"] for f in found] == sorted((f["harm"] for f in found), reverse=True)
    assert all(f["bytes_at_most"] <= (least + 0.012 * n) * 1e6 for n, f in enumerate(found))
    assert found[3]["harm"] < found[0]["harm"]
    assert sum(line.count("*") for line in found[1]["lines"]) == 1 + 9  # one in the heading, one for each unit


@pytest.mark.slow
@pytest.mark.parametrize("kind", bases.ARCHITECTURES)
def test_the_real_file_holds_the_bound(kind: str, tokenizer: Path, data: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the extra [convert]")
    from slmops.convert import onnx_genai

    whole = bases.save(kind, tokenizer, tmp_path / "whole")
    facts = run(whole, data, tmp_path / "widths", 0.075)
    chosen = json.loads((tmp_path / "widths" / core.FILE).read_text())
    assert len(set(chosen.values())) > 1
    out = tmp_path / "onnx"
    out.mkdir()
    ctx = Context(0, tmp_path / "scratch", tmp_path)
    inputs = {"model": whole, "data": data, "widths": tmp_path / "widths"}
    made = onnx_genai.run(onnx_genai.Params(file_mb=0.075, fidelity_prompts=4), inputs, out, ctx)
    assert made["model_bytes"] <= facts["bytes_at_most"] <= 75_000
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    bits = sorted(
        a.i for node in graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"
    )
    assert set(bits) == set(chosen.values())
