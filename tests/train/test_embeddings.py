"""`train.lora.embeddings`: the token embedding and the output matrix are trained whole beside low-rank additions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from slmops.core.method import Context
from slmops.core.spec import Lora, Training
from slmops.errors import ModelError
from slmops.store import lora
from slmops.train import network, sft, tuning
from slmops.train.encode import load_tokenizer
from slmops.train.memory import trained
from slmops.train.shape import Shape
from tests.train import bases

TRAINING = Training(max_steps=6, batch_size=16, learning_rate=1e-2, lora=Lora(rank=4, embeddings=True), evaluations=1)


def learn(name: str, data: Path, base: Path, folder: Path) -> dict[str, Any]:
    (folder / "out").mkdir(parents=True)
    params = sft.Params(training=TRAINING.model_copy(update={"tuning": name}), files=("data/teacher.jsonl",))
    return sft.run(params, {"data": data, "base": base}, folder / "out", Context(3, folder / "s", folder / "s"))


@pytest.fixture(scope="module")
def make(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def base(kind: str) -> Path:
        """`llama` with an output matrix of its own."""
        out = tmp_path_factory.mktemp(kind)
        if kind != "llama":
            return bases.save(kind, tokenizer, out)
        settings = bases.config(
            kind, len(load_tokenizer(tokenizer)), tie_word_embeddings=False, initializer_range=0.125
        )
        torch.manual_seed(0)
        network.save(AutoModelForCausalLM.from_config(settings, dtype=torch.float32), tokenizer, out)
        return out

    return base


@pytest.mark.parametrize(
    ("kind", "name"), [("qwen3", "lora"), ("llama", "dora"), ("llama", "qlora"), ("gemma3", "rslora")]
)
def test_they_are_trained_saved_and_read_by_peft(
    kind: str, name: str, make: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    base, ids = make(kind), torch.arange(20)[None] * 13 % 290
    facts = learn(name, data, base, tmp_path)
    shape = Shape.of_folder(base)
    assert shape is not None
    asked = TRAINING.model_copy(update={"tuning": name})
    assert facts["trained_parameters"] == trained(shape, asked)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    for part in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, part)().weight, getattr(after, part)().weight
        assert not torch.allclose(old, new, atol=1e-3)
    for old, new in zip(norms(before), norms(after), strict=True):
        assert old.equal(new)
    tuned = PeftModel.from_pretrained(before, str(tmp_path / "out" / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(tuned(ids).logits, after(ids).logits, atol=1e-4, rtol=1e-3)
        plain = tuning.merged(tmp_path / "out" / "adapter", base)
        assert plain(ids).logits.equal(after(ids).logits)


def norms(model: Any) -> list[torch.Tensor]:
    return [w for n, w in model.named_parameters() if "norm" in n]


def test_such_an_adapter_is_no_low_rank_sum(make: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    base = make("qwen3")
    learn("lora", data, base, tmp_path)
    with pytest.raises(ModelError, match="trained whole") as caught:
        lora.read_all({"one": tmp_path / "out"}, base)
    assert "train.lora.embeddings" in (caught.value.hint or "")
