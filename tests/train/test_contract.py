"""What every method of training promises, with every tuning and on four architectures.

The loss falls; a training that was ended in the middle goes on to the very same bytes; what it saved loads in transformers
and PEFT, is the model that was trained, converts, and writes the same tokens in ONNX Runtime GenAI as in torch.

Nothing is left out: 9 ways to learn × 6 tunings × 4 architectures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from slmops.convert import onnx_genai
from slmops.core.engine import Sampling
from slmops.engines import open_engine
from slmops.flow import methods
from slmops.train import loop
from tests.train import bases
from tests.train.conftest import examples
from tests.train.shelf import METHODS, MODULES, TUNINGS, Shelf, Stop, Stopping, context, run

PLAIN_FILES = {"config.json", "model.safetensors", "training.json", "tokenizer.json"}
CASES = [(method, tuning, kind) for kind in bases.ARCHITECTURES for method in METHODS for tuning in TUNINGS]
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"dropout": 0.1, "accumulate": 2, "lora": {"rank": 4, "dropout": 0.1}},
    "phi3": {"lora": {"rank": 4, "embeddings": True}},
    "gemma3": {"dropout": 0.1, "batching": "pack", "checkpointing": True},
}
"""Chance, embeddings and parts of a batch, so that what resumes exactly is more than the plainest training."""
QUICK = {("sft", "lora", "qwen3"), ("logits", "full", "qwen3"), ("dpo", "lora", "qwen3"), ("orpo", "full", "qwen3")}


@pytest.fixture(scope="session")
def shelf(data: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"), data, tokenizer)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_no_method_is_left_out() -> None:
    """Whatever trains a model is under the contract; merging adapters trains nothing."""
    trainers = {
        name for name in methods.names() if name.startswith("train.") and methods.get(name).DECLARATION.makes == "model"
    }
    assert trainers - {"train.adapter_merge"} == {module.DECLARATION.name for module in MODULES.values()}


@pytest.mark.parametrize(
    ("method", "tuning", "kind"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_contract(
    method: str, tuning: str, kind: str, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, out = shelf.inputs(method, kind), tmp_path / "whole"
    before = {f: f.read_bytes() for folder in inputs.values() for f in folder.rglob("*") if f.is_file()}
    extra = SETTINGS.get(kind, {})
    facts = run(method, tuning, inputs, out, tmp_path / "s1", **extra)
    assert (facts["trained_parameters"] >= facts["parameters"]) == (tuning == "full")
    assert {f: f.read_bytes() for f in before} == before
    points = json.loads((out / "training.json").read_text())["points"]
    falls(points)
    monkeypatch.setattr(loop, "EVERY_S", 0.0)
    stopped_and_resumed(method, tuning, inputs, tmp_path, extra)
    loads(tuning, inputs["base"], out)
    converts(out, shelf.data, tmp_path / "onnx")


def falls(points: list[dict]) -> None:
    """The loss, of training and of validation."""
    looks = [point["validation_loss"] for point in points if point["validation_loss"] is not None]
    assert looks[-1] < looks[0]
    losses = [point["train_loss"] for point in points]
    assert sum(losses[-5:]) / 5 < 0.9 * sum(losses[:3]) / 3


def stopped_and_resumed(method: str, tuning: str, inputs: dict[str, Path], folder: Path, extra: dict[str, Any]) -> None:
    """Ended in the middle, a training leaves the files of one that was not."""
    with pytest.raises(Stop):
        run(method, tuning, inputs, folder / "cut", folder / "s2", Stopping(5), **extra)
    progress = Stopping(10_000)
    run(method, tuning, inputs, folder / "cut", folder / "s2", progress, **extra)
    assert [line for line in progress.lines if line.startswith("going on from step")]
    files = {f.relative_to(folder / "whole") for f in (folder / "whole").rglob("*") if f.is_file()}
    assert {str(f) for f in files} >= PLAIN_FILES
    for file in sorted(files):
        assert (folder / "cut" / file).read_bytes() == (folder / "whole" / file).read_bytes(), file


def loads(tuning: str, base: Path, out: Path) -> None:
    """The model in transformers, the adapter in PEFT: the same function, and not the base's."""
    ids = torch.arange(20)[None] * 13 % 290
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out)(ids).logits
        untouched = AutoModelForCausalLM.from_pretrained(base)
        assert not torch.allclose(merged, untouched(ids).logits, atol=1e-3)
        assert (out / "adapter").is_dir() == (tuning != "full")
        if tuning not in ("full", "adapter"):
            tuned = PeftModel.from_pretrained(untouched, str(out / "adapter")).eval()
            torch.testing.assert_close(tuned(ids).logits, merged, atol=1e-4, rtol=1e-3)


def converts(model: Path, data: Path, out: Path) -> None:
    """In float32: torch and ONNX Runtime GenAI read the same prompts and write the same greedy tokens."""
    out.mkdir()
    convert = onnx_genai.Params(precision="fp32", fidelity_prompts=2)
    facts = onnx_genai.run(convert, {"model": model, "data": data}, out, context(out / "scratch"))
    assert facts["token_agreement"] == 1.0
    torch_model, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    engine = open_engine(out)
    for example in examples(3, 9):
        messages = example.prompt_messages()
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        assert engine.encode(messages) == ids[0].tolist()
        with torch.no_grad():
            wanted = torch_model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
        (answer,) = engine.generate([ids[0].tolist()], Sampling(max_new_tokens=24))
        assert list(answer.tokens) == wanted
    engine.close()


READER = """
import sys
sys.modules["slmops"] = None  # an import of it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids = torch.arange(20)[None]
for base, out, tuning in zip(*[iter(sys.argv[1:])] * 3):
    merged = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    if tuning == "lora":
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out + "/adapter").eval()
        torch.testing.assert_close(tuned(ids).logits, merged, atol=1e-4, rtol=1e-3)
print("read", len(sys.argv) // 3)
"""


@pytest.mark.slow
def test_what_is_saved_is_read_where_there_is_no_slmops(shelf: Shelf, tmp_path: Path) -> None:
    arguments = []
    for kind in bases.ARCHITECTURES:
        for tuning in ("full", "lora", "adapter"):
            inputs, out = shelf.inputs("sft", kind), tmp_path / f"{kind}-{tuning}"
            run("sft", tuning, inputs, out, tmp_path / f"s-{kind}-{tuning}", max_steps=2, evaluations=1)
            arguments += [str(inputs["base"]), str(out), tuning]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", READER, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.strip() == "read 12", done.stderr
