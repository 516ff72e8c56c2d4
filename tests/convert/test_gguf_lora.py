"""Adapters as GGUF: they hold the merged weights, and llama.cpp switches between them to the tokens of torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from slmops.convert import gguf_lora, gguf_names
from slmops.core.digest import digest_file
from slmops.core.engine import Sampling
from slmops.core.method import Context
from slmops.engines import open_engine
from slmops.engines.minimal import _write_tokenizer
from slmops.errors import ConversionError, ModelError
from slmops.store import lora
from tests.convert.agreement import PROMPTS, check, with_adapter
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


def convert(model: Path, adapters: dict[str, Path], out: Path, **params: Any) -> dict[str, Any]:
    out.mkdir()
    inputs = {"base": model} | {f"adapter.{name}": folder for name, folder in adapters.items()}
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
        file = tmp_path / "out" / "adapters" / f"{name}.gguf"
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
    convert(base("qwen3"), one, tmp_path / "again")
    for file in ("model.gguf", "adapters/a.gguf", "adapters.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "fp32" / file).read_bytes()


def test_with_and_without_the_base(base: Callable[[str], Path], tmp_path: Path) -> None:
    one = {"a": bases.adapter(base("llama"), tmp_path / "a", rank=2, seed=1)}
    alone = convert(base("llama"), one, tmp_path / "alone", base="none")
    assert sorted(p.name for p in (tmp_path / "alone").rglob("*")) == ["a.gguf", "adapters", "adapters.json"]
    assert "base" not in alone
    whole = convert(base("llama"), one, tmp_path / "whole", base="q8_0")
    assert whole["base"]["precision"] == "q8_0"
    assert whole["base"]["model_bytes"] == (tmp_path / "whole" / "model.gguf").stat().st_size


def test_what_cannot_be_written(base: Callable[[str], Path], tmp_path: Path) -> None:
    dora = bases.adapter(base("llama"), tmp_path / "dora", tuning="dora", rank=2)
    good = bases.adapter(base("llama"), tmp_path / "good", rank=2)
    with pytest.raises(ModelError, match=r"adapter a: dora .* has no GGUF form"):
        convert(base("llama"), {"a": dora}, tmp_path / "o1")
    with pytest.raises(ModelError, match="belongs to another base"):
        convert(base("qwen3"), {"a": good}, tmp_path / "o2")
    assert not list((tmp_path / "o1").iterdir())
    assert not list((tmp_path / "o2").iterdir())
    found = lora.read(good)
    with pytest.raises(ConversionError, match="type mamba cannot be written") as caught:
        gguf_lora.tensor_names(found, {"model_type": "mamba", "num_hidden_layers": 2})
    assert "qwen3" in caught.value.hint


# From here on llama.cpp runs.

ATOL = {"llama": 1e-4, "qwen3": 1e-4, "phi3": 1e-4, "gemma3": 1e-2}  # gemma3: llama.cpp's GELU is a float16 table


@pytest.fixture(scope="module")
def two(base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Two adapters of different kind, rank and targets."""

    def get(kind: str) -> dict[str, Path]:
        out = tmp_path_factory.mktemp(f"adapters-{kind}")
        few = ("qkv_proj", "down_proj") if kind == "phi3" else ("q_proj", "v_proj", "down_proj")
        return {
            "cards": bases.adapter(base(kind), out / "cards", rank=4, seed=1),
            "mail": bases.adapter(base(kind), out / "mail", tuning="rslora", rank=7, seed=2, targets=few),
        }

    return get


@pytest.mark.slow
@pytest.mark.parametrize("kind", bases.ARCHITECTURES)
def test_each_adapter_answers_as_in_torch(
    kind: str, base: Callable[[str], Path], two: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    """One model is loaded once; adapters are switched on and off in it."""
    adapters = two(kind)
    convert(base(kind), adapters, tmp_path / "out", base="fp32")
    engine: Any = open_engine(tmp_path / "out", adapter="mail")
    model, found = engine._model, {}
    ids = engine.encode([{"role": "user", "content": PROMPTS[0]}])
    for name in ("mail", None, "cards", "mail", None):
        engine.use(name)
        reference = with_adapter(base(kind), adapters[name] if name else None)
        print(kind, name, "largest difference of logits", check(engine, reference, ATOL[kind]))
        reference.close()
        engine.end_ids = frozenset([4])
        found[name] = engine.generate([ids], Sampling(max_new_tokens=24))[0].tokens
        endless = engine.generate([ids], Sampling(max_new_tokens=24, ignore_end=True))[0].tokens
        assert [several.tokens for several in engine.at_once([ids, ids], 24)] == [endless, endless]
    assert engine._model is model
    assert len(set(found.values())) == 3
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "q8_0"])
def test_over_a_rounded_base(
    precision: str, base: Callable[[str], Path], two: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    """The adapters stay as they are; each is closest to itself in torch, of all three."""
    adapters = two("llama")
    convert(base("llama"), adapters, tmp_path / "out", base=precision)
    engine: Any = open_engine(tmp_path / "out")
    ids = engine.encode([{"role": "user", "content": PROMPTS[0]}])
    exact = {name: with_adapter(base("llama"), adapters.get(name)).logits(ids) for name in ("", *adapters)}
    for name in exact:
        engine.use(name or None)
        rounded = engine.logits(ids)
        distances = {other: float(np.abs(rounded - logits).mean()) for other, logits in exact.items()}
        assert 2 * distances.pop(name) < min(distances.values())
    engine.close()


def swapped(values: Any, layer: str, config: Any) -> Any:
    return values[::-1] if layer.endswith("v_proj") else ROWS(values, layer, config)


ROWS = gguf_names.rows
BROKEN = {
    "rows as in Hugging Face": (gguf_names, "rows", lambda values, layer, config: values),
    "rows in another order": (gguf_names, "rows", swapped),
    "another scale": (lora.Adapter, "rank", 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_a_wrong_adapter_is_found(
    fault: str,
    base: Callable[[str], Path],
    two: Callable[[str], dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The comparison above can fail: each of these files loads and answers, over a base that is right."""
    adapters = two("llama")
    convert(base("llama"), {"cards": adapters["cards"]}, tmp_path / "right", base="fp32")
    monkeypatch.setattr(*BROKEN[fault])
    convert(base("llama"), {"cards": adapters["cards"]}, tmp_path / "wrong", base="none")
    (tmp_path / "wrong" / "model.gguf").write_bytes((tmp_path / "right" / "model.gguf").read_bytes())
    right, wrong = (open_engine(tmp_path / which, adapter="cards") for which in ("right", "wrong"))
    check(right, with_adapter(base("llama"), adapters["cards"]), ATOL["llama"])
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(wrong, with_adapter(base("llama"), adapters["cards"]), 0.02)
    right.close()
    wrong.close()


@pytest.mark.slow
def test_opening_what_is_not_there(
    base: Callable[[str], Path], two: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(base("llama"), {"cards": two("llama")["cards"]}, out)
    with pytest.raises(ModelError, match="no adapter card") as caught:
        open_engine(out, adapter="card")
    assert caught.value.hint == "did you mean cards?"
    (out / "adapters" / "cards.gguf").write_bytes(b"other")
    with pytest.raises(ModelError, match="not as it was written"):
        open_engine(out, adapter="cards")
    convert(base("qwen3"), {"cards": bases.adapter(base("qwen3"), tmp_path / "q", rank=2)}, tmp_path / "other")
    for file in ("adapters.json", "adapters/cards.gguf"):
        (out / file).write_bytes((tmp_path / "other" / file).read_bytes())
    with pytest.raises(ModelError, match=r"cannot be loaded: .*mismatch"):
        open_engine(out, adapter="cards")
