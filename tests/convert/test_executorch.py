"""ExecuTorch: it computes what torch does, what is rounded is what was meant, and the runtime's own runner for text takes the folder."""

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

from slmops.convert import executorch, executorch_graph
from slmops.core.engine import Sampling
from slmops.core.method import Context, SilentProgress
from slmops.engines import detect, open_engine
from slmops.engines.minimal import END, PROMPT, SPECIAL, TEMPLATE, write_minimal
from slmops.engines.plain_tokenizer import compile_template, render
from slmops.errors import ConversionError, MissingExtraError, ModelError
from tests.convert.agreement import check
from tests.convert.test_other_runtimes import FULL, LLAMA3, LOCAL, LONGROPE

pytestmark = pytest.mark.slow

Decoder = Callable[..., Path]
PRINTABLE = range(len(SPECIAL) + 33, len(SPECIAL) + 127)
"""Ids of the tokens that are a printable character."""
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"head_dim": 32, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}}),
    ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("phi3", {"rope_parameters": LONGROPE, "max_position_embeddings": 256, "original_max_position_embeddings": 128}),
    (
        "gemma3",
        {
            "rope_parameters": {"full_attention": FULL, "sliding_attention": LOCAL},
            "query_pre_attn_scalar": 32,
            "hidden_size": 96,
            "final_logit_softcapping": 5.0,
        },
    ),
]


def convert(model: Path, data: Path, out: Path, **params: Any) -> tuple[dict[str, Any], list[str]]:
    out.mkdir()
    progress = SilentProgress()
    context = Context(0, out, out, progress=progress)
    given = {"model": model, "data": data}
    facts = executorch.run(executorch.Params(fidelity_prompts=4, **params), given, out, context)
    return facts, progress.lines


@pytest.mark.parametrize(("kind", "changes"), MODELS, ids=[kind for kind, _ in MODELS])
def test_fp32_is_torch(kind: str, changes: dict[str, Any], decoder: Decoder, data: Path, tmp_path: Path) -> None:
    """Rotary positions of every kind, windows, shared keys, biases: greedy tokens and all logits on the way, in parts of any length."""
    source = decoder(kind, **changes)
    facts, _ = convert(source, data, tmp_path / "out", precision="fp32")
    assert facts["token_agreement"] == 1.0 and detect(tmp_path / "out") == "executorch"
    engine, reference = open_engine(tmp_path / "out"), open_engine(source)
    assert engine.context_length == facts["context"] == 128
    assert check(engine, reference, 1e-4) > 0
    ids = [5 + (i * i) % 200 for i in range(120)]
    wanted = reference.logits(ids)
    for first in (1, 50, 119):
        np.testing.assert_allclose(engine.feed(ids[:first], 0), wanted[first - 1], atol=1e-4)
        np.testing.assert_allclose(engine.feed(ids[first:], first), wanted[-1], atol=1e-4)


@pytest.fixture(scope="module")
def int4(decoder: Decoder, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A llama that says printable characters alone, what became of it in int4 with its table in int8, and the facts."""
    source = decoder("llama", intermediate_size=72)
    weights = load_file(source / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = np.zeros_like(table)
    weights["model.embed_tokens.weight"][[*PRINTABLE]] = table[[*PRINTABLE]]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path_factory.mktemp("int4") / "out"
    facts, lines = convert(source, data, out, precision="int4", embedding_precision="int8")
    assert "2 matrices are in int8" in lines[0]
    return source, out, facts


def test_int4_is_the_model_of_its_codes(int4: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    """Torch with the rounded weights says about the same, from inputs that are not rounded."""
    import torch

    source, out, facts = int4
    assert facts["in_int8"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)] and facts["rounded"] == 15
    shutil.copytree(source, tmp_path / "rounded")
    weights = load_file(source / "model.safetensors")
    for name, values in weights.items():
        if values.ndim == 2:
            bits = 8 if "embed" in name or "down" in name else 4
            block = values.shape[1] if bits == 8 else 32
            codes, scales = executorch_graph.round_up(torch.from_numpy(values), bits, block)
            weights[name] = (codes.reshape(len(codes), -1, block) * scales[..., None]).reshape(values.shape).numpy()
    save_file(weights, tmp_path / "rounded" / "model.safetensors", metadata={"format": "pt"})
    engine, wanted, before = open_engine(out), open_engine(tmp_path / "rounded"), open_engine(source)
    ids = [PRINTABLE[(i * i) % len(PRINTABLE)] for i in range(60)]
    rows, near, far = engine.logits(ids), wanted.logits(ids), before.logits(ids)
    assert np.abs(rows - near).mean() < 0.25 * np.abs(rows - far).mean()


def test_the_runner_of_executorch_takes_the_folder(
    int4: tuple[Path, Path, dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    """What an app on a phone starts: the program, the file of the tokenizer, a rendered prompt."""
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    _, out, _ = int4
    engine = open_engine(out)
    wanted = engine.generate([engine.encode(PROMPT)], Sampling(6))[0]
    template = compile_template(TEMPLATE, out)
    assert template is not None
    runner = TextLLMRunner(str(out / "model.pte"), str(out / "tokenizer.json"))
    said: list[str] = []
    config = GenerationConfig(max_new_tokens=6, temperature=0.0, echo=False)
    runner.generate(render(template, PROMPT, {}), config, said.append)
    assert len(said) == 6 and "".join(said) == wanted.text


def test_what_the_program_says_of_itself(int4: tuple[Path, Path, dict[str, Any]]) -> None:
    from slmops.engines.executorch import library

    program = library()._load_for_executorch(str(int4[1] / "model.pte"))
    asked = {name: program.run_method(name, []) for name in program.method_names() if name != "forward"}
    assert asked == {
        "get_max_seq_len": [128], "get_max_context_len": [128], "get_vocab_size": [261], "get_eos_ids": [END], "get_n_layers": [2],
        "use_kv_cache": [True], "use_sdpa_with_kv_cache": [True], "enable_dynamic_shape": [True],
    }  # fmt: skip


def test_int8_is_near(decoder: Decoder, data: Path, tmp_path: Path) -> None:
    facts, lines = convert(decoder("qwen3"), data, tmp_path / "out", precision="int8", context=64)
    assert lines == ["the context ends at 64 of 128 tokens"] and facts["rounded"] == 15 and facts["mean_kl"] < 0.01
    engine = open_engine(tmp_path / "out")
    assert engine.context_length == 64
    with pytest.raises(ModelError, match="holds 64"):
        engine.generate([[5] * 64], Sampling(1))


def test_rounding_keeps_what_is_on_the_grid() -> None:
    import torch

    numbers = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (64, 3, 32), generator=numbers)
    codes[:, :, 0] = torch.where(torch.rand(64, 3, generator=numbers) < 0.5, -8, 7)
    scales = torch.rand(64, 3, generator=numbers).to(torch.bfloat16).float() + 2.0**-8
    scales = scales.to(torch.bfloat16).float()
    values = (codes * scales[..., None]).reshape(64, 96)
    values[5] = 0.0
    found, steps = executorch_graph.round_up(values, 4, 32)
    assert torch.equal((found.reshape(64, 3, 32) * steps[..., None]).reshape(64, 96), values) and steps.min() > 0
    values = torch.randn(64, 96, generator=numbers)
    for bits, block in ((4, 32), (8, 96)):
        found, steps = executorch_graph.round_up(values, bits, block)
        assert steps.min() > 0 and (bits == 8 or torch.equal(steps, steps.to(torch.bfloat16).float()))
        error = (found.reshape(64, -1, block) * steps[..., None] - values.reshape(64, -1, block)).square().sum(-1)
        largest = values.reshape(64, -1, block).abs().amax(-1)
        plain = (largest / ((1 << (bits - 1)) - 1))[..., None]
        plain = plain.to(torch.bfloat16).float() if bits == 4 else plain
        nearest = (values.reshape(64, -1, block) / plain).round() * plain
        assert (error <= (nearest - values.reshape(64, -1, block)).square().sum(-1) + 1e-5).all()


@pytest.mark.parametrize(("kind", "changes", "says"), [
    ("llama", {"model_type": "mamba"}, "type mamba cannot"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantised already"),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "type yarn in a qwen3"),
    ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "attend to a window"),
    ("llama", {"num_hidden_layers": 1}, r"no place for the tensor model.layers.1"),
])  # fmt: skip
def test_refused(kind: str, changes: dict[str, Any], says: str, decoder: Decoder, data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(decoder(kind), source)
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=says) as caught:
        convert(source, data, tmp_path / "out")
    assert caught.value.hint


@pytest.mark.parametrize(("file", "text", "says"), [
    ("model.pte", None, "cannot be loaded"),
    ("model.pte", "", "is not a model|has a config.json but no"),
    ("config.json", "", "config.json cannot be read"),
    ("tokenizer.json", "", "no tokenizer.json"),
])  # fmt: skip
def test_broken_folders(file: str, text: str | None, says: str, minimal: Path, tmp_path: Path) -> None:
    """An empty text stands for a file that is gone, None for one that is cut."""
    shutil.copytree(minimal, tmp_path / "out")
    place = tmp_path / "out" / file
    if text is None:
        place.write_bytes(place.read_bytes()[:200])
    else:
        place.unlink()
    with pytest.raises(ModelError, match=says) as caught:
        open_engine(tmp_path / "out")
    assert caught.value.hint


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minimal")
    write_minimal(folder, "executorch")
    return folder


def test_the_same_model_gives_the_same_bytes(minimal: Path, tmp_path: Path) -> None:
    write_minimal(tmp_path, "executorch")
    assert (tmp_path / "model.pte").read_bytes() == (minimal / "model.pte").read_bytes()


def test_a_missing_runtime_names_its_extra(
    decoder: Decoder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(MissingExtraError) as caught:
        convert(decoder("llama"), data, tmp_path / "out")
    assert "slmops[executorch]" in caught.value.hint
