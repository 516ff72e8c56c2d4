"""What `slmops needs` counts: files are as large as foreseen, and every part moves with what it depends on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slmops.catalog import models, needs
from slmops.core import cache
from slmops.core.method import Context

CATALOGUE = models.load()
SHAPE = {
    "model_type": "llama", "vocab_size": 261, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_files_are_as_large_as_foreseen(tied: bool, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from slmops.convert import gguf
    from slmops.engines.minimal import END, _write_tokenizer

    source = tmp_path / "source"
    source.mkdir()
    values = SHAPE | {"tie_word_embeddings": tied}
    settings = AutoConfig.for_model(values.pop("model_type"), **values, bos_token_id=None, eos_token_id=END)
    AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(source)
    _write_tokenizer(source)
    config = json.loads((source / "config.json").read_text())
    foreseen = needs.needs(config, "torch", "fp32", 64)
    assert foreseen.disk == pytest.approx((source / "model.safetensors").stat().st_size, rel=0.01)
    for form in ("q4_0", "q8_0", "fp16"):
        out = tmp_path / form
        out.mkdir()
        ctx = Context(seed=0, scratch=tmp_path, shared=tmp_path)
        gguf.run(gguf.Params(precision=form), {"model": source}, out, ctx)
        size = (out / "model.gguf").stat().st_size
        assert needs.needs(config, "llama_cpp", form, 64).disk == pytest.approx(size, rel=0.01), form


@pytest.mark.slow
def test_openvino_files_are_as_large_as_foreseen(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from slmops.convert import openvino
    from slmops.engines.minimal import END, _write_tokenizer

    source = tmp_path / "source"
    source.mkdir()
    values = SHAPE | {"tie_word_embeddings": True, "vocab_size": 8192}
    settings = AutoConfig.for_model(values.pop("model_type"), **values, bos_token_id=None, eos_token_id=END)
    AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).save_pretrained(source)
    _write_tokenizer(source)
    config = json.loads((source / "config.json").read_text())
    for form in needs.BITS["openvino"]:
        out = tmp_path / form
        out.mkdir()
        openvino.write(source, config, out, openvino.Params(precision=form, rounding="plain"))
        weights = (out / "openvino_model.bin").stat().st_size
        assert needs.needs(config, "openvino", form, 64).disk - needs.GRAPH == pytest.approx(weights, rel=0.02), form


def test_the_cache_grows_with_context_and_batch_and_the_weights_do_not() -> None:
    config = CATALOGUE["qwen3-0.6b"].config
    for runtime in needs.RUNTIMES:
        for form in needs.BITS[runtime]:
            one, longer, more = (needs.needs(config, runtime, form, *size) for size in ((512, 1), (2048, 1), (512, 4)))
            assert longer.cache == more.cache == 4 * one.cache
            assert longer.weights == one.weights and longer.disk == one.disk and longer.total >= one.total
    assert needs.needs(config, "llama_cpp", "q4_0", 4096).cache == 4096 * 28 * 2 * 8 * 128 * 2


def test_fewer_bits_need_less() -> None:
    for model in CATALOGUE.values():
        for runtime in needs.RUNTIMES:
            rows = [needs.needs(model.config, runtime, form, 256) for form in needs.BITS[runtime]]
            disks = [row.disk for row in rows]
            assert disks == sorted(disks), model.name
            assert all(part >= 0 for row in rows for part in (row.weights, row.cache, row.activations, row.program))


def test_windows_bound_the_cache_only_where_they_are_kept() -> None:
    config = CATALOGUE["gemma-3-1b-it"].config
    every = 26 * 2 * 256
    assert cache.size(config, 4096, windows=False) == 4096 * every * 2
    assert cache.size(config, 4096) == (4 * 4096 + 22 * 512) * 2 * 256 * 2
