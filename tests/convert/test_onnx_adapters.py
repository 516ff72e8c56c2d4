"""One base and several adapters in ONNX Runtime GenAI: each answers as PEFT does in torch, and so does the base alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from slmops.convert import onnx_adapters
from slmops.core.digest import digest_file
from slmops.core.engine import Sampling
from slmops.core.method import Context
from slmops.engines import open_engine
from slmops.engines.minimal import _write_tokenizer
from slmops.engines.onnx_genai import GenaiEngine
from slmops.errors import ConversionError, ModelError
from slmops.store import lora
from tests.train import bases

PROMPT = [{"role": "user", "content": "where is my parcel?"}]
KINDS = bases.ARCHITECTURES


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            tokenizer = tmp_path_factory.mktemp("tokenizer")
            _write_tokenizer(tokenizer)
            # The builder takes a phi3 with another context for one with scaled positions.
            settings = {"context": 4096} if kind == "phi3" else {}
            made[kind] = bases.save(kind, tokenizer, tmp_path_factory.mktemp(kind), **settings)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def adapters(base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Two adapters of different kind, rank and targets."""
    made: dict[str, dict[str, Path]] = {}

    def get(kind: str) -> dict[str, Path]:
        if kind not in made:
            out = tmp_path_factory.mktemp(f"adapters-{kind}")
            few = ("qkv_proj", "down_proj") if kind == "phi3" else ("q_proj", "v_proj", "down_proj")
            made[kind] = {
                "cards": bases.adapter(base(kind), out / "cards", rank=4, seed=1),
                "mail": bases.adapter(base(kind), out / "mail", tuning="rslora", rank=7, seed=2, targets=few),
            }
        return made[kind]

    return get


def convert(
    base: Path, adapters: dict[str, Path], data: Path, out: Path, precision: str = "fp32", **params: Any
) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    inputs = {"base": base} | {f"adapter.{n}": f for n, f in adapters.items()} | {f"data.{n}": data for n in adapters}
    settings = onnx_adapters.Params(precision=precision, fidelity_prompts=4, **params)
    return onnx_adapters.run(settings, inputs, out, Context(0, out / "scratch", out))


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "qwen3" else pytest.mark.slow) for k in KINDS])
def test_each_adapter_answers_as_in_torch(
    kind: str, base: Callable[[str], Path], adapters: Callable[[str], dict[str, Path]], data: Path, tmp_path: Path
) -> None:
    facts = convert(base(kind), adapters(kind), data, tmp_path / "out")
    assert facts["token_agreement"] == {"(none)": 1.0, "cards": 1.0, "mail": 1.0}
    engine = open_engine(tmp_path / "out", adapter="mail")
    assert isinstance(engine, GenaiEngine)
    ids = engine.encode(PROMPT)
    answers = {}
    for name in ("mail", None, "cards", "mail", None):  # switched back and forth while the model stays loaded
        engine.use(name)
        plain = AutoModelForCausalLM.from_pretrained(base(kind))
        model = PeftModel.from_pretrained(plain, str(adapters(kind)[name] / "adapter")) if name else plain
        options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            wanted = model.eval().generate(input_ids=torch.tensor([ids]), **options)[0, len(ids) :].tolist()
            logits = model(torch.tensor([ids])).logits[0].numpy()
        answer = engine.generate([ids, ids], Sampling(max_new_tokens=24))
        assert answer[0].tokens == answer[1].tokens == tuple(wanted)
        np.testing.assert_allclose(engine.logits(ids), logits, atol=1e-3)
        answers[name] = answer[0].tokens
        endless = engine.generate([ids], Sampling(max_new_tokens=24, ignore_end=True))[0].tokens
        assert [several.tokens for several in engine.at_once([ids, ids], 24)] == [endless, endless]
    assert len(set(answers.values())) == 3
    engine.close()
    manifest = json.loads((tmp_path / "out" / "adapters.json").read_text())
    assert manifest["base"] == lora.base_digest(base(kind))
    for name, rank in (("cards", 4), ("mail", 7)):
        about = manifest["adapters"][name]
        assert about["rank"] == rank
        assert about["digest"] == digest_file(tmp_path / "out" / about["file"])
        assert about["targets"] == list(lora.read(adapters(kind)[name]).targets)


@pytest.mark.slow
def test_sampling_uses_the_adapter(
    base: Callable[[str], Path], adapters: Callable[[str], dict[str, Path]], data: Path, tmp_path: Path
) -> None:
    convert(base("llama"), adapters("llama"), data, tmp_path / "out")
    engine = GenaiEngine(tmp_path / "out")
    ids = engine.encode(PROMPT)
    found = []
    for name in (None, "cards", None):
        engine.use(name)
        found.append(engine.generate([ids], Sampling(max_new_tokens=12, temperature=0.5, seed=5))[0].tokens)
    assert found[0] == found[2] != found[1]


def test_over_a_rounded_base(
    base: Callable[[str], Path], adapters: Callable[[str], dict[str, Path]], data: Path, tmp_path: Path
) -> None:
    """The adapters stay as they are; only the base is rounded. The same inputs give the same bytes."""
    first, second = tmp_path / "a", tmp_path / "b"
    facts = convert(base("qwen3"), adapters("qwen3"), data, first, "int4")
    assert facts["rounded"] > 0
    assert facts["token_agreement"].keys() == {"(none)", "cards", "mail"}
    engine = GenaiEngine(first)
    ids = engine.encode(PROMPT)
    rounded, exact = {}, {}
    for name, source in ({"": base("qwen3")} | adapters("qwen3")).items():
        engine.use(name or None)
        rounded[name] = engine.logits(ids)
        reference = open_engine(source)
        exact[name] = reference.logits(ids)
        reference.close()
    for name in rounded:  # closest to itself in torch, of all three
        distances = {other: float(np.abs(rounded[name] - exact[other]).mean()) for other in exact}
        assert min(distances, key=distances.__getitem__) == name, distances
        assert 2 * distances.pop(name) < min(distances.values())
    convert(base("qwen3"), adapters("qwen3"), data, second, "int4")
    for file in sorted(f.relative_to(first) for f in first.rglob("*") if f.is_file()):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_opening_what_is_not_there(
    base: Callable[[str], Path], adapters: Callable[[str], dict[str, Path]], data: Path, tmp_path: Path
) -> None:
    from slmops.engines.minimal import write_minimal

    out = tmp_path / "out"
    convert(base("qwen3"), {"cards": adapters("qwen3")["cards"]}, data, out)
    with pytest.raises(ModelError, match="no adapter card") as caught:
        open_engine(out, adapter="card")
    assert caught.value.hint == "did you mean cards?"
    (out / "adapters" / "cards.onnx_adapter").write_bytes(b"other")
    with pytest.raises(ModelError, match="not as it was written"):
        open_engine(out, adapter="cards")
    with pytest.raises(ModelError, match="only"):
        open_engine(adapters("qwen3")["cards"], adapter="cards")
    (tmp_path / "plain").mkdir()
    write_minimal(tmp_path / "plain", "onnx_genai")
    with pytest.raises(ModelError, match="has no adapters"):
        open_engine(tmp_path / "plain", adapter="cards")


def test_what_cannot_be_converted(
    base: Callable[[str], Path],
    adapters: Callable[[str], dict[str, Path]],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from slmops.convert import onnx_genai

    q, good = base("qwen3"), adapters("qwen3")["cards"]
    dora = bases.adapter(q, tmp_path / "dora", tuning="dora", rank=2)
    wide = bases.adapter(q, tmp_path / "wide", tuning="adapter")
    foreign = bases.adapter(base("llama"), tmp_path / "foreign", rank=2)
    alone = tmp_path / "alone"
    shutil.copytree(good / "adapter", alone)

    def never(*_: Any) -> Any:
        raise AssertionError("the graph was built before the check")

    monkeypatch.setattr(onnx_genai, "build", never)
    cases: list[tuple[dict[str, Path], str]] = [
        ({"a": good, "b": foreign}, "belongs to another base"),
        ({"a": dora}, "adapter a: dora"),
        ({"a": wide}, "bottleneck"),
        ({"a": q}, "no adapter of slmops"),
        ({"a": alone}, "not a model"),
        ({}, "there is no adapter"),
    ]
    for i, (given, says) in enumerate(cases):
        with pytest.raises(ModelError, match=says) as caught:
            convert(q, given, data, tmp_path / f"o{i}")
        assert caught.value.hint, says
    inputs = {"base": q, "adapter.a": good}
    with pytest.raises(ConversionError, match="no prompts to check adapter a"):
        onnx_adapters.run(onnx_adapters.Params(), inputs, tmp_path, Context(0, tmp_path, tmp_path))
