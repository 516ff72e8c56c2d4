"""What `slmops needs` says of trainings: the shapes of the catalogue, and figures that move with what they depend on."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from slmops.catalog import models
from slmops.core.parameters import count
from slmops.core.spec import Train
from slmops.errors import ModelError, UsageError
from slmops.flow.training_needs import WAYS, TrainingNeeds, foresee, model_of, way_of
from slmops.train.fit import Plan
from slmops.train.memory import Load
from slmops.train.shape import KINDS

CATALOGUE = models.load()
SMALL = model_of("small", CATALOGUE["smollm2-135m-instruct"].config)
LARGER = model_of("larger", CATALOGUE["smollm2-360m-instruct"].config)
ROOT = Path(__file__).parents[2]


def ask(way: str, batch: int = 4, context: int = 256, **settings: Any) -> TrainingNeeds:
    return foresee(way, SMALL, LARGER, batch, context, 64, 100, settings, True)


def test_shapes_have_the_weights_of_the_catalogue() -> None:
    known = [model for model in CATALOGUE.values() if model.architecture in KINDS]
    assert len(known) > 30
    for model in known:
        shape, weights = model_of(model.name, model.config).shape, count(model.config)
        assert (shape.in_blocks, shape.table) == (weights.matrices, weights.embedding), model.name
        assert (shape.tied, shape.parameters) == (weights.output == 0, weights.total), model.name


def test_it_is_what_a_run_refuses_by() -> None:
    training = Train(tuning="lora", batch_size=4, max_length=256, checkpointing=True)

    def load(changed: Any) -> Load:
        return Load.guess(changed, 100, 192, 64)

    plan = Plan("student", "train.", SMALL.shape, training, load, False, True, None, SMALL.file_bytes)
    assert ask("lora", checkpointing=True).memory == plan.memory()


def test_figures_move_with_what_they_depend_on() -> None:
    peaks = {way: ask(way).memory.peak for way in WAYS}
    assert peaks["qlora"] < peaks["lora"] < peaks["full"] < peaks["dpo"]
    assert peaks["dpo+lora"] < peaks["dpo"]
    for way in WAYS:
        one = ask(way)
        assert one.weights + one.moments + one.program + one.working == one.memory.peak
        assert ask(way, batch=8).memory.peak > one.memory.peak and ask(way, context=512).memory.peak > one.memory.peak
        assert ask(way, checkpointing=True).memory.peak < one.memory.peak, way
    assert ask("full", accumulate=4).memory.peak < peaks["full"]
    assert ask("full").bf16 and not ask("full", precision="fp32").bf16


def test_a_teacher_counts_where_it_is_asked_meanwhile() -> None:
    for way in ("on_policy", "hidden_states"):
        found = ask(way)
        assert found.teacher == "larger" and found.memory.held["teacher"] == 4 * LARGER.shape.parameters
    for way in ("full", "logits", "cross_tokenizer", "dpo"):
        assert ask(way).teacher == "" and "teacher" not in ask(way).memory.held


def test_the_file_of_a_folder_counts_as_it_is(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    config = CATALOGUE["smollm2-135m-instruct"].config
    assert model_of("there", config, tmp_path).file_bytes == 2 * SMALL.shape.parameters
    save_file({"w": np.zeros((3, 4), np.float16)}, tmp_path / "model.safetensors")
    assert model_of("here", config, tmp_path).file_bytes == 24
    save_file({"w": np.zeros((3, 4), np.float32)}, tmp_path / "model.safetensors")
    assert model_of("here", config, tmp_path).file_bytes == 0


def test_ways_are_tunings_methods_or_both() -> None:
    assert way_of("qlora") == ("sequence", "qlora") and way_of("dpo") == ("dpo", "full")
    assert way_of("orpo+dora") == ("orpo", "dora")
    for text, says in (("lorra", "training method lorra"), ("dpo+lorra", "training tuning lorra")):
        with pytest.raises(UsageError, match=says) as caught:
            way_of(text)
        assert "did you mean lora?" in caught.value.hint
    with pytest.raises(ModelError, match="its architecture is granite"):
        model_of("granite", CATALOGUE["granite-3.3-2b-instruct"].config)


def test_the_guide_shows_what_is_foreseen_today() -> None:
    spec = importlib.util.spec_from_file_location("needs_training", ROOT / "benchmarks" / "needs_training.py")
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = benchmark
    spec.loader.exec_module(benchmark)
    guide = (ROOT / "docs" / "guides" / "catalog.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (\S+) \| (.+) \| (\d+ × \d+) \| \d+ \| ([\d,]+) MB \| ([\d,]+) MB \| (.+) % \|$", guide, re.M
    )
    assert len(rows) == len(benchmark.CASES) >= 6
    for case, (model, _training, size, foreseen, measured, off) in zip(benchmark.CASES, rows, strict=True):
        assert (model, size) == (case.model, f"{case.batch} × {case.context}")
        peak = benchmark.predict(case, hardware=True).memory.peak
        assert foreseen == f"{peak / 1e6:,.0f}", case.name
        ratio = float(foreseen.replace(",", "")) / float(measured.replace(",", ""))
        assert abs(ratio - 1) <= 0.1 and 100 * (ratio - 1) == pytest.approx(float(off), abs=0.1)
