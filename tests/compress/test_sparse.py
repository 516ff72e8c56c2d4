"""Weights that become zero: Wanda and SparseGPT against their definitions, the pattern 2:4, and zeros that stay zero."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from slmops.compress import calibrate, sparsegpt, wanda
from slmops.core.method import Context, SilentProgress
from slmops.core.spec import Lora, Training
from slmops.errors import CompressionError, TrainingError
from slmops.train import loop, sft
from tests.compress.test_gptq import some
from tests.train import bases
from tests.train.shelf import Stop, Stopping

FILES = ("data/gold.jsonl", "data/pool.jsonl")
METHODS: dict[str, Any] = {"wanda": wanda, "sparsegpt": sparsegpt}


def run(method: str, model: Path, data: Path, out: Path, **params: Any) -> dict[str, Any]:
    out.mkdir()
    ctx = Context(0, out, out, progress=SilentProgress())
    made: dict[str, Any] = METHODS[method].run(
        METHODS[method].Params(files=FILES, **params), {"model": model, "data": data}, out, ctx
    )
    return made


def by_definition(weight: torch.Tensor, found: torch.Tensor, sparsity: Any, damping: float) -> torch.Tensor:
    """SparseGPT column after column: the inverse of what is left is taken anew for each (float64)."""
    full = (found + damping * found.diagonal().mean() * torch.eye(len(found))).double()
    work, columns = weight.double().clone(), weight.shape[1]
    inverses = [torch.linalg.inv(full[i:, i:]) for i in range(columns)]
    cost = torch.stack([inverse[0, 0] for inverse in inverses])
    gone = torch.zeros_like(work, dtype=torch.bool)
    for i in range(columns):
        if sparsity == "2:4" and i % 4 == 0:
            for row in range(len(work)):
                scores = (work[row, i : i + 4] ** 2 / cost[i : i + 4]).tolist()
                for place in sorted(range(4), key=scores.__getitem__)[:2]:
                    gone[row, i + place] = True
        elif sparsity != "2:4" and i % 128 == 0:
            scores = (work[:, i : i + 128] ** 2 / cost[i : i + 128]).flatten()
            block = torch.zeros(len(scores), dtype=torch.bool)
            block[scores.argsort(stable=True)[: round(sparsity * len(scores))]] = True
            gone[:, i : i + 128] = block.reshape(len(work), -1)
        error = torch.where(gone[:, i], work[:, i], 0.0) / inverses[i][0, 0]
        work[:, i:] -= error[:, None] * inverses[i][0]
        work[gone[:, i], i] = 0.0
    return work.float()


@pytest.mark.parametrize(("columns", "sparsity"), [(16, 0.5), (40, 0.3), (160, 0.6), (16, "2:4"), (136, "2:4")])
def test_sparsegpt_is_what_the_definition_says(columns: int, sparsity: Any) -> None:
    weight, found = some(columns, 6, columns, tokens=300)
    ours, reference = sparsegpt.thin(weight, found, sparsity, 0.01), by_definition(weight, found, sparsity, 0.01)
    assert torch.equal(ours == 0, reference == 0)
    torch.testing.assert_close(ours, reference, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("columns", [16, 136])
def test_wanda_is_size_times_the_norm_of_the_input(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight, inputs = torch.randn(6, columns, generator=generator), torch.randn(50, columns, generator=generator)
    inputs *= torch.rand(columns, generator=generator)
    found = inputs.T @ inputs / 50
    half, pairs = wanda.thin(weight, found, 0.5), wanda.thin(weight, found, "2:4")
    for row in range(6):
        scores = [float(abs(weight[row, i]) * inputs[:, i].norm()) for i in range(columns)]
        least = sorted(range(columns), key=scores.__getitem__)[: columns // 2]
        assert sorted((half[row] == 0).nonzero().flatten().tolist()) == sorted(least)
        for start in range(0, columns, 4):
            two = sorted(range(start, start + 4), key=scores.__getitem__)[:2]
            assert sorted((pairs[row, start : start + 4] == 0).nonzero().flatten().tolist()) == sorted(
                t - start for t in two
            )
    for thin in (half, pairs):
        torch.testing.assert_close(thin[thin != 0], weight[thin != 0], rtol=0, atol=0)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4"])
def test_errors_are_smaller_the_more_a_method_looks_at(sparsity: Any) -> None:
    weight, found = some(7, 32, 128, tokens=500)
    ours = sparsegpt.thin(weight, found, sparsity, 0.01)
    same_zeros = weight.masked_fill(ours == 0, 0.0)  # the same weights gone, the others left as they were
    size = wanda.thin(weight, torch.eye(128), sparsity)  # inputs of one size: by the weights' size alone
    lost = [calibrate.loss(weight, w, found) for w in (ours, same_zeros, wanda.thin(weight, found, sparsity), size)]
    assert lost[0] < 0.9 * lost[1]
    assert lost[0] < 0.95 * lost[2] and lost[2] < lost[3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", bases.ARCHITECTURES)
def test_each_layer_is_thinned_on_the_thin_ones_before_it(
    kind: str, method: str, tokenizer: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bases.save(kind, tokenizer, tmp_path / "whole")
    seen: list[torch.Tensor] = []
    own = METHODS[method].thin
    monkeypatch.setattr(METHODS[method], "thin", lambda w, h, *rest: (seen.append(h), own(w, h, *rest))[1])
    facts = run(method, whole, data, tmp_path / "small", sparsity="2:4")
    before = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    assert facts["zeros"] == facts["weights"] / 2 and 0 < facts["lost"] < 0.5
    theirs = dict(before.named_parameters())
    for name, weight in after.named_parameters():
        if name.endswith("_proj.weight"):
            assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all(), name
        else:
            torch.testing.assert_close(weight, theirs[name], rtol=0, atol=0)
    with calibrate.opened({"model": whole, "data": data}, FILES, 256, Context(0, whole, whole)) as it:
        batches = it.batches
    rows: list[torch.Tensor] = []
    last = after.model.layers[-1].mlp.down_proj
    last.register_forward_pre_hook(lambda _l, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            after(batch)
    inputs = torch.cat(rows)
    torch.testing.assert_close(seen[-1], inputs.T @ inputs / len(inputs), rtol=1e-3, atol=1e-5)


def test_layers_that_do_not_divide_into_fours_are_refused(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    whole = bases.save("llama", tokenizer, tmp_path / "whole")
    config = json.loads((whole / "config.json").read_text())
    odd = AutoModelForCausalLM.from_config(bases.config("llama", config["vocab_size"], intermediate_size=130))
    odd.save_pretrained(whole)
    assert run("wanda", whole, data, tmp_path / "share", sparsity=0.25)["zeros"] > 0
    with pytest.raises(CompressionError, match="130 inputs, which do not divide into fours") as caught:
        run("wanda", whole, data, tmp_path / "fours", sparsity="2:4")
    assert caught.value.hint


def learn(
    base: Path, data: Path, out: Path, scratch: Path, progress: Any = None, keep_zeros: bool = True, **changes: Any
) -> None:
    training = Training(epochs=2, batch_size=16, learning_rate=1e-2, weight_decay=0.1, **changes)
    params = sft.Params(training=training, files=("data/teacher.jsonl",), keep_zeros=keep_zeros)
    out.mkdir(exist_ok=True)
    scratch.mkdir(exist_ok=True)
    sft.run(
        params, {"data": data, "base": base}, out, Context(3, scratch, scratch, progress=progress or SilentProgress())
    )


@pytest.mark.parametrize("aware", ["off", "int4"])
def test_zeros_stay_zero_in_a_training_and_all_else_moves(
    aware: Any, tokenizer: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bases.save("qwen3", tokenizer, tmp_path / "whole")
    run("sparsegpt", whole, data, tmp_path / "small", sparsity="2:4")
    learn(tmp_path / "small", data, tmp_path / "trained", tmp_path / "s1", quantization_aware=aware)
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).named_parameters())
        for name in ("small", "trained")
    )
    for name, weight in after.items():
        if name.endswith("_proj.weight"):
            assert torch.equal(weight == 0, before[name] == 0), name
            assert (weight != before[name])[weight != 0].float().mean() > 0.99
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    monkeypatch.setattr(loop, "EVERY_S", 0.0)
    with pytest.raises(Stop):
        learn(tmp_path / "small", data, tmp_path / "cut", tmp_path / "s2", Stopping(5), quantization_aware=aware)
    learn(tmp_path / "small", data, tmp_path / "cut", tmp_path / "s2", Stopping(10_000), quantization_aware=aware)
    for file in (tmp_path / "trained").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes(), file.name
    shutil.rmtree(tmp_path / "s1")
    learn(tmp_path / "small", data, tmp_path / "free", tmp_path / "s1", keep_zeros=False)
    free = AutoModelForCausalLM.from_pretrained(tmp_path / "free").model.layers[0].mlp.down_proj.weight
    assert (free == 0).float().mean() < 0.01


def test_additions_that_would_fill_zeros_are_refused(tokenizer: Path, data: Path, tmp_path: Path) -> None:
    whole = bases.save("llama", tokenizer, tmp_path / "whole")
    with pytest.raises(TrainingError, match="lora would fill the zeros") as caught:
        learn(whole, data, tmp_path / "out", tmp_path / "s", tuning="lora", lora=Lora(rank=2))
    assert caught.value.hint
