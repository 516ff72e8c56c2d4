"""Ternary models: held bit for bit by both runtimes' files, computed as torch does, and other models kept out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.convert import gguf, gguf_names, onnx_genai, onnx_graph
from slmops.convert.rounding import round_matrix, ternary
from slmops.core.method import Context
from slmops.engines import open_engine
from slmops.errors import ConversionError


def made(seed: int, rows: int, columns: int, size: float = 1.0) -> np.ndarray:
    """A matrix with a float16 scale for each 256 weights of a row; some groups are empty."""
    random = np.random.default_rng(seed)
    codes = random.integers(-1, 2, (rows, columns // 256, 256))
    scales = (random.random((rows, columns // 256, 1)) * size).astype(np.float16) * random.integers(
        0, 4, (rows, 1, 1)
    ).clip(0, 1)
    return (codes * scales.astype(np.float32) + 0.0).reshape(rows, columns).astype(np.float32)


@given(st.integers(0, 9999), st.sampled_from([2, 4, 8]), st.sampled_from([32, 128, 256]), st.floats(1e-6, 6e4))
@settings(deadline=None, max_examples=60)
def test_ternary_weights_are_held_bit_for_bit(seed: int, bits: int, block: int, size: float) -> None:
    weights = made(seed, 3, 512, size)
    held = ternary(weights, bits, block)
    assert held is not None
    np.testing.assert_array_equal(held.values().view(np.uint32), weights.view(np.uint32))
    fields = [(held.packed() >> np.uint8(bits * i)) & np.uint8((1 << bits) - 1) for i in range(8 // bits)]
    np.testing.assert_array_equal(np.stack(fields, -1).reshape(held.codes.shape), held.codes)


def test_the_plain_rule_does_not_hold_them_and_ternary_holds_nothing_else() -> None:
    weights = made(1, 3, 512)
    assert (round_matrix(weights, 4, 32).values() != weights).mean() > 0.2
    for other in (weights * np.float32(1 / 3), weights + (weights > 0) * np.float32(0.25), weights * np.float32(1e6)):
        assert ternary(other, 2, 128) is None


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Callable[..., Path]:
    """A folder of a model whose layers are ternary."""

    def make(kind: str, **changes: Any) -> Path:
        from transformers import AutoModelForCausalLM

        widths = {"hidden_size": 256, "intermediate_size": 512} | ({"head_dim": 64} if kind != "Phi3" else {})
        folder = make_model(kind, **(widths | changes))
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            for number, (name, weight) in enumerate(model.named_parameters()):
                if weight.dim() == 2 and ".layers." in name:
                    weight.copy_(torch.from_numpy(made(number, *weight.shape, size=0.2)))
        model.save_pretrained(folder)
        return folder

    return make


def context(out: Path) -> Context:
    out.mkdir()
    return Context(0, out, out)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tied"), [("Llama", True), ("Qwen3", False), ("Phi3", True), ("Gemma3", True)])
@pytest.mark.parametrize("precision", ["tq1_0", "tq2_0"])
def test_gguf_holds_what_was_trained(
    kind: str, tied: bool, precision: str, model: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """The layers bit for bit; and with the embedding as it was rounded, torch gives the logits of llama.cpp."""
    from safetensors.numpy import load_file
    from transformers import AutoConfig

    source = model(kind, tie_word_embeddings=tied)
    settings = gguf.Params(precision=precision, fidelity_prompts=6)
    facts = gguf.run(settings, {"model": source, "data": data}, tmp_path / "out", context(tmp_path / "out"))
    weights, config = load_file(source / "model.safetensors"), AutoConfig.from_pretrained(source).to_dict()
    name = gguf_names.namer(config)
    tensors = {t.name: t for t in library.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    layers = {n: w for n, w in weights.items() if w.ndim == 2 and ".layers." in n}
    for layer, weight in layers.items():
        layer = layer.removesuffix(".weight")
        stored = tensors[f"{name(layer)}.weight"]
        assert stored.tensor_type.name.lower() == precision
        np.testing.assert_array_equal(
            library.quants.dequantize(stored.data, stored.tensor_type), gguf_names.rows(weight, layer, config)
        )
    assert facts["types"] == {precision: len(layers), "q6_k": 1} | ({} if tied else {"q4_k": 1})
    reference, converted = open_engine(source, kind="torch"), open_engine(tmp_path / "out")
    with torch.no_grad():
        for layer, weight in reference.model.named_parameters():  # type: ignore[attr-defined]
            stored = tensors.get(f"{name(layer.removesuffix('.weight'))}.weight")
            if weight.dim() == 2 and ".layers." not in layer and stored is not None:
                weight.copy_(torch.from_numpy(library.quants.dequantize(stored.data, stored.tensor_type)))
    ids = converted.encode([{"role": "user", "content": "is this the same?"}])
    a, b = reference.logits(ids), converted.logits(ids)
    assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(a)  # llama.cpp rounds the layers' inputs to 8 bits
    assert facts["mean_kl"] < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, "int2"])
@pytest.mark.parametrize("tied", [True, False])
def test_onnx_computes_what_was_trained(
    layers: str | None,
    tied: bool,
    model: Callable[..., Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With inputs in floating point, only the embedding is rounded: torch with that alone gives the same logits."""
    monkeypatch.setattr(onnx_genai, "ACCURACY_LEVEL", 1)
    source = model("Llama", tie_word_embeddings=tied, intermediate_size=768)
    settings = onnx_genai.Params(rounding="ternary", layer_precision=layers, fidelity_prompts=6)
    facts = onnx_genai.run(settings, {"model": source, "data": data}, tmp_path / "out", context(tmp_path / "out"))
    assert not facts["kept_fp32"]
    reference, converted = open_engine(source, kind="torch"), open_engine(tmp_path / "out")
    with torch.no_grad():
        for name, weight in reference.model.named_parameters():  # type: ignore[attr-defined]
            if weight.dim() == 2 and ".layers." not in name:
                weight.copy_(torch.from_numpy(round_matrix(weight.numpy(), 4, 32, search=True).values()))
    ids = converted.encode([{"role": "user", "content": "is this the same?"}])
    a, b = reference.logits(ids), converted.logits(ids)
    assert np.abs(a - b).max() < 1e-3 * np.abs(a).max()


def test_other_models_are_refused_first(
    make_model: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, narrow = make_model("Llama", hidden_size=256, intermediate_size=256), make_model("Llama")
    monkeypatch.setattr(gguf, "export", lambda *_: pytest.fail("written before it was looked at"))
    for source, said in ((plain, "is not ternary"), (narrow, "inputs of a multiple of 256")):
        with pytest.raises(ConversionError, match=said) as caught:
            inputs = {"model": source}
            gguf.run(gguf.Params(precision="tq2_0"), inputs, tmp_path, Context(0, tmp_path, tmp_path))
        assert "q4_0" in caught.value.hint or "256" in caught.value.hint
    with pytest.raises(ConversionError, match="int2 holds ternary layers alone"):
        inputs = {"model": plain, "data": data}
        onnx_genai.run(onnx_genai.Params(layer_precision="int2"), inputs, tmp_path, Context(0, tmp_path, tmp_path))
    assert onnx_graph.TERNARY_BLOCK == 128
