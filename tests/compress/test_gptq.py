"""GPTQ: its numbers against the definition, the grid that converters read back, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from slmops.compress import calibrate, gptq, grid
from slmops.convert.rounding import round_matrix
from slmops.core.method import Context, SilentProgress
from slmops.engines.tokenizer import calibration_texts, load_tokenizer
from slmops.engines.torch_engine import TorchEngine
from slmops.errors import CompressionError, DataError
from slmops.train import network
from tests.train import bases
from tests.train.conftest import examples

FILES = ("data/gold.jsonl", "data/pool.jsonl")


def by_definition(weight: torch.Tensor, found: torch.Tensor, block_size: int, damping: float) -> torch.Tensor:
    """Optimal brain quantisation, column after column: the inverse of what is left is taken anew for each (float64)."""
    diagonal = found.diagonal()
    scale, largest = grid.scales_of(weight.float(), diagonal, block_size)
    full = (found + damping * diagonal.mean().clamp(min=1e-12) * torch.eye(len(found))).double()
    work, out = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    left = diagonal.argsort(descending=True, stable=True).tolist()
    while left:
        inverse = torch.linalg.inv(full[left][:, left])
        i = left[0]
        steps = torch.where(largest[:, i], -8.0, (work[:, i] / scale[:, i].double()).round().clamp(-8, 7))
        out[:, i] = torch.where(scale[:, i] == 0, 0.0, steps * scale[:, i])
        error = (work[:, i] - out[:, i]) / inverse[0, 0]
        work[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return out.float()


def some(seed: int, rows: int, columns: int, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=random) * torch.rand(columns, generator=random)
    inputs = torch.randn(tokens, columns, generator=random) @ mixed
    return torch.randn(rows, columns, generator=random), inputs.T @ inputs / tokens


@pytest.mark.parametrize("columns", [16, 40, 150])
def test_it_is_what_the_definition_says(columns: int) -> None:
    weight, found = some(columns, 6, columns)
    ours, plain = gptq.round_layer(weight, found, 16, 0.01)
    reference = by_definition(weight, found, 16, 0.01)
    same = (ours - reference).abs() < 1e-5
    assert same.float().mean() > 0.98  # a tie between two integers may fall either way, and moves what follows
    assert calibrate.loss(weight, ours, found) == pytest.approx(calibrate.loss(weight, reference, found), rel=0.05)
    assert calibrate.loss(weight, ours, found) < 0.8 * calibrate.loss(weight, plain, found)


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 70), st.sampled_from([16, 32]), st.floats(1e-4, 1e3))
@settings(deadline=None, max_examples=60)
def test_converters_read_the_same_weights_back(seed: int, rows: int, columns: int, block: Any, size: float) -> None:
    weight, found = some(seed, rows, columns, 30)
    if seed % 3 == 0:
        weight[:, : columns // 2] = 0.0
    for rounded in gptq.round_layer(weight * size, found, block, 0.01):
        for search in (False, True):
            np.testing.assert_array_equal(
                round_matrix(rounded.numpy(), 4, block, search=search).values(), rounded.numpy()
            )


def test_gguf_reads_the_same_weights_back() -> None:
    quants = pytest.importorskip("gguf", reason="needs the extra [gguf]").quants
    weight, found = some(1, 8, 96)
    rounded = gptq.round_layer(weight, found, 32, 0.01)[0].numpy()
    kind = quants.GGMLQuantizationType.Q4_0
    np.testing.assert_array_equal(quants.dequantize(quants.quantize(rounded, kind), kind), rounded)


def test_inputs_that_never_come_are_rounded_to_nearest() -> None:
    weight, found = some(2, 6, 32)
    found[5:9] = 0
    found[:, 5:9] = 0
    rounded, plain = gptq.round_layer(weight, found, 32, 0.01)
    assert torch.isfinite(rounded).all()
    torch.testing.assert_close(rounded[:, 5:9], plain[:, 5:9])


def run(model: Path, data: Path, out: Path, **params: Any) -> dict[str, Any]:
    out.mkdir()
    ctx = Context(0, out, out, progress=SilentProgress())
    return gptq.run(gptq.Params(files=FILES, **params), {"model": model, "data": data}, out, ctx)


def last_input(model: Any, batches: list[torch.Tensor]) -> torch.Tensor:
    """H of the last layer, by the model's own forward pass."""
    seen: list[torch.Tensor] = []
    layer = model.model.layers[-1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _layer, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    rows = torch.cat(seen)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("kind", bases.ARCHITECTURES)
def test_each_layer_is_calibrated_on_the_rounded_ones_before_it(
    kind: str, tokenizer: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bases.save(kind, tokenizer, tmp_path / "whole")
    seen: list[torch.Tensor] = []
    own = gptq.round_layer
    monkeypatch.setattr(gptq, "round_layer", lambda w, h, *rest: (seen.append(h), own(w, h, *rest))[1])
    facts = run(whole, data, tmp_path / "small", block_size=16)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    engine = TorchEngine(whole)
    texts = calibration_texts(engine.tokenizer, {"data": data}, FILES, 256, 128)
    batches, _marks = calibrate.batched([calibrate.Text(*text) for text in texts])
    assert sum(len(batch) for batch in batches) == 60
    assert facts["tokens"] == sum(batch.numel() for batch in batches)
    torch.testing.assert_close(seen[-1], last_input(rounded, batches), rtol=1e-4, atol=1e-5)
    assert facts["error_to_nearest"] < 0.95
    weights = dict(engine.model.named_parameters())
    for name, weight in rounded.named_parameters():
        if name.endswith("_proj.weight"):
            grid = round_matrix(weight.detach().numpy(), 4, 16).values()
            np.testing.assert_array_equal(grid, weight.detach().numpy())
        else:
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=0)


def test_test_data_is_not_read_and_the_order_of_rows_does_not_count(
    tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    whole = bases.save("llama", tokenizer, tmp_path / "whole")
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "test.jsonl").write_text("no JSON")
    (other / "gold.jsonl").write_text("".join(reversed((data / "gold.jsonl").read_text().splitlines(keepends=True))))
    run(whole, data, tmp_path / "a", examples=20)
    run(whole, other, tmp_path / "b", examples=20)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_nothing_to_calibrate_on_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    whole = bases.save("llama", tokenizer, tmp_path / "whole")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no example to calibrate on") as caught:
        run(whole, tmp_path / "empty", tmp_path / "small")
    assert caught.value.hint


def test_layers_that_are_not_known_are_refused(tokenizer: Path) -> None:
    model = bases.build("llama", 300)
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CompressionError, match="extra") as caught:
        calibrate.blocks_of(model)
    assert caught.value.hint
    with pytest.raises(CompressionError, match="no decoder blocks"):
        calibrate.blocks_of(torch.nn.Linear(2, 2))


def test_the_rounded_model_answers_like_the_whole_one_more_than_one_rounded_to_nearest(
    tokenizer: Path, data: Path, tmp_path: Path
) -> None:
    """On texts that it was not calibrated on, with weights whose inputs are of very unlike size, as trained ones are."""
    model = bases.build("llama", len(load_tokenizer(tokenizer)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.mul_(torch.linspace(0.1, 4, weight.numel()))
    network.save(model, tokenizer, tmp_path / "whole")
    run(tmp_path / "whole", data, tmp_path / "small", block_size=32)
    whole = TorchEngine(tmp_path / "whole").model
    small = TorchEngine(tmp_path / "small").model
    plain = TorchEngine(tmp_path / "whole").model
    for name, weight in plain.named_parameters():
        if name.endswith("_proj.weight"):
            weight.data = torch.from_numpy(round_matrix(weight.detach().numpy(), 4, 32, search=True).values())
    engine = TorchEngine(tmp_path / "whole")
    gap = {"small": 0.0, "plain": 0.0}
    with torch.no_grad():
        for example in examples(20, 9):
            ids = torch.tensor([engine.encode(example.prompt_messages())])
            wanted = whole(ids).logits.log_softmax(-1)
            for name, model in (("small", small), ("plain", plain)):
                gap[name] += float((wanted.exp() * (wanted - model(ids).logits.log_softmax(-1))).sum(-1).mean())
    assert gap["small"] < 0.8 * gap["plain"]
