"""The text of slmops.yaml with a comment at every value: the keys that it comes from, and where its meaning differs."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from slmops.flow.interop.rules import Finding, Setting

WIDTH = 116
ORDER = (
    "name", "seed", "task.type", "task.instruction",
    "data.path", "data.format", "data.columns.prompt", "data.columns.answer", "data.columns.context", "data.columns.system",
    "data.splits.train", "data.splits.validation", "data.max_examples",
    "student.base",
    "train.method", "train.tuning", "train.lora.rank", "train.lora.alpha", "train.lora.dropout", "train.lora.targets",
    "train.lora.embeddings",
    "train.preference.beta", "train.preference.label_smoothing", "train.epochs", "train.max_steps", "train.batch_size",
    "train.accumulate", "train.learning_rate", "train.warmup", "train.final_learning_rate", "train.weight_decay",
    "train.label_smoothing", "train.clip", "train.precision", "train.prompt_weight", "train.max_length", "train.batching",
    "train.checkpointing", "train.evaluations", "train.patience", "train.quantization_aware",
    "convert.precision", "evaluate.max_new_tokens",
)  # fmt: skip
"""Every place that an import can write, in the order of the file."""

TITLES = {
    "task": "What the model does",
    "data": "What it learns from",
    "student": "The model that is trained",
    "train": "How it is trained",
    "convert": "What ships",
    "evaluate": "How it is judged",
}


def render(settings: Mapping[str, Setting], findings: Sequence[Finding], file: str, trainer: str) -> str:
    """The whole file, with what was ignored as comments at its end.

    Args:
        settings: by place; all of them in `ORDER`.
        findings: of the import.
        file: the name of the file that was imported.
        trainer: its name for people.
    """
    lines = [
        f"# Imported by `slmops import` from {file} ({trainer}). Each comment names the keys there and what differs here.",
        "# What was ignored stands at the end. Every key is explained in docs/reference/spec.md.",
    ]
    open_levels: tuple[str, ...] = ()
    for path in ORDER:
        if path not in settings:
            continue
        *levels, name = path.split(".")
        for depth, level in enumerate(levels):
            if open_levels[: depth + 1] != tuple(levels[: depth + 1]):
                if depth == 0:
                    lines += ["", f"# -- {TITLES[level]} ".ljust(WIDTH, "-")]
                lines.append(f"{'  ' * depth}{level}:")
        open_levels = tuple(levels)
        lines += _lines(name, settings[path], "  " * len(levels), trainer)
    return "\n".join([*lines, *_decided(settings, findings), *_ignored(findings, file, trainer)]) + "\n"


def _lines(name: str, setting: Setting, indent: str, trainer: str) -> list[str]:
    keys = ", ".join(dict.fromkeys(setting.keys))
    origin = f"default of {trainer}" if setting.default else keys
    comment = ": ".join(part for part in (origin, setting.note) if part)
    line = f"{indent}{name}: {scalar(setting.value)}"
    if not comment:
        return [line]
    short = f"{line.ljust(36)}  # {comment}"
    if len(short) <= WIDTH:
        return [short]
    return [*_wrapped(comment, indent), line]


def _wrapped(text: str, indent: str, first: str = "# ", rest: str = "# ") -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), WIDTH, initial_indent=indent + first, subsequent_indent=indent + rest,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _decided(settings: Mapping[str, Setting], findings: Sequence[Finding]) -> list[str]:
    found = [f for f in findings if f.kind == "assumed" and f.to[0] not in settings]
    lines = ["", "# Not said there, so that slmops decides:"] if found else []
    for finding in found:
        lines += _wrapped(f"{finding.to[0]}: {finding.note}", "", "#   ", "#     ")
    return lines


def _ignored(findings: Sequence[Finding], file: str, trainer: str) -> list[str]:
    lines: list[str] = []
    for changes, title in ((True, "These change what is learned:"), (False, "These do not:")):
        found = [finding for finding in findings if finding.kind == "ignored" and finding.changes == changes]
        if found:
            lines += ["", f"# Ignored from {file} ({trainer}). {title}"]
            for finding in found:
                lines += _wrapped(f"{finding.key}: {finding.note}", "", "#   ", "#     ")
    return lines


PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")


def scalar(value: Any) -> str:
    """A value as YAML 1.2 reads it back."""
    if isinstance(value, list):
        return f"[{', '.join(scalar(item) for item in value)}]"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in WORDS else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and value == int(value) and abs(value) < 1e6:
        return f"{value:.1f}"
    return json.dumps(value)
