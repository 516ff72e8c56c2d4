"""The entries of Axolotl's `datasets` and `test_datasets`: where the data are and which shape they have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.flow.interop import datasets as places
from slmops.flow.interop import training
from slmops.flow.interop.datasets import LAST_TURN, Dataset
from slmops.flow.interop.rules import (
    UNKNOWN,
    Drop,
    Fits,
    OddError,
    Outcome,
    Source,
    Table,
    To,
    because,
    joined,
    works_through,
)

TRAINER = "Axolotl"
LOADERS = ("json", "csv", "parquet", "text", "arrow")
ALPACA = ("alpaca", "alpaca_chat", "alpaca_instruct", "alpaca_w_system", "alpaca_chat.load_concise")
COLUMNS: dict[str, dict[str, str]] = {
    "alpaca_chat.load_qa": {"prompt": "question", "answer": "answer"},
    "alpaca_w_system.load_open_orca": {"prompt": "question", "answer": "response", "system": "system_prompt"},
    "context_qa": {"prompt": "question", "answer": "answer", "context": "article"},
    "summarizetldr": {"prompt": "article", "answer": "summary"},
    "oasst": {"prompt": "INSTRUCTION", "answer": "RESPONSE"},
}
"""Prompt types whose rows slmops reads by `data.columns`."""

PLACE = works_through("data.path", "path")
SHAPE = works_through("data.format", "type")
TRANSLATED: dict[str, To] = {
    "path": To("data.path", lambda _s, _k: Fits("data.path")),
    "name": PLACE,
    "revision": PLACE,
    "data_files": PLACE,
    "ds_type": PLACE,
    "split": works_through("data.splits.train", "path"),
    "type": To("data.format", lambda _s, _k: Fits("data.format")),
    "field_messages": SHAPE,
    "message_property_mappings": SHAPE,
    "message_field_role": SHAPE,
    "message_field_content": SHAPE,
    "field_chosen": SHAPE,
    "field_rejected": SHAPE,
    "field_human": SHAPE,
    "field_model": SHAPE,
    "roles": To("always", lambda _s, _k: Fits("the usual names of roles are known")),
    "roles_to_train": To("always", lambda _s, _k: Fits("the last answer is learned, as always")),
    "train_on_eos": To("always", lambda _s, _k: Fits("the end of the answer is learned, as always")),
    "train_on_eot": To("always", lambda _s, _k: Fits("the end of the answer is learned, as always")),
    "chat_template": To("always", lambda _s, _k: Fits("the base model's own chat template is used")),
    "conversation": To("always", lambda _s, _k: Fits("the base model's own chat template is used")),
}
IGNORED = joined(
    because(
        "data are read whole; see data.max_examples", "shards shards_idx preprocess_shards skip", changes=True
    ),
    because("the base model's own chat template is used", "chat_template_jinja", changes=True),
    because("text is taken as it stands in the row", "input_transform input_format format no_input_format", changes=True),
    because("every message has the same weight", "message_field_training message_field_training_detail", changes=True),
    because("thoughts and tools beside the messages are not read", "field_tools field_thinking split_thinking", changes=True),
    because("thoughts and tools beside the messages are not read", "template_thinking_key"),
    because("messages are taken as they are", "drop_system_message", changes=True),
    because("raw text is not read, only prompts with answers", "field text_column", changes=True),
    because("see train.method: logits", "logprobs_field temperature", changes=True),
    because("rewards for steps are not there", "step_separator max_completion_length train_on_last_step_only", changes=True),
    because("made-up rows for tests of speed are not there", "length sequence_length min_input_id max_input_id seed"),
    because("slmops runs no code of a model or dataset", "trust_remote_code"),
)  # fmt: skip
ENTRY: Table = {**IGNORED, **TRANSLATED}


def entries(source: Source, key: str) -> tuple[list[Dataset], list[Outcome]]:
    """The datasets of a key, and what became of each key inside.

    Raises:
        OddError: not a list of mappings with a path.
    """
    value = source.get(key)
    if not isinstance(value, list) or not value:
        raise OddError(key, "must be a list of datasets", "each with path: and type:")
    found: list[Dataset] = []
    outcomes: list[Outcome] = []
    for index, entry in enumerate(value):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
            raise OddError(key, f"entry {index + 1} has no path", "each dataset has path: and type:")
        found.append(_entry(index, entry, source))
        for name, inner in entry.items():
            rule = ENTRY.get(str(name))
            at = f"{index}.{name}"
            if inner is None:
                continue
            if isinstance(rule, To):
                answer = rule.convert(source, str(name))
                note = answer.note if isinstance(answer, Fits) else ""
                outcomes.append(Fits(note, at))
            elif rule is None:
                outcomes.append(Drop(UNKNOWN, True, at))
            else:
                outcomes.append(Drop(rule.reason, rule.loses(inner), at))
    return found, outcomes


def _entry(index: int, entry: Mapping[str, Any], source: Source) -> Dataset:
    path = str(entry["path"])
    files = entry.get("data_files")
    drops: list[Drop] = []
    if files and (path in LOADERS or places.find(path, source)):
        names = [files] if isinstance(files, str) else [str(name) for name in files]
        base = Path() if path in LOADERS else Path(path)
        where, local = places.place(str(base / names[0]), source)
        if len(names) > 1:
            drops.append(
                Drop(f"only {names[0]} of data_files is taken; data.splits.train may name several", True, str(index))
            )
    else:
        where, local = places.place(path, source, str(entry.get("name") or ""), str(entry.get("revision") or ""))
        if files:
            drops.append(Drop("data_files of a hub dataset: give its split in data.splits.train", True, str(index)))
    part, sliced = places.split_name(str(entry.get("split") or "train"))
    drops += [Drop(drop.reason, True, str(index)) for drop in sliced]
    kind, columns, notes, odd = _shape(entry, bool(source.word("rl")))
    drops += [Drop(reason, True, f"{index}.type") for reason in odd]
    part = part if where.startswith("hf:") else ""
    return Dataset(path, where, local, part, kind, columns, str(index), notes, tuple(drops))


def _shape(entry: Mapping[str, Any], preference: bool) -> tuple[str, dict[str, str], tuple[str, ...], list[str]]:
    """Format, columns, notes, and what has no counterpart."""
    kind = entry.get("type")
    own: Mapping[str, Any] = kind if isinstance(kind, Mapping) else {}
    if preference:
        names = {
            name: own.get(f"field_{name}") or entry.get(f"field_{name}") for name in ("prompt", "chosen", "rejected")
        }
        other = {name: str(value) for name, value in names.items() if value and value != name}
        odd = [f"rename {', '.join(other.values())} to {', '.join(other)}"] if other else []
        return training.preference_format(), {}, (), odd
    if own:
        fields = {
            "prompt": "field_instruction",
            "answer": "field_output",
            "context": "field_input",
            "system": "field_system",
        }
        columns = {to: str(own[name]) for to, name in fields.items() if own.get(name)}
        if "context" in columns and "prompt" in columns:
            columns["context"], columns["prompt"] = columns["prompt"], columns["context"]
        extra = [name for name in own if name not in fields.values()]
        odd = [f"{', '.join(extra)}: the base model's own chat template is used"] if extra else []
        return "auto", columns, (), odd
    name = str(kind or "").partition(":")[0]
    if name in ALPACA:
        return "alpaca", {}, ("the base model's own chat template in place of Alpaca's headings",), []
    if name in COLUMNS:
        return "auto", COLUMNS[name], (), []
    turns = (LAST_TURN.format(TRAINER),)
    if name.startswith("sharegpt"):
        return "sharegpt", {}, turns, []
    if name.startswith("chat_template"):
        mapped: Any = entry.get("message_property_mappings")
        own = mapped if isinstance(mapped, Mapping) else {}
        role = str(own.get("role") or entry.get("message_field_role") or "role")
        content = str(own.get("content") or entry.get("message_field_content") or "content")
        where = str(entry.get("field_messages") or "messages")
        known = {("messages", "role", "content"): "messages", ("conversations", "from", "value"): "sharegpt"}
        shape = known.get((where, role, content))
        odd = (
            []
            if shape
            else [f"turns in {where} with {role} and {content}: rename them as messages or sharegpt have them"]
        )
        return shape or "auto", {}, turns, odd
    what = f"prompts of type {name}" if name else "rows without a type"
    return "auto", {}, (), [f"{what} are not read: see data.format and data.columns"]
