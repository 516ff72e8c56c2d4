"""GGUF in fewer bits by llama.cpp's own library: the types that come out, and what calibration changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch

from slmops.convert import gguf, gguf_quantize, importance
from slmops.core.method import Context, SilentProgress
from slmops.engines import open_engine
from slmops.engines.minimal import PROMPT, VOCABULARY, write_minimal
from slmops.engines.tokenizer import calibration, load_tokenizer
from slmops.errors import ConversionError, DataError
from slmops.train import network
from tests.train import bases
from tests.train.conftest import data as data
from tests.train.conftest import tokenizer as tokenizer

pytestmark = pytest.mark.slow
FILES = ("data/gold.jsonl",)


@pytest.fixture(scope="module")
def base(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are 256 wide, as k-quants want them."""
    return bases.save("llama", tokenizer, tmp_path_factory.mktemp("base"), hidden=256)


@pytest.fixture(scope="module")
def unlike(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose inputs count very unlike."""
    model = bases.build("llama", len(load_tokenizer(tokenizer)), hidden=256)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.mul_(torch.linspace(0.1, 4, weight.numel()))
    out = tmp_path_factory.mktemp("unlike")
    network.save(model, tokenizer, out)
    return out


def convert(model: Path, data: Path, out: Path, **params: Any) -> tuple[dict[str, Any], list[str]]:
    out.mkdir()
    progress = SilentProgress()
    settings = gguf.Params(fidelity_prompts=6, **params)
    return gguf.run(
        settings, {"model": model, "data": data}, out, Context(0, out, out, progress=progress)
    ), progress.lines


@pytest.mark.parametrize("kind", ["q2_k", "q3_k_m", "q4_0", "q4_k_m", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"])
def test_every_type_runs_and_is_what_it_is_called(kind: str, base: Path, data: Path, tmp_path: Path) -> None:
    facts, lines = convert(base, data, tmp_path / "out", precision=kind)
    family = kind.removesuffix("_m")
    assert facts["types"].get(family, 0) >= 7 and sum(facts["types"].values()) == 15
    assert lines == []
    found = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert found["template_equal"] == 1.0 and found["positions"] > 6
    assert (
        found["mean_kl"] < {"2": 0.5, "3": 0.2, "4": 0.1, "5": 0.03, "6": 0.01}[kind.strip("iq")[0]]
    )  # random weights
    assert facts["model_bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size


def test_narrow_matrices_take_another_type_and_it_is_said(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    narrow = bases.save("qwen3", tokenizer, tmp_path / "narrow")
    facts, lines = convert(narrow, data, tmp_path / "out", precision="q4_k_m")
    assert "q4_k" not in facts["types"]
    assert len(lines) == 1 and "15 of 15 matrices" in lines[0] and "multiple of 256" in lines[0]


def test_fp32_and_fp16_agree_with_torch(base: Path, data: Path, tmp_path: Path) -> None:
    for precision, most, same in (
        ("fp32", 1e-8, 1.0),
        ("fp16", 1e-5, 0.97),
    ):  # random weights: some tokens are nearly as likely
        facts, _ = convert(base, data, tmp_path / precision, precision=precision)
        assert facts["token_agreement"] >= same and facts["mean_kl"] < most


def test_mean_squares_are_those_of_the_layers_inputs(base: Path, data: Path) -> None:
    found = importance.mean_squares(base, {"data": data}, FILES, 5, 1)
    model = network.load(base)
    seen: list[torch.Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda _layer, args: seen.append(args[0][0]))
    with torch.no_grad():
        for ids in calibration(load_tokenizer(base), {"data": data}, FILES, 5, 128):
            model(torch.tensor([ids]))
    np.testing.assert_allclose(found["model.layers.1.mlp.down_proj"], torch.cat(seen).square().mean(0), rtol=1e-4)
    assert len(found) == 2 * 7 + 1
    with pytest.raises(DataError, match="no example"):
        importance.mean_squares(base, {"data": data}, ("data/nothing.jsonl",), 5, 1)


def test_what_counts_more_is_rounded_better(unlike: Path, data: Path, tmp_path: Path) -> None:
    weights = importance.mean_squares(unlike, {"data": data}, FILES, 20, 1)["model.layers.0.self_attn.q_proj"]
    errors = {}
    for name, files in (("alike", ()), ("weighed", FILES)):
        convert(unlike, data, tmp_path / name, precision="q4_0", files=files)
        reader = library.GGUFReader(tmp_path / name / "model.gguf")
        tensor = next(t for t in reader.tensors if t.name == "blk.0.attn_q.weight")
        values = library.quants.dequantize(tensor.data, tensor.tensor_type)
        whole = tmp_path / f"{name}-whole"
        convert(unlike, data, whole, precision="fp32")
        wanted = next(t for t in library.GGUFReader(whole / "model.gguf").tensors if t.name == tensor.name).data
        errors[name] = float(((values - wanted) ** 2 * weights).sum())
    assert errors["weighed"] < 0.9 * errors["alike"]


def test_a_refusal_of_the_library_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(ConversionError, match="q4_0") as caught:
        gguf_quantize.quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_0", 1, {})
    assert caught.value.hint and not (tmp_path / "b.gguf").exists()


def test_the_minimal_model_runs(tmp_path: Path) -> None:
    write_minimal(tmp_path, "llama_cpp")
    engine = open_engine(tmp_path)
    ids = engine.encode(PROMPT)
    assert len(ids) == 8 and engine.context_length == 64
    assert engine.logits(ids).shape == (8, VOCABULARY)
    engine.close()
