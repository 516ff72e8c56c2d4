from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slmops.convert import onnx_genai
from slmops.convert.onnx_genai import Params, supported
from slmops.convert.rounding import round_matrix
from slmops.core.digest import digest_file
from slmops.core.method import Context
from slmops.core.widths import unit_of
from slmops.engines import open_engine
from slmops.engines.fidelity import choose, judge
from slmops.errors import ConversionError


def convert(model: Path, data: Path, out: Path, **params: object) -> dict[str, object]:
    out.mkdir(parents=True)
    context = Context(seed=0, scratch=out.parent, shared=out.parent)
    return onnx_genai.run(Params(fidelity_prompts=6, **params), {"model": model, "data": data}, out, context)


@pytest.fixture(scope="module")
def fp32(llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "fp32"
    convert(llama, data, out, precision="fp32")
    return out


@pytest.mark.slow
def test_fp32_is_the_model_that_torch_runs(fp32: Path) -> None:
    fidelity = json.loads((fp32 / "fidelity.json").read_text())
    assert fidelity["token_agreement"] == 1.0 and fidelity["template_equal"] == 1.0
    assert fidelity["mean_kl"] < 1e-8 and fidelity["max_logit_difference"] < 1e-3
    assert fidelity["positions"] > 20 and fidelity["first_divergence"] is None


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, onnx_genai.ACCURACY_LEVEL], ids=["float activations", "as shipped"])
@pytest.mark.parametrize(
    ("precision", "block", "table", "tied"),
    [
        ("int4", 16, None, True), ("int4", 32, None, True), ("int4", 128, None, True), ("int8", 32, None, True),
        ("int4", 32, "int8", True), ("int4", 32, "int8", False),
    ],
)  # fmt: skip
def test_rounded_model_is_torch_with_rounded_weights(
    make_model: Callable[..., Path], data: Path, tmp_path: Path, precision: str, block: int, table: str | None, tied: bool,
    level: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Torch with every matrix rounded by the written rule gives the logits of the converted model."""
    import torch

    monkeypatch.setattr(onnx_genai, "ACCURACY_LEVEL", level)
    llama = make_model("Llama", tie_word_embeddings=tied)
    facts = convert(
        llama,
        data,
        tmp_path / "out",
        precision=precision,
        block_size=block,
        rounding="plain",
        embedding_precision=table,
    )
    assert not facts["kept_fp32"], "every product and the embedding must be rounded"
    reference = open_engine(llama, kind="torch")
    model = reference.model  # type: ignore[attr-defined]
    bits = 4 if precision == "int4" else 8
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                own = 8 if table == "int8" and ("embed" in name or "lm_head" in name) else bits
                parameter.copy_(torch.from_numpy(round_matrix(parameter.numpy(), own, block).values()))
    converted = open_engine(tmp_path / "out")
    ids = converted.encode([{"role": "user", "content": "is this the same?"}])
    a, b = reference.logits(ids), converted.logits(ids)
    if level == 1:
        assert np.abs(a - b).max() < 1e-4
    else:
        assert np.sqrt(np.square(a - b).mean()) < 0.05 * a.std(), "activations of 8 bits move logits a little"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Qwen3", "Phi3"])
def test_each_matrix_gets_its_own_width(
    kind: str, make_model: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch with every matrix rounded to the width of its unit gives the logits of the converted model."""
    import torch

    monkeypatch.setattr(onnx_genai, "ACCURACY_LEVEL", 1)
    model = make_model(kind, **({"original_max_position_embeddings": 64} if kind == "Phi3" else {}))
    widths = {"table": 8, "0.qkv": 2, "0.o": 8, "0.gate_up": 2, "0.down": 4, "1.qkv": 8, "1.down": 2}
    (tmp_path / "widths").mkdir()
    (tmp_path / "widths" / "widths.json").write_text(json.dumps(widths))
    out = tmp_path / "out"
    out.mkdir()
    inputs = {"model": model, "data": data, "widths": tmp_path / "widths"}
    onnx_genai.run(Params(fidelity_prompts=4, rounding="plain"), inputs, out, Context(0, tmp_path, tmp_path))
    reference = open_engine(model, kind="torch")
    with torch.no_grad():
        for name, weight in reference.model.named_parameters():  # type: ignore[attr-defined]
            if weight.dim() == 2:
                bits = widths.get(unit_of(name) or "", 4)
                weight.copy_(torch.from_numpy(round_matrix(weight.numpy(), bits, 32).values()))
    converted = open_engine(out)
    ids = converted.encode([{"role": "user", "content": "is this the same?"}])
    assert np.abs(reference.logits(ids) - converted.logits(ids)).max() < 1e-4
    with pytest.raises(ConversionError, match=r"convert\.file_mb") as caught:
        convert(model, data, tmp_path / "small", file_mb=0.001)
    assert caught.value.hint


@pytest.mark.slow
def test_small_files(llama: Path, fp32: Path, data: Path, tmp_path: Path) -> None:
    convert(llama, data, tmp_path / "int4", precision="int4")
    weights = sum(p.numel() for p in open_engine(llama, kind="torch").model.parameters())  # type: ignore[attr-defined]
    size = sum(f.stat().st_size for f in (tmp_path / "int4").glob("model.onnx*"))
    assert size < weights * 4.5 / 8 + 12_000, "4 bits and half a bit of scale per weight, and a small graph"
    assert sum(f.stat().st_size for f in fp32.glob("model.onnx*")) < weights * 4 + 12_000


@pytest.mark.slow
def test_the_runtime_keeps_no_memory_plan_for_each_length_of_prompt(fp32: Path) -> None:
    settings = json.loads((fp32 / "genai_config.json").read_text())
    assert settings["model"]["decoder"]["session_options"]["enable_mem_pattern"] is False


def test_two_conversions_give_the_same_bytes(llama: Path, data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "another place" / "model"
    shutil.copytree(llama, moved)
    convert(llama, data, tmp_path / "a", precision="int4")
    convert(moved, data, tmp_path / "b" / "deeper", precision="int4")
    first = {f.name: digest_file(f) for f in (tmp_path / "a").iterdir()}
    second = {f.name: digest_file(f) for f in (tmp_path / "b" / "deeper").iterdir()}
    assert first == second
    assert not any(b"another place" in f.read_bytes() for f in (tmp_path / "b" / "deeper").iterdir())


MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
WIDE = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0}
STRETCHED = {"full_attention": WIDE, "sliding_attention": PLAIN}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "max_position_embeddings": 8}
BOTH = {"full_attention": PLAIN, "sliding_attention": WIDE | {"factor": 2.0}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Qwen3", {"head_dim": 16}),
        ("Qwen2", {}),
        ("Mistral", {"sliding_window": None, "head_dim": 16}),
        ("Phi3", {"original_max_position_embeddings": 64, "tie_word_embeddings": False}),
        ("Gemma3", {"head_dim": 16, "sliding_window": 8, **MIXED}),
        ("Gemma3", {"head_dim": 32, "sliding_window": 100, "hidden_size": 80, "rope_parameters": STRETCHED, **MIXED}),
        (
            "Gemma3",
            {"head_dim": 16, "sliding_window": 8, "tie_word_embeddings": False, "rope_parameters": BOTH, **MIXED},
        ),
    ],
)
def test_architectures(
    architecture: str, changes: dict[str, object], make_model: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    model = make_model(architecture, **changes)
    convert(model, data, tmp_path / "fp32", precision="fp32")
    facts = convert(model, data, tmp_path / "int4", precision="int4")
    fidelity = json.loads((tmp_path / "fp32" / "fidelity.json").read_text())
    assert fidelity["token_agreement"] == 1.0 and fidelity["max_logit_difference"] < 1e-4
    assert not facts["kept_fp32"] and facts["rotary_computed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Llama", {"intermediate_size": 512}),
        ("Llama", {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}),
        ("Qwen3", {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2}),
        ("Qwen3", {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 2}),
        ("Phi3", {"intermediate_size": 256, "original_max_position_embeddings": 64}),
    ],
    ids=["ffn", "hidden", "queries", "keys", "gate and up"],
)
def test_a_layer_as_wide_as_the_vocabulary_is_refused_and_would_come_out_wrong(
    architecture: str, changes: dict[str, object], make_model: Callable[..., Path], data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = make_model(architecture, vocab_size=512, **changes)
    with pytest.raises(ConversionError, match="as many outputs as there are tokens") as caught:
        convert(model, data, tmp_path / "refused", precision="fp32")
    assert caught.value.hint
    monkeypatch.setattr(onnx_genai, "supported", lambda config: None)
    with pytest.raises(ConversionError, match="agrees with PyTorch on"):
        convert(model, data, tmp_path / "wrong", precision="fp32")
    wider = make_model(architecture, vocab_size=544, **changes)
    assert convert(wider, data, tmp_path / "right", precision="fp32")["token_agreement"] == 1.0


@pytest.mark.slow
def test_a_tokenizer_that_the_runtime_reads_otherwise_is_refused(llama: Path, data: Path, tmp_path: Path) -> None:
    model, rows = tmp_path / "model", tmp_path / "data"
    shutil.copytree(llama, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    rows.mkdir()
    row = {"messages": [{"role": "user", "content": "LOUD"}, {"role": "assistant", "content": "x"}]}
    (rows / "validation.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConversionError, match="other token ids"):
        convert(model, rows, tmp_path / "out", precision="int4")


def test_a_float32_model_that_differs_is_an_error() -> None:
    where = {"id": "abc", "step": 3, "reference": "yes", "converted": "no"}
    fidelity = {"template_equal": 1.0, "positions": 10, "token_agreement": 0.9, "first_divergence": where}
    with pytest.raises(ConversionError, match=r"90.00%.*prompt abc, token 3: 'no' instead of 'yes'"):
        judge(fidelity, "fp32", 0.99)
    judge(fidelity, "int4", 0.99)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["BertModel"]}, "BertModel cannot be converted"),
        ({}, r"\(none\)"),
        ({"architectures": ["LlamaForCausalLM"]}, "max_position_embeddings"),
        (
            {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8, "quantization_config": {"bits": 4}},
            "quantised already",
        ),
        (GEMMA3 | {"use_bidirectional_attention": True}, "both directions"),
        (GEMMA3 | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "type yarn"),
        (GEMMA3 | {"rope_parameters": STRETCHED | {"sliding_attention": {"rope_type": "dynamic"}}}, "type dynamic"),
    ],
)
def test_what_cannot_be_converted_is_refused_first(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        supported(config)
    assert caught.value.hint


def test_fidelity_prompts_come_from_validation(data: Path, tmp_path: Path) -> None:
    chosen = choose(data, 5)
    assert len(chosen) == 5 and all("validation" in e.text for e in chosen)
    assert [e.id for e in chosen] == sorted(e.id for e in choose(data, 100))[:5]
    with pytest.raises(ConversionError, match="no validation prompts"):
        choose(tmp_path, 5)
