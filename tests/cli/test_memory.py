"""A training that does not fit into memory is refused before any work, with its line and what would make it fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from slmops.flow import memory
from slmops.train import available
from tests.cli.conftest import Slmops
from tests.tiny import SPEC, write_project

LARGE = SPEC.replace(
    "student:\n  model: {layers: 1, hidden: 32, heads: 2, ffn: 64, context: 64}\n",
    "student:\n  model: {layers: 12, hidden: 512, heads: 8, context: 512}\n",
).replace("train: {method: logits, epochs: 8, batch_size: 32,", "train: {method: logits, epochs: 8, batch_size: 512,")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without a GPU and without bf16, with 3.2 GB free."""
    monkeypatch.setattr(memory.shutil, "which", lambda name: None)
    monkeypatch.setattr(memory, "available", lambda: 3_200_000_000)
    monkeypatch.setattr(memory, "bf16", lambda: "no")
    return monkeypatch


def model(folder: Path) -> None:
    """The configuration of a model of 330 M parameters."""
    folder.mkdir()
    config = {
        "model_type": "llama", "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24,
        "intermediate_size": 2816, "vocab_size": 32000, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def test_run_and_plan_refuse_and_name_the_line(tmp_path: Path, slmops: Slmops, machine: pytest.MonkeyPatch) -> None:
    folder = write_project(tmp_path / "project", LARGE)
    line = 1 + LARGE.splitlines().index(next(row for row in LARGE.splitlines() if row.startswith("train:")))
    for verb in ("run", "plan"):
        refused = slmops(verb, folder=folder)
        refused.refused(1, f"slmops.yaml:{line}: training student needs about ", "3.2 GB are available")
        assert refused.started == []
        assert "train.accumulate: " in refused.hint and "train.checkpointing: true (" in refused.hint
        assert "lora" not in refused.hint  # nothing to tune: the student starts from nothing
        assert "teacher.train" not in refused.hint
        figures = re.findall(r"\((\d+(?:\.\d+)?) (GB|MB)", refused.hint)
        assert figures and all(float(n) * {"GB": 1e9, "MB": 1e6}[unit] <= 3.25e9 for n, unit in figures)
    assert "student" in slmops("plan", folder=folder).out  # the plan itself is shown


def test_the_proposed_setting_is_accepted(tmp_path: Path, slmops: Slmops, machine: pytest.MonkeyPatch) -> None:
    folder = write_project(tmp_path / "project", LARGE)
    hint = slmops("plan", folder=folder).hint
    way = re.search(r"train\.(accumulate): (\d+)", hint)
    assert way is not None
    assert slmops("plan", "--set", f"train.accumulate={way[2]}", folder=folder).code == 0
    half = slmops("plan", "--set", f"train.accumulate={int(way[2]) // 2}", folder=folder)
    half.refused(1, "training student")
    over = slmops("plan", "--set", "train.batch_size=600", folder=folder)
    over.refused(1, "--set: training student")


def test_a_teacher_s_pass_is_refused_too(tmp_path: Path, slmops: Slmops, machine: pytest.MonkeyPatch) -> None:
    folder = write_project(tmp_path / "project")
    model(folder / "base")
    large = ["--set", "teacher={base: ./base, instruct: false}", "--set", "train.teacher_batch=4000"]
    refused = slmops("plan", *large, folder=folder)
    refused.refused(1, "the teacher's pass logits needs about ", "3.2 GB are available")
    way = re.search(r"train\.teacher_batch: (\d+) \(", refused.hint)
    assert way is not None and "logit_samples" not in refused.hint  # fewer draws do not help
    fits = [*large, "--set", f"train.teacher_batch={way[1]}"]
    assert slmops("plan", *fits, folder=folder).code == 0
    row = next(
        s for s in json.loads(slmops("plan", "--json", *fits, folder=folder).out)["steps"] if s["step"] == "logits"
    )
    assert 4 * 300e6 < row["estimate"]["memory_bytes"] <= 3.2e9


def test_a_pass_looks_again_at_its_own_tokens(tmp_path: Path, slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    folder = write_project(tmp_path / "project")
    assert slmops("run", "synthetic", folder=folder).code == 0
    monkeypatch.setattr(memory, "available", lambda: None)
    monkeypatch.setattr(available, "available", lambda: -available.resident() + 300_000_000)
    refused = slmops("run", "logits", folder=folder)
    refused.refused(1, "the teacher's pass over the examples needs about ", "300 MB are available")
    assert refused.started[-1] == "logits"


def test_what_is_not_to_run_is_not_refused(tmp_path: Path, slmops: Slmops, machine: pytest.MonkeyPatch) -> None:
    folder = write_project(tmp_path / "project", LARGE)
    assert slmops("run", "data", folder=folder).started == ["data"]
    machine.setattr(memory, "available", lambda: None)  # nobody knows what is free
    assert slmops("plan", folder=folder).code == 0


def test_a_base_is_sized_by_its_config_and_may_be_tuned(
    tmp_path: Path, slmops: Slmops, machine: pytest.MonkeyPatch
) -> None:
    folder = write_project(
        tmp_path / "project",
        re.sub(r"student:\n  model: .*\n", "student: {base: ./base}\n", SPEC).replace("method: logits, ", ""),
    )
    model(folder / "base")
    machine.setattr(memory, "available", lambda: 4_500_000_000)
    refused = slmops("plan", folder=folder)
    refused.refused(1, "training student needs about ", "GB")
    assert "train.tuning: lora (" in refused.hint
    assert "accumulate" not in refused.hint  # weights and moments are too many already


def test_a_step_looks_again_at_its_own_tokens(tmp_path: Path, slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the data is read nobody knows how long the examples are; the step does, and refuses before it builds."""
    pytest.importorskip("torch")
    monkeypatch.setattr(memory, "available", lambda: None)
    monkeypatch.setattr(available, "available", lambda: -available.resident() + 300_000_000)
    folder = write_project(tmp_path / "project")
    refused = slmops("run", "teacher", folder=folder)
    refused.refused(1, "training the model needs about ", "300 MB are available")
    assert refused.started[-1] == "teacher"


def test_the_plan_knows_the_vocabulary_and_the_lengths(read_once: Path, slmops: Slmops) -> None:
    def foreseen(*changes: str) -> int:
        words = [word for change in changes for word in ("--set", change)]
        plan = json.loads(slmops("plan", "--json", *words, folder=read_once).out)
        return int(next(s for s in plan["steps"] if s["step"] == "student")["estimate"]["memory_bytes"])

    assert foreseen("teacher.tokenizer.vocabulary=40000") > foreseen() + 4 * 32 * 39_000
    assert foreseen("train.max_length=12") < foreseen()
