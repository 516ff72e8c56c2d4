"""The tunings' numbers: losses and gradients of PEFT's own layers, dropout, checkpointing; and the refusals.

What every training with a tuning promises is in test_contract.py."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slmops.core.method import Context, SilentProgress
from slmops.core.spec import Lora, Training
from slmops.errors import ModelError, TrainingError
from slmops.train import network, sft, tuning
from slmops.train.batches import collate
from slmops.train.encode import Row, encode, load_tokenizer
from slmops.train.objective import cross_entropy, part_loss
from tests.train import bases
from tests.train.conftest import examples

NEW = ("lora", "rslora", "dora", "qlora", "adapter")
FAST = Training(epochs=3, batch_size=16, learning_rate=1e-2, evaluations=3, lora=Lora(rank=4), adapter_width=32)


@pytest.fixture(scope="session")
def base(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = bases.save(kind, tokenizer, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


def params(name: str, **training: Any) -> sft.Params:
    t = Training.model_validate({**FAST.model_dump(), "tuning": name, **training})
    return sft.Params(training=t, files=("data/teacher.jsonl",), validation="data/validation.jsonl")


def train(p: sft.Params, data: Path, base: Path, out: Path, scratch: Path) -> dict:
    out.mkdir(exist_ok=True)
    return sft.run(p, {"data": data, "base": base}, out, Context(3, scratch, scratch))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_fast_path_has_peft_s_loss_and_gradients(
    kind: str, name: str, checkpointing: bool, base: Callable[[str], Path], tokenizer: Path
) -> None:
    encoded = encode([Row(e, "f", i) for i, e in enumerate(examples(12))], load_tokenizer(tokenizer), 64)
    part = collate(encoded, range(12), 0.1, "bucket")
    model = tuning.load_4bit(base(kind)) if name == "qlora" else network.load(base(kind))
    t = params(name, lora={"rank": 4, "alpha": 6.0}).training
    handle = tuning.apply(model, t, 0)
    inner = model if name == "adapter" else handle.get_base_model()
    generator = torch.Generator().manual_seed(1)
    for weight in inner.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    net = network.Network(inner, checkpointing=checkpointing)
    assert net.path == "fast"
    got: list[dict[str, torch.Tensor]] = []
    for path in ("fast", "head"):
        net.path = path
        net.learn(True)
        inner.zero_grad()
        loss = part_loss(net, net.weights, part, cross_entropy(t))
        loss.backward()
        got.append({"loss": loss.detach(), **{n: w.grad.clone() for n, w in net.trained.items()}})
    assert all(float(value.abs().max()) > 0 for value in got[0].values())
    for key, value in got[1].items():
        torch.testing.assert_close(got[0][key], value, atol=2e-4 * float(value.abs().max()) + 1e-6, rtol=2e-3)
    assert all(w.grad is None for n, w in net.weights.items() if n not in net.trained)


@pytest.mark.parametrize("kind", ["qwen3", "phi3"])
def test_qlora_is_lora_over_the_rounded_base(kind: str, base: Callable[[str], Path], tokenizer: Path) -> None:
    """Same loss and gradients as LoRA on a float32 model that holds what the 4-bit weights stand for."""
    from bitsandbytes.functional import dequantize_4bit

    encoded = encode([Row(e, "f", i) for i, e in enumerate(examples(12))], load_tokenizer(tokenizer), 64)
    part = collate(encoded, range(12), 0.1, "bucket")
    four, plain = tuning.load_4bit(base(kind)), network.load(base(kind))
    rounded = 0
    for name, weight in four.named_parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            plain.get_parameter(name).data = dequantize_4bit(weight.data, state).float()
            rounded += 1
    assert rounded == len(tuning.block_linears(plain))
    results = []
    for model, name in ((four, "qlora"), (plain, "lora")):
        net = network.Network(tuning.apply(model, params(name).training, 0).get_base_model())
        generator = torch.Generator().manual_seed(1)
        for weight in net.trained.values():
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
        net.learn(True)
        loss = part_loss(net, net.weights, part, cross_entropy(FAST))
        loss.backward()
        results.append({"loss": loss.detach(), **{n: w.grad for n, w in net.trained.items()}})
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, atol=1e-3 * float(value.abs().max()) + 1e-6, rtol=1e-2)


def test_checkpointing_changes_nothing_but_memory(base: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    for name, on in (("a", False), ("b", True)):
        train(
            params("full", checkpointing=on, dropout=0.1, epochs=1),
            data,
            base("llama"),
            tmp_path / name,
            tmp_path / f"s{name}",
        )
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_lora_dropout_drops_in_training_alone(base: Callable[[str], Path], tokenizer: Path) -> None:
    encoded = encode([Row(e, "f", i) for i, e in enumerate(examples(8))], load_tokenizer(tokenizer), 64)
    part = collate(encoded, range(8), 0.0, "bucket")
    for kind in ("qwen3", "phi3"):
        t = params("lora", lora={"rank": 4, "dropout": 0.5}).training
        net = network.Network(tuning.apply(network.load(base(kind)), t, 0).get_base_model())
        for weight in net.trained.values():
            weight.data += 0.1
        values = []
        for on in (False, False, True, True):
            net.learn(on)
            with torch.no_grad():
                values.append(float(part_loss(net, net.weights, part, cross_entropy(t))))
        assert values[0] == values[1] != values[2] != values[3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lora": {"targets": ("q_prj",)}}, "q_prj matches no linear layer"),
        ({"lora": {"rank": 1000}}, "dimensions on one side"),
    ],
)
def test_bad_settings(change: dict, says: str, base: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=says) as caught:
        train(params("lora", **change), data, base("llama"), tmp_path / "o", tmp_path / "s")
    assert caught.value.hint


def test_an_adapter_of_another_base_is_refused(base: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    train(params("lora", epochs=1), data, base("llama"), tmp_path / "o", tmp_path / "s")
    with pytest.raises(ModelError, match="belongs to another base"):
        tuning.merged(tmp_path / "o" / "adapter", base("qwen3"))
    (tmp_path / "o" / "adapter" / "base.json").unlink()
    with pytest.raises(ModelError, match="which base"):
        tuning.merged(tmp_path / "o" / "adapter", base("llama"))


def test_the_tuned_model_is_gone_before_its_base_is_read_again(
    base: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    there: list[int] = []
    begin, merged = network.Network.__init__, tuning.merged

    def noted(self: Any, *args: Any, **more: Any) -> None:
        made.append(weakref.ref(self))
        begin(self, *args, **more)

    def counted(*args: Any) -> Any:
        there.append(sum(one() is not None for one in made))
        return merged(*args)

    monkeypatch.setattr(network.Network, "__init__", noted)
    monkeypatch.setattr(tuning, "merged", counted)
    train(params("lora"), data, base("qwen3"), tmp_path / "out", tmp_path / "s")
    assert len(made) == 1
    assert there == [0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("full", ["lora", "adapter_width"]),
        ("adapter", ["lora"]),
        ("lora", ["adapter_width"]),
        ("qlora", ["adapter_width"]),
    ],
)
def test_what_a_tuning_does_not_use_is_said(
    name: Any, said: list[str], data: Path, base: Callable[[str], Path], tmp_path: Path
) -> None:
    training = Training(tuning=name, max_steps=1, lora=Lora(rank=4, embeddings=True), adapter_width=8)
    progress = SilentProgress()
    (tmp_path / "o").mkdir()
    ctx = Context(3, tmp_path / "s", tmp_path, 1, progress)
    params = sft.Params(training=training, files=("data/teacher.jsonl",))
    sft.run(params, {"data": data, "base": base("llama")}, tmp_path / "o", ctx)
    lines = [line for line in progress.lines if "does not use it" in line]
    assert lines == [f"train.{one} is given, but tuning {name} does not use it" for one in said]
