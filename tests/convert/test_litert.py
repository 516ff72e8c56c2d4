"""LiteRT: the converter computes what torch does, rounds to what was meant, and the engine takes prompts in parts."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slmops.convert import litert
from slmops.convert.rounding import round_matrix
from slmops.core.engine import Sampling
from slmops.core.method import Context, SilentProgress
from slmops.engines import detect, open_engine
from slmops.engines.minimal import PROMPT, write_minimal
from slmops.engines.plain_tokenizer import compile_template
from slmops.errors import ConversionError, MissingExtraError, ModelError
from tests.convert.agreement import check

Decoder = Callable[..., Path]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 2e4, "short_factor": [1.0, 1.2, 1.5, 1.7, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0], "partial_rotary_factor": 0.75, "original_max_position_embeddings": 128,
}  # fmt: skip
FULL = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}}),
    ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 256, "original_max_position_embeddings": 128}),
    (
        "gemma3",
        {
            "rope_parameters": {"full_attention": FULL, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
            "query_pre_attn_scalar": 32, "hidden_size": 96, "final_logit_softcapping": 5.0,
        },
    ),
]  # fmt: skip


def convert(model: Path, data: Path, out: Path, **params: Any) -> tuple[dict[str, Any], list[str]]:
    out.mkdir()
    scratch = out.with_name(f"{out.name}-scratch")
    scratch.mkdir()
    progress = SilentProgress()
    context = Context(0, scratch, scratch, progress=progress)
    facts = litert.run(litert.Params(fidelity_prompts=4, **params), {"model": model, "data": data}, out, context)
    return facts, progress.lines


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "changes"), MODELS)
def test_fp32_is_torch(kind: str, changes: dict[str, Any], decoder: Decoder, data: Path, tmp_path: Path) -> None:
    """Rotary positions of every kind, windows, shared keys, biases: 64 greedy tokens and all logits on the way."""
    source = decoder(kind, **changes)
    facts, _ = convert(source, data, tmp_path / "out", precision="fp32")
    assert facts["token_agreement"] == 1.0 and facts["rounded"] == 0 and detect(tmp_path / "out") == "litert"
    engine, reference = open_engine(tmp_path / "out"), open_engine(source)
    assert engine.context_length == 128 == facts["context"]
    assert check(engine, reference, 1e-4) > 0
    engine.close()
    assert (tmp_path / "out" / "model.litertlm").read_bytes()[:8] == b"LITERTLM"


def _values(weights: np.ndarray[Any, Any], bits: int, group: int) -> np.ndarray[Any, Any]:
    codes, scales = litert.signed(weights, bits, group)
    groups: np.ndarray[Any, Any] = codes.reshape(len(codes), -1, group) * scales.astype(np.float32)[..., None]
    return groups.reshape(weights.shape)


@pytest.mark.slow
def test_int4_computes_with_what_it_was_rounded_to(decoder: Decoder, data: Path, tmp_path: Path) -> None:
    """The table and rows of 72 weights in int8, the rest in int4: against torch with those values, up to how activations are rounded."""
    source = decoder("llama", intermediate_size=72)
    facts, lines = convert(source, data, tmp_path / "out", precision="int4", embedding_precision="int8")
    assert facts["rounded"] == 15 and facts["in_int8"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert any("2 matrices are in int8" in line for line in lines)
    meant = tmp_path / "meant"
    shutil.copytree(source, meant)
    weights = load_file(source / "model.safetensors")
    for name, values in weights.items():
        if values.ndim == 2:
            whole = "embed" in name or values.shape[1] == 72
            weights[name] = _values(values, 8 if whole else 4, values.shape[1] if whole else 32)
    save_file(weights, meant / "model.safetensors", metadata={"format": "pt"})
    convert(source, data, tmp_path / "again", precision="int4", embedding_precision="int8")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), f"{file.name} differs a second time"
    engine, reference, before = open_engine(tmp_path / "out"), open_engine(meant), open_engine(source)
    ids = [*engine.encode(PROMPT), *range(40, 70)]
    found, wanted, full = (each.logits(ids) for each in (engine, reference, before))
    assert np.square(found - wanted).mean() < 0.05 * np.square(full - wanted).mean()
    assert (tmp_path / "out" / "model.tflite").stat().st_size < (source / "model.safetensors").stat().st_size * 0.6


def test_the_template_of_the_bundle_reads_messages_as_litert_lm_gives_them(tmp_path: Path) -> None:
    rest = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " where is it? "}]
    parts = [
        m | {"content": [{"type": "text", "text": part} for part in m["content"].partition(" ")]} for m in messages
    ]
    template = compile_template(litert.TEXTS + rest, tmp_path)
    assert template.render(messages=parts, bos_token="^") == "^<system>be brief<user>where is it?"
    assert template.render(messages=messages, bos_token="^") == "^<system>be brief<user>where is it?"


@pytest.mark.parametrize(("length", "context", "prefill"), [(40960, 4096, [32, 128]), (128, 128, [32]), (24, 24, [12])])
def test_keys_and_values_have_room_for_the_context_up_to_a_limit(length: int, context: int, prefill: list[int]) -> None:
    config = {
        "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-6,
        "max_position_embeddings": length,
    }  # fmt: skip
    made = litert.plan(config)
    assert (made["context"], made["prefill"]) == (context, prefill)


def test_rounding_keeps_what_lies_on_a_grid_of_positive_scales() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (6, 4, 32))
    codes[..., 0] = -8
    scales = rng.uniform(0.01, 1.0, (6, 4)).astype(np.float16)
    weights = (codes * scales.astype(np.float32)[..., None]).reshape(6, 128)
    found, steps = litert.signed(weights, 4, 32)
    np.testing.assert_array_equal(found.reshape(codes.shape), codes)
    np.testing.assert_array_equal(steps, scales)


def test_rounding_of_a_grid_of_negative_scales_loses_a_step_of_the_largest_weights_at_most() -> None:
    weights = np.random.default_rng(1).normal(size=(16, 256)).astype(np.float32)
    rounded = round_matrix(weights, 4, 32)
    values = rounded.values()
    lost = (_values(values, 4, 32) - values).reshape(rounded.codes.shape)
    step = np.abs(rounded.scales.astype(np.float32))[..., None]
    top = (rounded.codes == 0) & (rounded.scales < 0)[..., None]
    assert top.any() and (np.square(lost).sum(-1) <= (np.square(step) * top).sum(-1) * 1.0001).all()
    assert (lost[rounded.scales > 0] == 0).all()


def test_rounding_is_no_worse_than_to_the_largest_weight_and_takes_zeros() -> None:
    weights = np.random.default_rng(2).normal(size=(8, 64)).astype(np.float32)
    weights[3] = 0.0
    for bits, group in ((4, 32), (8, 64)):
        step = np.abs(weights.reshape(8, -1, group)).max(-1, keepdims=True) / ((1 << (bits - 1)) - 1)
        plain = np.rint(weights.reshape(8, -1, group) / np.where(step, step, 1)) * step
        error = np.square(_values(weights, bits, group) - weights).sum()
        assert error <= np.square(plain.reshape(weights.shape) - weights).sum() * 1.01
        assert not _values(weights, bits, group)[3].any()


@pytest.mark.slow
def test_a_prompt_in_parts_is_the_prompt_token_by_token(tmp_path: Path) -> None:
    """Also where it ends at the end of the context, beyond which no part may reach."""
    write_minimal(tmp_path, "litert")
    engine = open_engine(tmp_path)
    ids = [5 + (i * i) % 200 for i in range(engine.context_length)]
    for length in (1, 2, 5, 9, 17, 40, len(ids) - 1, len(ids)):
        whole = engine.logits(ids[:length], length - 1)[0]
        alone = engine.logits(ids[:length])[-1]
        np.testing.assert_allclose(whole, alone, atol=1e-4)
    longer = engine.generate([ids[:50]], Sampling(8, ignore_end=True))[0]
    assert engine.generate([ids[:50]], Sampling(8, ignore_end=True))[0].tokens == longer.tokens


@pytest.mark.slow
def test_refused(decoder: Decoder, data: Path, tmp_path: Path) -> None:
    for number, (kind, changes, says) in enumerate([
        ("llama", {"model_type": "mamba"}, "type mamba cannot be written for LiteRT"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu, not silu, which the graph for LiteRT"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "type yarn in a qwen3"),
        ("llama", {"num_hidden_layers": 3}, r"no tensor model.layers.2"),
    ]):  # fmt: skip
        source = tmp_path / f"source{number}"
        shutil.copytree(decoder(kind), source)
        config = json.loads((source / "config.json").read_text()) | changes
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConversionError, match=says) as caught:
            convert(source, data, tmp_path / f"out{number}")
        assert caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize(("file", "text", "says"), [
    ("model.tflite", "TFL3", "cannot be loaded"),
    ("config.json", "", "config.json cannot be read"),
    ("tokenizer.json", "", "no tokenizer.json"),
])  # fmt: skip
def test_broken_folders(file: str, text: str, says: str, tmp_path: Path) -> None:
    write_minimal(tmp_path, "litert")
    (tmp_path / file).write_text(text) if text else (tmp_path / file).unlink()
    with pytest.raises(ModelError, match=says) as caught:
        open_engine(tmp_path)
    assert caught.value.hint


def test_a_missing_runtime_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slmops.engines.litert import libraries

    monkeypatch.setitem(sys.modules, "ai_edge_litert.compiled_model", None)
    with pytest.raises(MissingExtraError) as caught:
        libraries()
    assert "slmops[litert]" in caught.value.hint
