"""Ternary training: its rule against the definition, what is learned, saved and taken up again, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from slmops.core.method import Context
from slmops.core.spec import Architecture
from slmops.errors import TrainingError
from slmops.train import encode, loop, network, sft
from slmops.train.fit import Plan
from slmops.train.memory import Load, memory
from slmops.train.objective import validation_loss
from slmops.train.quantization_aware import fake_ternary
from slmops.train.shape import Shape
from tests.train.conftest import FAST

WIDE = Architecture(layers=1, hidden=256, heads=4, kv_heads=1, ffn=256, context=64)


def by_definition(row: list[float]) -> list[float]:
    """One group, a weight at a time."""
    mean = float(np.mean(np.abs(row)))
    kept = [abs(w) for w in row if abs(w) > mean / 2]
    scale = float(np.float16(np.mean(kept))) if kept else 0.0
    return [float(np.sign(w)) * scale if abs(w) > mean / 2 else 0.0 for w in row]


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3), st.floats(1e-6, 1e3))
@settings(deadline=None, max_examples=40)
def test_the_rule_is_the_written_one_and_leaves_its_own_results_alone(
    seed: int, rows: int, groups: int, size: float
) -> None:
    weight = torch.randn(rows, 256 * groups, generator=torch.Generator().manual_seed(seed)) * size
    if seed % 3 == 0:
        weight[0, :256] = 0
    once = fake_ternary(weight)
    wanted = [by_definition(row) for row in weight.double().reshape(-1, 256).tolist()]
    same = np.isclose(once.reshape(-1, 256).numpy(), wanted, rtol=1e-3, atol=1e-7).mean()
    assert same > 0.99  # a weight at the border, or a mean between two float16, may fall either way
    assert not torch.signbit(once[once == 0]).any()
    assert torch.equal(fake_ternary(once), once)


def params(architecture: Architecture | None = WIDE, **training: Any) -> sft.Params:
    given = {"quantization_aware": "ternary", "learning_rate": 4e-3, "epochs": 2} | training
    return sft.Params(
        training=FAST.model_copy(update=given),
        architecture=architecture,
        files=("data/teacher.jsonl",),
        validation="data/validation.jsonl",
    )


def train(p: sft.Params, inputs: dict[str, Path], out: Path, scratch: Path | None = None) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    scratch = scratch or out.parent / f"{out.name}-scratch"
    return sft.run(p, inputs, out, Context(seed=3, scratch=scratch, shared=scratch))


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return found


@pytest.mark.slow
def test_what_is_saved_is_what_was_trained(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The layers are ternary and nothing else is; read by transformers alone, the model has the loss that training saw."""
    train(params(), {"data": data, "tokenizer": tokenizer}, tmp_path / "a")
    points = record(tmp_path / "a")["points"]
    assert points[-1]["train_loss"] < 0.5 * points[0]["train_loss"]
    assert record(tmp_path / "a")["rounding_from"] == 0
    weights = load_file(tmp_path / "a" / "model.safetensors")
    layers = {name: weight for name, weight in weights.items() if "_proj" in name}
    assert len(layers) == 7
    for weight in layers.values():
        groups = weight.reshape(-1, 256)
        scale = groups.abs().amax(1, keepdim=True)
        assert torch.equal(scale, scale.half().float()) and (scale > 0).all()
        assert torch.equal(groups, groups.sign() * scale)
        assert 0.1 < (groups == 0).float().mean() < 0.6
    table = weights["model.embed_tokens.weight"]
    assert not torch.equal(fake_ternary(table), table)
    rows = encode.read({"data": data}, ("data/validation.jsonl",))
    held = encode.encode(rows, encode.load_tokenizer(tokenizer), 64)
    net = network.Network(network.load(tmp_path / "a"))
    found = validation_loss(net, net.weights, held, params().training)
    assert found == pytest.approx(record(tmp_path / "a")["best_validation_loss"], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_saved_model_is_trained_on_from_where_it_was(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    train(params(), {"data": data, "tokenizer": tokenizer}, tmp_path / "a")
    train(params(None, epochs=1, learning_rate=1e-4), {"data": data, "base": tmp_path / "a"}, tmp_path / "b")
    before, after = record(tmp_path / "a"), record(tmp_path / "b")
    assert after["best_validation_loss"] < 1.05 * before["best_validation_loss"]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.slow
def test_cut_off_anywhere_it_ends_with_the_same_bytes(
    data: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"data": data, "tokenizer": tokenizer}
    train(params(), inputs, tmp_path / "whole")
    monkeypatch.setattr(loop, "EVERY_S", 0.0)
    own = loop.Loop.step
    for bound in (3, 9):

        def step(self: loop.Loop, bound: int = bound) -> None:
            if self.state.step == bound:
                raise Killed
            own(self)

        monkeypatch.setattr(loop.Loop, "step", step)
        with pytest.raises(Killed):
            train(params(), inputs, tmp_path / "cut", tmp_path / "scratch")
    monkeypatch.setattr(loop.Loop, "step", own)
    train(params(), inputs, tmp_path / "cut", tmp_path / "scratch")
    whole, cut = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()


def test_widths_that_do_not_fit_are_refused_before_the_first_step(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    narrow = WIDE.model_copy(update={"ffn": 320})
    with pytest.raises(TrainingError, match="not down_proj 320") as caught:
        train(params(narrow), {"data": data, "tokenizer": tokenizer}, tmp_path / "a")
    assert "256 or 512" in caught.value.hint


def test_the_memory_of_the_rounded_layers_is_counted() -> None:
    shape = Shape.of(WIDE, 340)
    load = Load.of(np.full(64, 20), np.full(64, 15), FAST, 0, np.full(8, 20))
    plain, ternary, int4 = (
        Plan("", "", shape, FAST.model_copy(update={"quantization_aware": mode}), lambda _: load, True, False).memory()
        for mode in ("off", "ternary", "int4")
    )
    assert memory and ternary.moments["backward"] - plain.moments["backward"] == 4 * shape.in_blocks
    assert plain.peak < ternary.peak < int4.peak
