"""The catalogue: its numbers are those of the models themselves, its choices are what was asked for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from slmops.catalog import fits, models
from slmops.core import cache
from slmops.core.parameters import KINDS, count
from slmops.errors import ModelError, UsageError

CATALOGUE = models.load()
OWN_CODE = {"exaone"}
"""Architectures whose code comes with the model, so that transformers cannot build them."""


def on_meta(config: dict[str, Any]) -> Any:
    """The model that transformers builds, without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))


def by_architecture() -> list[tuple[str, list[models.Model]]]:
    kinds = dict.fromkeys(model.architecture for model in CATALOGUE.values())
    return [(kind, [model for model in CATALOGUE.values() if model.architecture == kind]) for kind in kinds]


def test_there_are_enough_and_each_family_that_was_promised() -> None:
    assert len(CATALOGUE) >= 40
    families = {model.family for model in CATALOGUE.values()}
    assert families >= {
        "SmolLM", "SmolLM2", "SmolLM3", "Qwen2.5", "Qwen3", "Llama 3.1", "Llama 3.2", "Gemma", "Gemma 2", "Gemma 3", "Phi-3",
        "Phi-3.5", "Phi-4", "Granite 3", "Granite 4", "OLMo", "OLMo 2", "LFM2", "BitNet", "Mistral", "Falcon 3", "TinyLlama",
        "StableLM 2", "EXAONE 3.5", "EXAONE 4",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "found"), by_architecture(), ids=[kind for kind, _ in by_architecture()])
def test_counts_are_those_of_the_models(kind: str, found: list[models.Model]) -> None:
    """By transformers where it has the architecture, by the published count otherwise. Twins in shape are built once."""
    if kind in OWN_CODE:
        assert all(model.published for model in found), "nothing else confirms these"
    built: dict[str, int] = {}
    for model in found:
        if model.published is not None:
            assert model.weights.total == model.published, model.name
        shape = json.dumps(model.config, sort_keys=True)
        if kind not in OWN_CODE and shape not in built:
            built[shape] = sum(weight.numel() for weight in on_meta(dict(model.config)).parameters())
            assert model.weights.total == built[shape], model.name


VARIED: dict[str, dict[str, list[Any]]] = {
    "llama": {"attention_bias": [True], "mlp_bias": [True], "tie_word_embeddings": [True, False], "head_dim": [8, 32]},
    "smollm3": {"attention_bias": [True], "mlp_bias": [True]},
    "qwen3": {"attention_bias": [True], "head_dim": [24]},
    "gemma": {"attention_bias": [True]},
    "gemma2": {"attention_bias": [True]},
    "gemma3_text": {"attention_bias": [True]},
    "phi": {"qk_layernorm": [True]},
    "granite": {"attention_bias": [True], "mlp_bias": [True]},
    "granitemoehybrid": {
        "num_local_experts": [0, 4],
        "mamba_proj_bias": [True],
        "mamba_conv_bias": [False],
        "mamba_n_groups": [2],
    },
    "olmo": {"attention_bias": [True]},
    "olmo2": {"attention_bias": [True]},
    "olmo3": {"attention_bias": [True]},
    "lfm2": {"conv_bias": [True], "block_auto_adjust_ff_dim": [False], "block_ffn_dim_multiplier": [1.3]},
    "bitnet": {"attention_bias": [True]},
    "stablelm": {"use_qkv_bias": [True], "qk_layernorm": [True], "use_parallel_residual": [True]},
    "cohere": {"use_qk_norm": [True], "attention_bias": [True]},
    "gpt_oss": {"attention_bias": [False]},
    "arcee": {"attention_bias": [True], "mlp_bias": [True]},
    "nemotron": {"attention_bias": [True], "mlp_bias": [True]},
    "starcoder2": {"use_bias": [False]},
    "ernie4_5": {"use_bias": [True]},
}
TINY = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
    "shared_intermediate_size": 48, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
    "mamba_d_conv": 4, "mamba_expand": 2, "conv_L_cache": 3, "pad_token_id": 0, "rope_theta": 10000.0,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "ministral": {"head_dim": 16},
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OWN_CODE])
def test_counts_hold_for_settings_that_no_model_of_the_catalogue_has(kind: str) -> None:
    chance = random.Random(kind)
    base = TINY | {"model_type": kind} | OWN.get(kind, {})
    options = VARIED.get(kind, {})
    cases = [{}, *({key: value} for key, values in options.items() for value in values)]
    cases += [{key: chance.choice(values) for key, values in options.items()} for _ in range(2)]
    for case in cases:
        tied = bool(chance.getrandbits(1))
        config = base | {"tie_word_embeddings": tied} | case
        expected = sum(weight.numel() for weight in on_meta(config).parameters())
        assert count(config).total == expected, case


def test_what_the_architecture_ties_by_itself_counts_once() -> None:
    for kind in KINDS:
        if kind not in OWN_CODE:
            config = TINY | {"model_type": kind} | OWN.get(kind, {})
            assert count(config).total == sum(weight.numel() for weight in on_meta(config).parameters()), kind


def test_a_model_that_also_sees_counts_its_language_part() -> None:
    inner = dict(CATALOGUE["gemma-3-4b-it"].config)
    outer = {"model_type": "gemma3", "text_config": inner, "vision_config": {"hidden_size": 1152}}
    assert count(outer) == CATALOGUE["gemma-3-4b-it"].weights


def test_experts_that_a_token_does_not_meet_are_idle() -> None:
    model = CATALOGUE["granite-4.0-h-tiny"]
    config = dict(model.config)
    assert (
        model.weights.active == count(config | {"num_local_experts": 6}).total + (64 - 6) * 40 * config["hidden_size"]
    )


@pytest.mark.parametrize(
    ("name", "context"),
    [("llama-3.2-1b-instruct", 9), ("gemma-3-1b-it", 700), ("lfm2-350m", 9), ("phi-3-mini-4k-instruct", 9)],
)
def test_the_cache_is_as_large_as_the_one_that_transformers_fills(name: str, context: int) -> None:
    """A small model of the same form reads a text; keys and values left in the cache are counted."""
    import torch

    config = dict(CATALOGUE[name].config) | {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
    }  # fmt: skip
    if config["model_type"] == "lfm2":
        config |= {"block_auto_adjust_ff_dim": False}
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).eval()
    with torch.no_grad():
        filled = model(torch.randint(3, 64, (2, context)), use_cache=True).past_key_values
    held = sum(
        t.numel()
        for layer in filled.layers
        for t in vars(layer).values()
        if isinstance(t, torch.Tensor) and t.ndim == 4
    )
    assert held > 0
    expected = cache.size(config, context, batch=2, bytes_=1) - 2 * 4 * cache.states(config)
    windows = [view for view in cache.views(config) if view is not None and context >= view]
    assert held == expected - len(windows) * 2 * 2 * 16, "of a full window transformers drops the token that goes next"


def test_classes_leave_no_gap() -> None:
    bounds = {99e6: "micro", 1.449e9: "micro", 1.451e9: "small", 13.94e9: "small", 13.96e9: "medium", 30.04e9: "medium"}
    assert {size: models.class_of(int(size)) for size in bounds} == bounds
    assert models.class_of(44_000_000) is None and models.class_of(30_100_000_000) is None


def test_a_file_is_given_back_as_it_was_read(tmp_path: Path) -> None:
    assert models.dump(CATALOGUE.values()) == models.FILE.read_text(encoding="utf-8")


def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    row = json.loads(models.FILE.read_text())["phi-4"]
    cases = {
        "[1]": "not a catalogue",
        "{": "not JSON",
        json.dumps(
            {"phi-4": {key: value for key, value in row.items() if key != "hub"} | {"licens": 1}}
        ): "no hub, unknown licens",
        json.dumps({"phi-4": row | {"config": {"model_type": "rwkv"}}}): "'rwkv' is not known",
        json.dumps({"phi-4": row | {"languages": 5}}): "phi-4: TypeError",
        json.dumps({"phi-4": row | {"config": {"model_type": "phi3"}}}): "phi-4: KeyError",
    }
    for text, says in cases.items():
        file = tmp_path / "models.json"
        file.write_text(text)
        with pytest.raises(UsageError, match=says):
            models.load(file)


def test_models_are_found_by_every_name_they_have() -> None:
    for name in ("qwen3-0.6b", "Qwen/Qwen3-0.6B", "hf:Qwen/Qwen3-0.6B", "qwen3:0.6b"):
        assert models.find(CATALOGUE, name).name == "qwen3-0.6b"
    with pytest.raises(ModelError) as raised:
        models.find(CATALOGUE, "qwen3-0.6")
    assert "qwen3-0.6b" in raised.value.hint


def test_all_that_is_asked_has_to_hold() -> None:
    found = models.select(CATALOGUE, ["granite"], "micro", ["apache-2.0"], ["granitemoehybrid"])
    assert [model.name for model in found] == ["granite-4.0-350m"]
    with pytest.raises(UsageError) as raised:
        models.select(CATALOGUE, licences=["apache"])
    assert "apache-2.0" in raised.value.hint
    sizes = [model.weights.total for model in models.select(CATALOGUE)]
    assert sizes == sorted(sizes)


def test_a_longer_context_and_a_smaller_device_leave_less() -> None:
    config = CATALOGUE["llama-3.2-1b-instruct"].config
    short, long = fits.need(config, 1024), fits.need(config, 4096)
    assert long.cache == 4 * short.cache and long.weights == short.weights
    assert 1.235e9 * 0.5 < short.weights < 1.235e9 * 1.0
    assert fits.usable(2e9) == 1.5e9 and fits.usable(80e9) == 72e9
