"""Adapters as GGUF: read back and multiplied, they give the merged weights in llama.cpp's order of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from slmops.convert import gguf_lora
from slmops.core.digest import digest_file
from slmops.core.method import Context
from slmops.engines.minimal import _write_tokenizer
from slmops.errors import ConversionError, ModelError
from slmops.store import lora
from tests.train import bases

# Written out, so that a wrong name or order shows: layer of Hugging Face to tensor of llama.cpp, and whether rows move.
SPLIT = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
PACKED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            tokenizer = tmp_path_factory.mktemp("tokenizer")
            _write_tokenizer(tokenizer)
            made[kind] = bases.save(kind, tokenizer, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


def convert(base: Path, adapters: dict[str, Path], out: Path, **params: Any) -> dict[str, Any]:
    out.mkdir()
    inputs = {"base": base} | {f"adapter.{name}": folder for name, folder in adapters.items()}
    return gguf_lora.run(gguf_lora.Params(**params), inputs, out, Context(0, out, out))


def rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order, row by row: of each head, row i of the first half and row i of the second, in turn."""
    size = weight.shape[0] // heads
    order = [h * size + half * (size // 2) + i for h in range(heads) for i in range(size // 2) for half in range(2)]
    return weight[order]


def value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


@pytest.mark.parametrize("kind", bases.ARCHITECTURES)
def test_the_file_holds_the_merged_weights(kind: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    two = {
        "plain": bases.adapter(base(kind), tmp_path / "plain", rank=4, seed=1),
        "rs": bases.adapter(base(kind), tmp_path / "rs", tuning="rslora", rank=6, seed=2),
    }
    convert(base(kind), two, tmp_path / "out")
    before = load_file(base(kind) / "model.safetensors")
    manifest = json.loads((tmp_path / "out" / "adapters.json").read_text())
    for name, rank in (("plain", 4), ("rs", 6)):
        file = tmp_path / "out" / f"{name}.gguf"
        assert manifest["adapters"][name]["digest"] == digest_file(file)
        reader = gguf.GGUFReader(file)
        assert value(reader, "general.type") == "adapter"
        assert value(reader, "adapter.type") == "lora"
        assert value(reader, "general.architecture") == kind
        assert value(reader, "slmops.base") == manifest["base"] == lora.base_digest(base(kind))
        alpha = value(reader, "adapter.lora.alpha")
        tensors = {t.name: t.data for t in reader.tensors}
        after = load_file(two[name] / "model.safetensors")
        layers = PACKED if kind == "phi3" else SPLIT
        assert len(tensors) == 2 * 2 * len(layers)
        for number in range(2):
            for layer, short in layers.items():
                a, b = (tensors.pop(f"blk.{number}.{short}.weight.lora_{part}") for part in "ab")
                assert a.shape[0] == b.shape[1] == rank
                key = f"model.layers.{number}.{layer}.weight"
                w, merged = before[key], after[key]
                if kind == "llama" and layer.endswith(("q_proj", "k_proj")):
                    heads = 4 if layer.endswith("q_proj") else 2
                    w, merged = rotary_order(w, heads), rotary_order(merged, heads)
                np.testing.assert_allclose(w + alpha / b.shape[1] * b @ a, merged, atol=1e-5, err_msg=key)
                assert np.abs(merged - w).max() > 0.01
        assert not tensors


def test_half_precision_and_same_bytes(base: Callable[[str], Path], tmp_path: Path) -> None:
    one = {"a": bases.adapter(base("qwen3"), tmp_path / "a", rank=4, seed=1)}
    sizes = [convert(base("qwen3"), one, tmp_path / p, precision=p)["bytes"]["a"] for p in ("fp32", "fp16")]
    assert sizes[1] < 0.6 * sizes[0]
    (tmp_path / "again").mkdir()
    convert(base("qwen3"), one, tmp_path / "again" / "x")
    assert (tmp_path / "again" / "x" / "a.gguf").read_bytes() == (tmp_path / "fp32" / "a.gguf").read_bytes()


def test_what_cannot_be_written(base: Callable[[str], Path], tmp_path: Path) -> None:
    dora = bases.adapter(base("llama"), tmp_path / "dora", tuning="dora", rank=2)
    good = bases.adapter(base("llama"), tmp_path / "good", rank=2)
    with pytest.raises(ModelError, match=r"adapter a: dora .* has no GGUF form"):
        convert(base("llama"), {"a": dora}, tmp_path / "o1")
    with pytest.raises(ModelError, match="belongs to another base"):
        convert(base("qwen3"), {"a": good}, tmp_path / "o2")
    found = lora.read(good)
    with pytest.raises(ConversionError, match="mamba cannot be written") as caught:
        gguf_lora.tensor_names(found, {"model_type": "mamba", "num_hidden_layers": 2})
    assert "qwen3" in caught.value.hint
