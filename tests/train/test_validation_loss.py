"""The validation loss is what Hugging Face gives for each answer alone; a training says its own losses as it goes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from slmops.core.method import Context, SilentProgress
from slmops.errors import DataError
from slmops.train import encode, network, sft, validation_loss
from tests.train.conftest import FAST, TINY, examples, write_rows


class Points(SilentProgress):
    """Keeps points; may die at one, as a killed process does."""

    def __init__(self, die_at: int = 0) -> None:
        super().__init__()
        self.points: list[tuple[int, float]] = []
        self.die_at = die_at

    def point(self, step: int, values: Mapping[str, float]) -> None:
        self.points.append((step, values["validation_loss"]))
        if len(self.points) == self.die_at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def model(data: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    params = sft.Params(training=FAST, architecture=TINY["qwen3"], files=("data/gold.jsonl",))
    sft.run(params, {"data": data, "tokenizer": tokenizer}, out, Context(3, out / "s", out / "s"))
    return out


def test_the_mean_over_answers(data: Path, model: Path, tmp_path: Path, ctx: Context) -> None:
    facts = validation_loss.run(validation_loss.Params(), {"model": model, "data": data}, tmp_path, ctx)
    reference = network.load(model).eval()
    rows = encode.read({"data": data}, ("data/validation.jsonl",))
    encoded = encode.encode(rows, encode.load_tokenizer(model), 64)
    losses, tokens = [], 0
    for ids, begin in zip(encoded.ids, encoded.answer_from, strict=True):
        labels = torch.tensor(ids)[None].clone()
        labels[:, : int(begin)] = -100
        with torch.no_grad():
            mean = float(reference(input_ids=torch.tensor(ids)[None], labels=labels).loss)
        losses.append(mean * (len(ids) - int(begin)))
        tokens += len(ids) - int(begin)
    assert json.loads((tmp_path / "loss.json").read_text()) == facts
    assert facts["examples"] == 24
    assert facts["nats_per_answer"] == pytest.approx(sum(losses) / 24, rel=1e-4)
    assert facts["nats_per_token"] == pytest.approx(sum(losses) / tokens, rel=1e-4)


def test_only_validation_data_is_read(data: Path, model: Path, tmp_path: Path, ctx: Context) -> None:
    write_rows(tmp_path / "own" / "validation.jsonl", examples(24, 3))
    here = validation_loss.run(validation_loss.Params(), {"model": model, "data": tmp_path / "own"}, tmp_path, ctx)
    assert here == validation_loss.run(validation_loss.Params(), {"model": model, "data": data}, tmp_path, ctx)
    (tmp_path / "own" / "validation.jsonl").write_text("")
    with pytest.raises(DataError, match="validation split is empty"):
        validation_loss.run(validation_loss.Params(), {"model": model, "data": tmp_path / "own"}, tmp_path, ctx)


def test_a_training_says_its_losses_and_says_them_again_after_a_resume(
    data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    inputs = {"data": data, "tokenizer": tokenizer}
    params = sft.Params(
        training=FAST, architecture=TINY["llama"], files=("data/gold.jsonl",), validation="data/validation.jsonl"
    )

    def train(name: str, progress: Points) -> Path:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        (tmp_path / f"{name}-scratch").mkdir(exist_ok=True)
        sft.run(params, inputs, out, Context(3, tmp_path / f"{name}-scratch", tmp_path, progress=progress))
        return out

    whole = Points()
    record = json.loads((train("whole", whole) / "training.json").read_text())
    looks = [(p["step"], p["validation_loss"]) for p in record["points"] if p["validation_loss"] is not None]
    assert whole.points == looks and len(looks) == FAST.evaluations
    killed, resumed = Points(die_at=3), Points()
    with pytest.raises(KeyboardInterrupt):
        train("killed", killed)
    train("killed", resumed)
    assert resumed.points == whole.points
