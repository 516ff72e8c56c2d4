"""A size that no rounding of a base can keep is refused before the base is trained, with its line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Slmops
from tests.tiny import SPEC, write_project

BASED = re.sub(r"teacher:.*?\nstudent:.*?\ntrain:", "student: {base: ./base}\ntrain:", SPEC, flags=re.DOTALL)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a base of 5 blocks of 1024, which nobody has to load."""
    text = BASED.replace("method: logits", "method: sequence")
    folder = write_project(tmp_path / "project", text)
    (folder / "base").mkdir()
    config = {
        "model_type": "llama", "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 5,
        "intermediate_size": 2816, "vocab_size": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "base" / "config.json").write_text(json.dumps(config))
    return folder


def test_a_file_smaller_than_the_blocks_is_refused(project: Path, slmops: Slmops) -> None:
    weights = 5 * (4 * 1024 * 1024 + 3 * 1024 * 2816)
    least = weights * (2 + 16 / 32) / 8e6
    sized = "convert={precision: int4, file_mb: %.3f}"
    for verb in ("plan", "run"):
        refused = slmops(verb, "--set", sized % (least - 0.1), folder=project)
        refused.refused(2, "--set: convert.file_mb: (", "with 2 bits for each weight", "student.base")
        assert refused.started == []
    enough = re.search(r"give more than (\d+\.\d+)", refused.err)
    assert enough is not None and least < float(enough[1]) < least + 0.05
    assert slmops("plan", "--set", sized % float(enough[1]), folder=project).code == 0


def test_a_base_that_is_made_narrower_first_is_left_to_the_step(project: Path, slmops: Slmops) -> None:
    sized = ["--set", "convert={precision: int4, file_mb: 1.0}"]
    assert slmops("plan", *sized, folder=project).code == 2
    assert slmops("plan", *sized, "--set", "compress={prune: {layers: 4}}", folder=project).code == 0
    recovered = "compress={prune: {ffn: 0.5, recover: {epochs: 1}}}"
    assert slmops("plan", *sized, "--set", recovered, folder=project).code == 0
    assert slmops("plan", *sized, "--set", "compress={prune: {sparsity: 0.5}}", folder=project).code == 2
