"""Tiny projects with a search section, and the command on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tiny import write_project

SEARCH = """\
name: tiny
task: {type: classification}
data: {path: rows.jsonl, gold: {per_label: 30}}
student:
  model: {layers: 1, hidden: 32, heads: 2, ffn: 64, context: 64}
  tokenizer: {vocabulary: 400}
train: {epochs: 6, batch_size: 32, holdout: 0.2}
evaluate: {max_new_tokens: 12}
search:
  trials: 20
  parallel: 2
  parameters:
    train.learning_rate: {low: 0.0003, high: 0.03, log: true}
    train.dropout: {choices: [0.0, 0.1, 0.3]}
    train.weight_decay: {low: 0, high: 0.2}
  objectives: [{metric: validation_loss}]
"""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """`slmops search --json` in a process of its own."""
    command = [sys.executable, "-m", "slmops.cli.main", "search", "--json", "-f", str(folder), *words]
    log = (folder / "log.txt").open("a")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)


def searched(folder: Path, *words: str) -> dict[str, Any]:
    """What the search came to."""
    process = start(folder, *words)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, (folder / "log.txt").read_text()[-3000:]
    found: dict[str, Any] = json.loads(out)
    return found


def write(folder: Path, *changes: tuple[str, str]) -> Path:
    """A project to search; returns its folder."""
    text = SEARCH
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return write_project(folder, text)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Key to the record of every finished step."""
    return {path.stem: json.loads(path.read_text()) for path in (folder / ".slmops" / "steps").glob("*.json")}
