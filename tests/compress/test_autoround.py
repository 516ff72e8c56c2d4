"""AutoRound: its numbers against a plain computation, the grid, and what it gains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slmops.compress import autoround, grid
from slmops.convert.rounding import round_matrix
from slmops.core.method import Context, SilentProgress
from tests.compress.test_awq import logits, uneven
from tests.train import bases

FILES = ("data/gold.jsonl", "data/pool.jsonl")


def run(model: Path, data: Path, out: Path, widths: dict[str, int] | None = None, **params: Any) -> dict[str, Any]:
    out.mkdir()
    inputs = {"model": model, "data": data}
    if widths:
        inputs["widths"] = out.parent / "widths"
        inputs["widths"].mkdir()
        (inputs["widths"] / "widths.json").write_text(json.dumps(widths))
    ctx = Context(0, out, out, progress=SilentProgress())
    return autoround.run(autoround.Params(files=FILES, **params), inputs, out, ctx)


def matrix(bits: int = 4, columns: int = 40) -> tuple[torch.Tensor, autoround.Matrix]:
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(columns))
    weight[2, :16] = 0
    return weight, autoround.Matrix.of(weight, torch.linspace(0.1, 2, columns), 16, bits)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_starts_from_the_nearest(bits: int) -> None:
    weight, start = matrix(bits)
    wanted = grid.rounded(weight, torch.linspace(0.1, 2, 40), 16, bits)
    torch.testing.assert_close(start.values().detach(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_whatever_is_learned_lies_on_the_grid(bits: int) -> None:
    _weight, it = matrix(bits)
    random = torch.Generator().manual_seed(bits)
    it.offset.data = torch.rand(it.offset.shape, generator=random) - 0.5
    it.share.data = 0.5 + 0.6 * torch.rand(it.share.shape, generator=random)
    values = it.values().detach().numpy()
    for search in (False, True):
        np.testing.assert_array_equal(round_matrix(values, bits, 16, search=search).values(), values)


def test_gradients_are_those_of_the_straight_through_estimator() -> None:
    """d values / d offset is the scale where nothing is clamped; d / d share as the definition says."""
    weight, it = matrix()
    random = torch.Generator().manual_seed(0)
    weigh = torch.randn(weight.shape, generator=random)
    (it.values() * weigh).sum().backward()
    scale, largest = grid.scales_of(weight, torch.linspace(0.1, 2, 40), 16)
    steps = torch.where(scale == 0, 0.0, weight / scale)
    free = ((steps >= -8) & (steps <= 7) & ~largest).float() * (scale != 0)
    wanted = (weigh * scale * free)[:, :32].reshape(6, 2, 16)
    assert it.offset.grad is not None and it.share.grad is not None
    torch.testing.assert_close(it.offset.grad[:, :2], wanted)
    exact = it.exact.expand(-1, -1, 16).reshape(6, -1)[:, :40]
    kept = torch.where(largest, -8.0, steps.round().clamp(-8, 7))
    each = weigh * exact * (kept - free * steps)
    padded = torch.nn.functional.pad(each, (0, 8)).reshape(6, 3, 16).sum(2, keepdim=True)
    torch.testing.assert_close(it.share.grad, padded, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", bases.ARCHITECTURES)
def test_blocks_come_nearer_than_by_rounding_to_nearest(kind: str, tokenizer: Path, data: Path, tmp_path: Path) -> None:
    whole = uneven(kind, tokenizer, tmp_path / "whole")
    asked = {"block_size": 16, "iterations": 24, "examples": 24}
    facts = run(whole, data, tmp_path / "small", rate=0.02, **asked)
    assert facts["error_to_nearest"] < 0.9
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    before = dict(AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).named_parameters())
    for name, weight in small.named_parameters():
        if name.endswith("_proj.weight"):
            rounded = round_matrix(weight.detach().numpy(), 4, 16, search=True).values()
            np.testing.assert_array_equal(rounded, weight.detach().numpy(), err_msg=name)
        else:
            torch.testing.assert_close(weight, before[name], rtol=0, atol=0)


def test_the_same_run_gives_the_same_weights(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    whole = uneven("llama", tokenizer, tmp_path / "whole")
    for name in ("a", "b"):
        run(whole, data, tmp_path / name, iterations=4, examples=8)
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("a", "b"))
    assert first == second


def test_each_matrix_gets_the_width_that_was_chosen(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    whole = uneven("llama", tokenizer, tmp_path / "whole")
    widths = {"table": 8, "0.qkv": 2, "0.o": 8, "1.down": 2}
    run(whole, data, tmp_path / "small", widths, block_size=16, iterations=3, examples=12)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    bits = {
        "layers.0.self_attn.v_proj": 2,
        "layers.0.self_attn.o_proj": 8,
        "layers.1.mlp.down_proj": 2,
        "layers.1.self_attn.q_proj": 4,
    }
    for name, width in bits.items():
        weight = small.get_submodule(f"model.{name}").weight.detach().numpy()
        np.testing.assert_array_equal(round_matrix(weight, width, 16).values(), weight)
        if width > 2:
            assert not np.array_equal(round_matrix(weight, width // 2, 16).values(), weight)
    assert torch.isfinite(logits(small)).all()
