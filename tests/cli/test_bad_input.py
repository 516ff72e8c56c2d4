"""What users get wrong, each as they would meet it: a clear error, a line where there is one, a hint, nothing lost.

Every project here has its data step finished before the mistake. After each refusal the mistake is mended and the same
command must go on from there: what was finished is not made again, what was paid for is not asked again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.bundle.manifest import BundleFile, ChatTemplate, Limits, Manifest, Runtime, payload_digest
from slmops.core.digest import digest_bytes
from slmops.engines.stand_in import Fault, StandIn
from slmops.engines.memory_engine import MemoryEngine
from slmops.flow import methods
from slmops.store import Store
from slmops.store.files import exclusive
from tests.cli.conftest import Outcome, Slmops
from tests.tiny import SPEC, rows

SHARED_WORDS = "tests/tiny.py"


def still_there(slmops: Slmops, folder: Path) -> None:
    """The data step that was finished before the mistake is reused."""
    again = slmops("run", "data", folder=folder)
    assert again.code == 0, again.err
    assert again.started == []
    assert "nothing to do" in again.err


# ---------------------------------------------------------------------------------------------------- project files


@dataclasses.dataclass(frozen=True)
class Bad:
    """A mistake in slmops.yaml: `old` replaced by `new` (or the whole file), and what is said about it."""

    name: str
    new: str | bytes
    says: tuple[str, ...]
    line: int | None = None
    old: str = ""

    def text(self) -> bytes:
        if isinstance(self.new, bytes):
            return self.new
        assert self.old in SPEC
        return (SPEC.replace(self.old, self.new, 1) if self.old else self.new).encode()


ENDPOINT = "{url: 'http://127.0.0.1:9/v1', model: m}"

BAD_SPECS = [
    Bad("unknown key", "learning_rat: 3e-3", ("unknown key", "did you mean learning_rate?"), 7, "learning_rate: 3e-3"),
    Bad("unknown key in a row", "mesure: {prompts: 8", ("did you mean measure?",), 16, "measure: {prompts: 8"),
    Bad("wrong type", "layers: two", ("must be a valid integer", '"two"'), 5, "layers: 2"),
    Bad("out of range", "teacher_share: 1.5", ("data.teacher_share", "less than or equal to 1"), 3, "teacher_share: 0.5"),
    Bad("bad choice", "{type: clasification}", ("did you mean classification?",), 2, "{type: classification}"),
    Bad("duplicate key", "name: tiny\nname: tiny", ("duplicate key", "name"), 2, "name: tiny"),
    Bad("syntax", "task: {type: classification", ("expected",), 3, "task: {type: classification}"),
    Bad("tab", "\tepochs: 8\n", ("slmops.yaml",), 7, "  train: {epochs: 8, batch_size: 32, learning_rate: 3e-3}\n"),
    Bad("not UTF-8", SPEC.replace("tiny", "tiny # caf\xe9").encode("latin-1"), ("not UTF-8",), 1),
    Bad("control character", SPEC.replace("gates", "ga\x00tes").encode(), ("character",), 13),
    Bad("empty", b"", ("empty or not a mapping",), 1),
    Bad("only comments", b"# nothing yet\n", ("empty or not a mapping",), 1),
    Bad("a list", b"- name: tiny\n", ("empty or not a mapping",), 1),
    Bad("missing key", "teacher_share: 0.5", ("data.path", "is missing"), 3, "path: rows.jsonl, teacher_share: 0.5"),
    Bad("empty path", "path: ''", ("data.path",), 3, "path: rows.jsonl"),
    Bad("two teachers", "teacher:\n  base: some/folder\n", ("exactly one of model, base, endpoint",), 4, "teacher:\n"),
    Bad("no student", "", ("student", "is missing"), None,
        "student:\n  model: {layers: 1, hidden: 32, heads: 2, ffn: 64, context: 64}\n"),
    Bad("stages that do not fit", "convert: {precision: fp32}\n", ("train.quantization_aware", "int4"), 11,
        "train: {method: logits, epochs: 8, batch_size: 32, learning_rate: 5e-3}\n"
        "convert: {precision: int4, fidelity_prompts: 8}\n"),
    Bad("gate without a bound", "{metric: accuracy}", ("exactly one of at_least, at_most",), 13,
        "{metric: accuracy, at_least: 0.05}"),
    Bad("gate on what is not there", "out_of_scope_recall", ("task.out_of_scope", "is missing"), 2, "accuracy"),
    Bad("heads", "hidden: 33", ("must be a multiple of heads",), 9, "hidden: 32"),
    Bad("infinite", "{epochs: .inf", ("train.epochs", "finite"), 7, "{epochs: 8"),
    Bad("not a plain value", "name: !!python/object tiny", ("name",), 1, "name: tiny"),
    Bad("nothing to learn from", "gold: {total: 0}}\nsynthesize: {label_pool: false}", ("data.gold",), 3,
        "gold: {per_label: 5}}"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_SPECS, ids=lambda bad: bad.name.replace(" ", "_"))
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_project_file(bad: Bad, verb: str, project: Path, slmops: Slmops) -> None:
    file = project / "slmops.yaml"
    content = bad.text()
    if bad.name == "stages that do not fit":
        content = content.replace(b"convert: ", b"train: {quantization_aware: int4}\nconvert: ")
    file.write_bytes(content)
    outcome = slmops(verb, folder=project)
    outcome.refused(2, *bad.says)
    assert "in the project file" in outcome.message
    if bad.line is not None:
        assert f"slmops.yaml:{bad.line}: " in outcome.message
    assert outcome.started == []
    file.write_text(SPEC)
    still_there(slmops, project)
