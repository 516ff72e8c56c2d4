"""Merging adapters: the weights are those of a direct computation on the deltas, and what cannot be merged is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from slmops.core.method import Context
from slmops.errors import ModelError
from slmops.store import lora
from slmops.train import adapter_merge
from tests.train import bases

Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def base(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = bases.save(kind, tokenizer, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


@pytest.fixture(scope="module")
def trio(base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of the qwen3 base: lora of rank 4, rslora of rank 2, qlora of rank 3."""
    out = tmp_path_factory.mktemp("trio")
    return {
        "cards": bases.adapter(base("qwen3"), out / "cards", rank=4, seed=1),
        "desk": bases.adapter(base("qwen3"), out / "desk", tuning="rslora", rank=2, seed=2),
        "mail": bases.adapter(base("qwen3"), out / "mail", tuning="qlora", rank=3, seed=3),
    }


def merge(base: Path, adapters: dict[str, Path], out: Path, **params: Any) -> dict[str, Any]:
    out.mkdir()
    inputs = {"base": base} | {f"adapter.{name}": folder for name, folder in adapters.items()}
    return adapter_merge.run(adapter_merge.Params(**params), inputs, out, Context(0, out, out))


def by_hand(folder: Path) -> Weights:
    """Layer to scale · B·A, from the files alone."""
    settings = lora.read(folder).settings
    scale = settings["lora_alpha"] / (settings["r"] ** 0.5 if settings["use_rslora"] else settings["r"])
    loaded = load_file(folder / "adapter" / "adapter_model.safetensors")
    names = {n.removesuffix(".lora_A.weight") for n in loaded if n.endswith(".lora_A.weight")}
    return {
        n.removeprefix("base_model.model."): scale * loaded[f"{n}.lora_B.weight"] @ loaded[f"{n}.lora_A.weight"]
        for n in names
    }


def changes(base: Path, merged: Path) -> Weights:
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    return {n.removesuffix(".weight"): after[n] - before[n] for n in before}


def ties(deltas: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """The paper's three steps, element by element."""
    trimmed = []
    for d in deltas:
        kept = np.zeros_like(d)
        for place in np.argsort(-np.abs(d), axis=None)[: int(density * d.size)]:
            kept.flat[place] = d.flat[place]
        trimmed.append(kept)
    out = np.zeros_like(deltas[0])
    for place in range(out.size):
        values = [t.flat[place] for t in trimmed]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
        out.flat[place] = sum(agreeing) / max(1, len(agreeing))
    return out


@pytest.mark.parametrize("method", ["linear", "ties", "stack"])
def test_the_weights_are_those_of_the_deltas(
    method: str, base: Callable[[str], Path], trio: dict[str, Path], tmp_path: Path
) -> None:
    weights = {"cards": 0.7, "mail": -0.5}
    facts = merge(base("qwen3"), trio, tmp_path / "out", method=method, weights=weights, density=0.3)
    w = [0.7, 1.0, -0.5]
    deltas = {name: by_hand(folder) for name, folder in trio.items()}
    found = changes(base("qwen3"), tmp_path / "out")
    assert facts["changed_weights"] > 0
    for layer, change in found.items():
        if layer not in deltas["cards"]:
            assert not change.any(), layer
            continue
        own = [deltas[name][layer] for name in ("cards", "desk", "mail")]
        wanted = ties(own, w, 0.3) if method == "ties" else sum(k * d for k, d in zip(w, own, strict=True))
        np.testing.assert_allclose(change, wanted, atol=2e-6, err_msg=layer)
    assert (tmp_path / "out" / "adapter").exists() == (method == "stack")


def test_a_stack_is_an_adapter_that_peft_loads(
    base: Callable[[str], Path], trio: dict[str, Path], tmp_path: Path
) -> None:
    facts = merge(base("qwen3"), trio, tmp_path / "out", method="stack", weights={"desk": 0.25})
    assert facts["rank"] == lora.read(tmp_path / "out").rank == 9
    lora.require_base(tmp_path / "out" / "adapter", base("qwen3"))
    ids = torch.arange(20)[None] * 13 % 300
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base("qwen3"))
        tuned = PeftModel.from_pretrained(plain, str(tmp_path / "out" / "adapter")).eval()(ids).logits
    torch.testing.assert_close(tuned, merged, atol=1e-4, rtol=1e-3)


def test_linear_of_lora_agrees_with_peft_s_cat(base: Callable[[str], Path], tmp_path: Path) -> None:
    two = {n: bases.adapter(base("llama"), tmp_path / n, rank=r, seed=r) for n, r in (("a", 2), ("b", 5))}
    merge(base("llama"), two, tmp_path / "out", method="linear", weights={"a": 0.3, "b": 0.9})
    plain = AutoModelForCausalLM.from_pretrained(base("llama"))
    model = PeftModel.from_pretrained(plain, str(two["a"] / "adapter"), "a")
    model.load_adapter(str(two["b"] / "adapter"), "b")
    model.add_weighted_adapter(["a", "b"], [0.3, 0.9], "c", combination_type="cat")
    model.set_adapter("c")
    wanted = model.merge_and_unload().state_dict()
    got = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in got.items():
        np.testing.assert_allclose(value, wanted[name].numpy(), atol=2e-6)


def test_one_dora_merges_to_what_its_training_wrote(base: Callable[[str], Path], tmp_path: Path) -> None:
    folder = bases.adapter(base("llama"), tmp_path / "a", tuning="dora", rank=4, seed=1)
    merge(base("llama"), {"a": folder}, tmp_path / "out", method="linear")
    wanted, got = changes(base("llama"), folder), changes(base("llama"), tmp_path / "out")
    assert max(np.abs(v).max() for v in wanted.values()) > 0.01
    for layer, value in got.items():
        np.testing.assert_allclose(value, wanted[layer], atol=2e-6)


def test_what_does_not_go_together(
    base: Callable[[str], Path], trio: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slmops.train import network

    def never(*_: Any) -> Any:
        raise AssertionError("weights were loaded before the check")

    q, cards = base("qwen3"), trio["cards"]
    dora = bases.adapter(q, tmp_path / "dora", tuning="dora", rank=4, seed=1)
    few = bases.adapter(q, tmp_path / "few", rank=4, seed=1, targets=("q_proj",))
    wide = bases.adapter(q, tmp_path / "wide", tuning="adapter", seed=1)
    foreign = bases.adapter(base("llama"), tmp_path / "foreign", rank=4, seed=1)
    monkeypatch.setattr(network, "load", never)
    cases: list[tuple[dict[str, Path], dict[str, Any], str]] = [
        ({"a": cards, "b": foreign}, {}, "belongs to another base"),
        ({"a": cards, "b": dora}, {"method": "stack"}, "adapter b: dora .* cannot be stacked"),
        ({"a": cards, "b": few}, {"method": "ties"}, "adapt different layers"),
        ({"a": cards, "b": wide}, {}, "bottleneck"),
        ({"a": cards, "b": q}, {}, "no adapter of slmops"),
        ({"a": cards}, {"weights": {"z": 1.0}}, "z, which is no adapter"),
        ({}, {}, "there is no adapter"),
    ]
    for i, (adapters, params, says) in enumerate(cases):
        with pytest.raises(ModelError, match=says) as caught:
            merge(q, adapters, tmp_path / f"o{i}", **params)
        assert caught.value.hint, says
