"""A folder of weights in 16 bits: their type, what is beside them, and that transformers loads it so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from slmops.convert import safetensors
from slmops.core.method import Context
from slmops.engines.minimal import END, PROMPT
from slmops.errors import ConversionError

Decoder = Callable[..., Path]


def convert(model: Path, data: Path, out: Path, **params: Any) -> dict[str, Any]:
    out.mkdir()
    settings = safetensors.Params(fidelity_prompts=4, **params)
    return safetensors.run(settings, {"model": model, "data": data}, out, Context(0, out, out))


@pytest.mark.parametrize(("precision", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_transformers_loads_it_in_its_type(
    precision: str, kind: torch.dtype, llama: Path, data: Path, tmp_path: Path
) -> None:
    facts = convert(llama, data, tmp_path / "out", precision=precision)
    assert facts["token_agreement"] > 0.9 and 0 < facts["mean_kl"] < 0.01
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(kind).removeprefix("torch.")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.dtype == kind and not report["missing_keys"] and not report["unexpected_keys"]
    wanted = load_file(llama / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].to(kind)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, wanted)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True)["input_ids"][0] == 2
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == END


def test_parts_an_index_and_end_tokens(llama: Path, data: Path, tmp_path: Path) -> None:
    """Weights in several files keep them; without a generation_config.json there is one with the end token."""
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    (source / "generation_config.json").unlink()
    names = sorted(weights)
    for i, part in enumerate((names[:7], names[7:])):
        save_file({name: weights[name] for name in part}, source / f"model-{i}.safetensors")
    places = {name: f"model-{int(i >= 7)}.safetensors" for i, name in enumerate(names)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    convert(source, data, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == places
    assert index["metadata"]["total_size"] == 2 * sum(weight.numel() for weight in weights.values())
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [END]}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_values_that_do_not_fit_are_refused(llama: Path, data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"model.norm.weight has values that float16 cannot hold") as caught:
        convert(source, data, tmp_path / "out", precision="fp16")
    assert "bf16" in caught.value.hint
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"bits": 4}}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="quantised already"):
        convert(source, data, tmp_path / "other")
