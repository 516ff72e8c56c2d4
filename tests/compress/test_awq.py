"""AWQ: folding changes nothing, the search is what the definition says, rounding gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from slmops.compress import awq
from slmops.convert.rounding import round_matrix
from slmops.core.method import Context, SilentProgress
from slmops.engines.tokenizer import load_tokenizer
from slmops.train import network
from tests.train import bases

FILES = ("data/gold.jsonl", "data/pool.jsonl")


def uneven(kind: str, tokenizer: Path, out: Path, **settings: Any) -> Path:
    """A base whose inputs are of very unlike size, as those of trained models are, and whose biases are not zero."""
    model = bases.build(kind, len(load_tokenizer(tokenizer)), **settings)
    random = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "norm" in name and weight.numel() > 32:
            weight.data += torch.linspace(-0.9, 3, weight.numel())
        elif name.endswith(("v_proj.weight", "up_proj.weight", "qkv_proj.weight")):
            weight.data *= torch.linspace(0.2, 3, len(weight))[:, None]
        elif name.endswith("bias"):
            weight.data = torch.randn(weight.shape, generator=random)
    network.save(model, tokenizer, out)
    return out


def run(model: Path, data: Path, out: Path, **params: Any) -> dict[str, Any]:
    out.mkdir()
    ctx = Context(0, out, out, progress=SilentProgress())
    return awq.run(awq.Params(files=FILES, **params), {"model": model, "data": data}, out, ctx)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 65).reshape(2, 30)
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("kind", bases.ARCHITECTURES)
def test_a_folded_model_computes_what_it_did(kind: str, tokenizer: Path, data: Path, tmp_path: Path) -> None:
    whole = load(uneven(kind, tokenizer, tmp_path / "whole"))
    facts = run(tmp_path / "whole", data, tmp_path / "folded", block_size=16, round=False)
    folded = load(tmp_path / "folded")
    wanted, got = logits(whole), logits(folded)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=2e-5 * float(wanted.abs().max()))
    changed = {
        name
        for (name, a), b in zip(whole.named_parameters(), folded.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} >= {
        "o_proj",
        "down_proj",
        "input_layernorm",
    }
    assert not any("embed" in name or name == "model.norm.weight" for name in changed)
    assert facts["error_to_nearest"] < 0.97


def test_biases_are_folded_too(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(
        bases.config("llama", len(load_tokenizer(tokenizer)), attention_bias=True, mlp_bias=True), dtype=torch.float32
    )
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data = torch.linspace(-1, 2, weight.numel())
        elif name.endswith("norm.weight"):
            weight.data = torch.linspace(0.1, 4, weight.numel())
    network.save(model, tokenizer, tmp_path / "whole")
    run(tmp_path / "whole", data, tmp_path / "folded", round=False)
    wanted = logits(load(tmp_path / "whole"))
    torch.testing.assert_close(
        logits(load(tmp_path / "folded")), wanted, rtol=1e-3, atol=2e-5 * float(wanted.abs().max())
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_the_factors_are_those_of_least_error(bits: int) -> None:
    """Against the definition, written for single groups, with errors of outputs over the inputs themselves."""
    random = torch.Generator().manual_seed(bits)
    inputs = torch.randn(300, 32, generator=random) * torch.linspace(0.01, 4, 32)
    weight = torch.randn(5, 32, generator=random)
    size = inputs.abs().mean(0)
    factors, plain, least = awq.search([weight], size, inputs.T @ inputs / 300, 16, bits)

    def error(trial: torch.Tensor) -> float:
        scaled, seen = weight * trial, inputs / trial
        out = torch.empty_like(weight)
        for row in range(5):
            for start in (0, 16):
                group, weigh = scaled[row, start : start + 16], seen[:, start : start + 16].square().mean(0)
                largest = group[group.abs().argmax()]
                tried = []
                for share in [1 - 0.02 * i for i in range(16)]:
                    scale = float((largest * round(share, 2) / -(2 ** (bits - 1))).half())
                    steps = (group / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                    tried.append((float(((steps * scale - group) ** 2 * weigh).sum()), steps * scale))
                out[row, start : start + 16] = min(tried, key=lambda t: t[0])[1]
        return float((seen @ (out - scaled).T).square().sum(1).mean())

    every = []
    for step in range(20):
        trial = size ** (step / 20)
        every.append(error(trial / (trial.max() * trial.min()).sqrt()))
    assert error(factors) == pytest.approx(min(every), rel=1e-3) == pytest.approx(least, rel=1e-3)
    assert plain == pytest.approx(every[0], rel=1e-3)
    assert least < 0.97 * plain


def test_rounded_weights_lie_on_the_converters_grid(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    """All of them: no later fold touches a matrix that is rounded."""
    uneven("llama", tokenizer, tmp_path / "whole")
    run(tmp_path / "whole", data, tmp_path / "small", block_size=32)
    for name, weight in load(tmp_path / "small").named_parameters():
        if name.endswith("_proj.weight"):
            grid = round_matrix(weight.detach().numpy(), 4, 32, search=True).values()
            np.testing.assert_array_equal(grid, weight.detach().numpy(), err_msg=name)
