"""MLX and OpenVINO: each computes what torch does, what is rounded is what was meant, and each runtime's own loader takes the folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slmops.convert import mlx, openvino
from slmops.convert.rounding import round_matrix
from slmops.core.engine import Sampling
from slmops.core.method import Context, SilentProgress
from slmops.engines import detect, open_engine
from slmops.engines.minimal import PROMPT
from slmops.errors import ConversionError, MissingExtraError, ModelError
from tests.convert.agreement import check

pytestmark = pytest.mark.slow

Decoder = Callable[..., Path]
METHODS = {"mlx": mlx, "openvino": openvino}
BOTH = pytest.mark.parametrize("method", [mlx, openvino], ids=METHODS)
FULL = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SHORT, LONG = [1.0, 1.2, 1.5, 1.7, 2.0, 2.5], [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 2e4, "short_factor": SHORT, "long_factor": LONG, "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 128,
}  # fmt: skip
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}}),
    ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4}),
    (
        "phi3",
        {"rope_parameters": LONGROPE, "max_position_embeddings": 256, "original_max_position_embeddings": 128},
    ),
    (
        "gemma3",
        {
            "rope_parameters": {"full_attention": FULL, "sliding_attention": LOCAL},
            "query_pre_attn_scalar": 32,
            "hidden_size": 96,
        },
    ),
]


def convert(method: ModuleType, model: Path, data: Path, out: Path, **params: Any) -> tuple[dict[str, Any], list[str]]:
    out.mkdir()
    progress = SilentProgress()
    context = Context(0, out, out, progress=progress)
    facts = method.run(method.Params(fidelity_prompts=4, **params), {"model": model, "data": data}, out, context)
    return facts, progress.lines


def mlx_matrix(folder: Path, name: str) -> Any:
    """The values of a rounded matrix, as MLX itself reads them, in float32."""
    import mlx.core as mx

    found = mx.load(str(folder / "model.safetensors"))
    codes, scales, offsets = (found[f"{name}.{part}"] for part in ("weight", "scales", "biases"))
    bits = codes.shape[1] // scales.shape[1]  # 32 codes of a group in so many words of 32 bits
    return np.array(
        mx.dequantize(codes, scales.astype(mx.float32), offsets.astype(mx.float32), group_size=32, bits=bits)
    )


def openvino_constants(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    import openvino as ov

    model = ov.Core().read_model(folder / "openvino_model.xml")
    nodes = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    return [(node.get_element_type().get_type_name(), tuple(node.get_output_shape(0))) for node in nodes]


@BOTH
@pytest.mark.parametrize(("kind", "changes"), MODELS)
def test_fp32_is_torch(
    method: ModuleType, kind: str, changes: dict[str, Any], decoder: Decoder, data: Path, tmp_path: Path
) -> None:
    """Rotary positions of every kind, windows, shared keys, biases: 64 greedy tokens and all logits on the way."""
    source = decoder(kind, **changes)
    facts, _ = convert(method, source, data, tmp_path / "a", precision="fp32")
    assert facts["token_agreement"] == 1.0 and detect(tmp_path / "a") in METHODS
    engine, reference = open_engine(tmp_path / "a"), open_engine(source)
    assert engine.context_length == 128
    assert check(engine, reference, 1e-4) > 0
    engine.close()
    (tmp_path / "b").mkdir()
    method.write(
        source,
        *([mlx.settings(json.loads((source / "config.json").read_text()))] if method is mlx else []),
        *([json.loads((source / "config.json").read_text())] if method is openvino else []),
        tmp_path / "b",
        method.Params(precision="fp32"),
    )
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes(), f"{file.name} differs a second time"


@BOTH
def test_long_prompts_go_through_in_parts(method: ModuleType, decoder: Decoder, data: Path, tmp_path: Path) -> None:
    source = decoder("gemma3", max_position_embeddings=1200)
    convert(method, source, data, tmp_path / "out", precision="fp32")
    ids = [5 + (i * i) % 200 for i in range(1100)]
    engine, reference = open_engine(tmp_path / "out"), open_engine(source)
    wanted = reference.generate([ids], Sampling(4))[0]
    assert engine.generate([ids], Sampling(4))[0].tokens == wanted.tokens


@BOTH
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_fewer_bits(method: ModuleType, precision: str, decoder: Decoder, data: Path, tmp_path: Path) -> None:
    source = decoder("qwen3")
    facts, lines = convert(method, source, data, tmp_path / "out", precision=precision)
    assert lines == [] and facts["rounded"] == (0 if precision == "fp16" else 15)
    assert facts["mean_kl"] < {"fp16": 1e-4, "int8": 0.01, "int4": 0.5}[precision]
    engine = open_engine(tmp_path / "out")
    ids = engine.encode(PROMPT)
    answer = engine.generate([ids], Sampling(8, ignore_end=True))[0]
    rows = engine.logits([*ids, *answer.tokens])
    assert len(answer.tokens) == 8 and np.isfinite(rows).all()


def test_mlx_lm_loads_the_folder_by_itself(decoder: Decoder, data: Path, tmp_path: Path) -> None:
    import mlx_lm

    convert(mlx, decoder("phi3"), data, tmp_path / "out", precision="int4", embedding_precision="int8")
    model, tokenizer, config = mlx_lm.load(str(tmp_path / "out"), return_config=True)
    assert config["quantization"] == config["quantization_config"] and config["quantization"]["bits"] == 4
    assert model.model.embed_tokens.bits == 8 and model.model.layers[0].mlp.down_proj.bits == 4
    prompt = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True)
    text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=6)
    engine = open_engine(tmp_path / "out")
    assert prompt == engine.encode(PROMPT)
    assert text.strip("\ufffd") == engine.generate([prompt], Sampling(6))[0].text.strip("\ufffd")


def test_openvino_runs_the_folder_by_itself(decoder: Decoder, data: Path, tmp_path: Path) -> None:
    import openvino as ov

    facts, _ = convert(openvino, decoder("llama"), data, tmp_path / "out", precision="int4", embedding_precision="int8")
    found = openvino_constants(tmp_path / "out")
    assert sum(kind == "i4" for kind, _ in found) == 14 and ("i8", (261, 64)) in found and facts["rounded"] == 15
    request = ov.compile_model(tmp_path / "out" / "openvino_model.xml", "CPU").create_infer_request()
    engine = open_engine(tmp_path / "out")
    ids = engine.encode(PROMPT)
    both = [[*ids, 7, 8], [*ids, 9, 7]]
    given = {"input_ids": both, "attention_mask": np.ones((2, len(both[0]))), "position_ids": [range(len(both[0]))] * 2}
    request.infer({k: np.array(v, np.int64) for k, v in given.items()} | {"beam_idx": np.arange(2, dtype=np.int32)})
    wanted = request.get_tensor("logits").data[1, -1].argmax()
    assert engine.logits(both[1])[-1].argmax() == wanted  # two rows at once, as a server feeds them


@BOTH
def test_weights_on_the_grid_stay_as_they_are(method: ModuleType, decoder: Decoder, data: Path, tmp_path: Path) -> None:
    """So what GPTQ has rounded is what MLX and OpenVINO compute with."""
    source = tmp_path / "source"
    shutil.copytree(decoder("llama"), source)
    weights = load_file(source / "model.safetensors")
    for name, values in weights.items():
        if values.ndim == 2:
            weights[name] = round_matrix(values, 4, 32).values()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    facts, _ = convert(method, source, data, tmp_path / "out", precision="int4", rounding="plain")
    assert facts["mean_kl"] < (1e-6 if method is mlx else 1e-3)  # OpenVINO rounds what goes into such a product too
    if method is mlx:
        name = "model.layers.1.mlp.down_proj"
        np.testing.assert_array_equal(mlx_matrix(tmp_path / "out", name), weights[f"{name}.weight"])


def test_mlx_int8_is_near(decoder: Decoder, data: Path, tmp_path: Path) -> None:
    source = decoder("llama")
    convert(mlx, source, data, tmp_path / "out", precision="int8")
    name = "model.layers.0.self_attn.q_proj"
    wanted = load_file(source / "model.safetensors")[f"{name}.weight"]
    found = mlx_matrix(tmp_path / "out", name)
    np.testing.assert_array_equal(found, round_matrix(wanted, 8, 32, search=True).values())
    assert 0 < np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max()


def test_narrow_matrices_are_said(decoder: Decoder, data: Path, tmp_path: Path) -> None:
    narrow = decoder("llama", intermediate_size=72)
    facts, lines = convert(openvino, narrow, data, tmp_path / "ov", precision="int4")
    assert facts["in_int8"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert "2 matrices are in int8" in lines[0] and ("i8", (64, 72)) in openvino_constants(tmp_path / "ov")
    facts, lines = convert(mlx, narrow, data, tmp_path / "mlx", precision="int4")
    assert facts["kept_fp16"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)] and facts["rounded"] == 13
    assert "2 of 15 matrices stay fp16" in lines[0]
    with pytest.raises(ConversionError, match="multiple of 128") as caught:
        convert(mlx, narrow, data, tmp_path / "none", precision="int4", block_size=128)
    assert "groups of 32" in caught.value.hint


@pytest.mark.parametrize(("methods", "kind", "changes", "says"), [
    ("mlx openvino", "llama", {"model_type": "mamba"}, "type mamba cannot"),
    ("mlx openvino", "llama", {"quantization_config": {"bits": 4}}, "quantised already"),
    ("mlx openvino", "llama", {"hidden_act": "gelu"}, "activation is gelu"),
    ("mlx openvino", "qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "type yarn in a qwen3"),
    ("mlx openvino", "qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "attend to a window"),
    ("mlx openvino", "gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("mlx", "gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("mlx", "gemma3", {"layer_types": ["sliding_attention"] * 2}, "layers that see all"),
    ("mlx", "qwen3", {"attention_bias": True}, "attention has biases"),
    ("mlx", "phi3", {"rope_parameters": LONGROPE | {"attention_factor": 3.0}}, "attention_factor"),
    ("openvino", "llama", {"num_hidden_layers": 1}, r"no place for the tensor model.layers.1"),
    ("openvino", "llama", {"num_hidden_layers": 3}, r"no tensor model.layers.2"),
    ("openvino", "llama", {"intermediate_size": 64}, r"down_proj.weight has the shape \(64, 128\)"),
    ("mlx", "llama", {"num_hidden_layers": 1}, r"mlx-lm failed"),
])  # fmt: skip
def test_refused(
    methods: str, kind: str, changes: dict[str, Any], says: str, decoder: Decoder, data: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(decoder(kind), source)
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    for name in methods.split():
        with pytest.raises(ConversionError, match=says) as caught:
            convert(METHODS[name], source, data, tmp_path / name)
        assert caught.value.hint


def test_openvino_computes_soft_caps(decoder: Decoder, data: Path, tmp_path: Path) -> None:
    source = decoder("gemma3", final_logit_softcapping=5.0)
    facts, _ = convert(openvino, source, data, tmp_path / "out", precision="fp32")
    assert facts["token_agreement"] == 1.0 and facts["mean_kl"] < 1e-8


@BOTH
def test_a_conversion_that_is_wrong_is_an_error(
    method: ModuleType, decoder: Decoder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slmops.core import runtimes

    right = runtimes.rotary
    monkeypatch.setattr(runtimes, "rotary", lambda *given: right(*given) | {"rope_theta": 3.0})
    with pytest.raises(ConversionError, match="agrees with PyTorch on"):
        convert(method, decoder("llama"), data, tmp_path / "out", precision="fp32")


@pytest.mark.parametrize(("name", "file", "text", "says"), [
    ("mlx", "model.safetensors", None, "cannot be loaded"),
    ("mlx", "config.json", "{}", "cannot be loaded"),
    ("mlx", "tokenizer.json", "", "no tokenizer.json"),
    ("mlx", "tokenizer.json", "{}", "cannot be read"),
    ("openvino", "openvino_model.bin", "", "cannot be loaded"),
    ("openvino", "openvino_model.xml", "<net", "cannot be loaded"),
    ("openvino", "config.json", "", "config.json cannot be read"),
    ("openvino", "chat_template.jinja", "{% if %}", "cannot be read"),
])  # fmt: skip
def test_broken_folders(name: str, file: str, text: str | None, says: str, tmp_path: Path) -> None:
    """An empty text stands for a file that is gone, None for one that is cut."""
    from slmops.engines.minimal import write_minimal

    write_minimal(tmp_path, name)  # type: ignore[arg-type]
    place = tmp_path / file
    if text is None:
        place.write_bytes(place.read_bytes()[:-100])
    elif text:
        place.write_text(text)
    else:
        place.unlink()
    with pytest.raises(ModelError, match=says) as caught:
        open_engine(tmp_path)
    assert caught.value.hint


def test_limits_of_the_process_stay() -> None:
    """mlx-lm lowers how many files a process may open, for good, when it is imported."""
    code = "import resource as r; b = r.getrlimit(r.RLIMIT_NOFILE); from slmops.engines.mlx import library; library(); "
    code += "assert r.getrlimit(r.RLIMIT_NOFILE) == b, b"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(("name", "module"), [("mlx", "mlx_lm.utils"), ("openvino", "openvino")])
def test_a_missing_runtime_names_its_extra(
    name: str, module: str, decoder: Decoder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as caught:
        convert(METHODS[name], decoder("llama"), data, tmp_path / "out")
    assert f"slmops[{name}]" in caught.value.hint
