"""LLaMA-Factory's dataset_info.json: what its dataset names stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.errors import UsageError
from slmops.flow.interop import datasets as places
from slmops.flow.interop import training
from slmops.flow.interop.datasets import LAST_TURN, Dataset
from slmops.flow.interop.rules import Drop, Source

INFO = "dataset_info.json"
TRAINER = "LLaMA-Factory"
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
ROLES = {
    "user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant", "model"), "system_tag": ("system",),
    "observation_tag": ("observation", "tool"), "function_tag": ("function_call",),
}  # fmt: skip


def _info(source: Source) -> tuple[Path | None, Mapping[str, Any]]:
    folder = source.get("dataset_dir")
    if isinstance(folder, Mapping):
        return None, folder
    found = places.find(str(folder or "data"), source)
    file = found / INFO if found is not None else None
    if file is None or not file.is_file():
        return found, {}
    try:
        value = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}", "mend it: it says where the datasets are") from None
    if not isinstance(value, dict):
        raise UsageError(f"{file} does not hold a JSON object", "it maps names of datasets to where they are")
    return found, value


def named(source: Source, key: str) -> list[Dataset]:
    """The datasets that a key names, looked up.

    Raises:
        UsageError: dataset_info.json is there but cannot be read.
    """
    names = source.names(key)
    if not names:
        return []
    folder, info = _info(source)
    preference = source.word("stage", "sft").lower() == "dpo"
    return [_dataset(name, folder, info, source, preference) for name in names]


def _dataset(name: str, folder: Path | None, info: Mapping[str, Any], source: Source, preference: bool) -> Dataset:
    default = training.preference_format() if preference else "auto"
    entry = info.get(name)
    if not isinstance(entry, Mapping):
        if source.get("dataset_dir") == "ONLINE":
            return Dataset(name, places.hub(name), format=default)
        where = INFO if folder is None and info else f"{source.word('dataset_dir', 'data')}/{INFO}"
        why = f"{name} is not in {where}" if info else f"{name} cannot be looked up: there is no {where}"
        return Dataset(name, name, format=default, notes=(f"{why}; give its file",), drops=(Drop(why, True),))
    drops: list[Drop] = []
    local: Path | None = None
    if isinstance(entry.get("hf_hub_url"), str):
        where = places.hub(entry["hf_hub_url"], str(entry.get("subset") or ""))
    elif isinstance(entry.get("file_name"), str):
        where, local = places.place(entry["file_name"], source, "", "", *([folder] if folder else []))
        if where.startswith("hf:"):
            where = entry["file_name"]
    else:
        where = name
        drops.append(Drop(f"{name} comes from a hub or script that slmops does not read: give a file", True))
    for key in ("script_url", "cloud_file_name", "folder", "num_samples"):
        if entry.get(key):
            drops.append(Drop(f"{name}: {key} of {INFO} is not read", True))
    kind, columns, notes = _columns(name, entry, preference, drops)
    part = str(entry.get("split") or "train") if where.startswith("hf:") else ""
    return Dataset(name, where, local, part, kind, columns, "", notes, tuple(drops))


def _columns(
    name: str, entry: Mapping[str, Any], preference: bool, drops: list[Drop]
) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """Format, `data.columns` and notes of an entry of dataset_info.json."""
    given, tags = entry.get("columns"), entry.get("tags")
    columns: dict[str, str] = {k: str(v) for k, v in given.items()} if isinstance(given, Mapping) else {}
    tagged: dict[str, str] = {k: str(v) for k, v in tags.items()} if isinstance(tags, Mapping) else {}
    for key in ("tools", "images", "videos", "audios", "kto_tag"):
        if key in columns:
            drops.append(Drop(f"{name}: the column of {key} is not read", True))
    if preference:
        names = {k: columns[k] for k in ("chosen", "rejected") if columns.get(k, k) != k}
        if names:
            drops.append(Drop(f"{name}: rename {', '.join(names.values())} to {', '.join(names)}", True))
        return training.preference_format(), {}, ()
    if str(entry.get("formatting") or "alpaca") == "alpaca":
        own = {k: v for k, v in columns.items() if k in ALPACA}
        if all(ALPACA[k] == v for k, v in own.items()):
            return "alpaca", {}, ("instruction and input are joined by an empty line, there by a line break",)
        if "history" in own:
            drops.append(Drop(f"{name}: the column of history is not read beside renamed columns", True))
        prompt, query = own.get("prompt"), own.get("query")
        both = {"context": prompt, "prompt": query} if prompt and query else {"prompt": prompt or query}
        picked = {**both, "answer": own.get("response"), "system": own.get("system")}
        notes = (f"rows without {query} are refused",) if prompt and query else ()
        return "auto", {k: v for k, v in picked.items() if v}, notes
    turns = columns.get("messages", "conversations")
    keys = (tagged.get("role_tag", "from"), tagged.get("content_tag", "value"))
    shape = {("conversations", "from", "value"): "sharegpt", ("messages", "role", "content"): "messages"}.get(
        (turns, *keys)
    )
    if entry.get("formatting") == "openai" and not tagged:
        shape = "messages"
    odd = [tagged[k] for k, known in ROLES.items() if k in tagged and tagged[k] not in known]
    if shape is None or odd:
        what = f"roles {', '.join(odd)}" if odd else f"turns in {turns} with {' and '.join(keys)}"
        drops.append(Drop(f"{name}: {what}: rename them as messages or sharegpt have them", True))
    return shape or "auto", {}, (LAST_TURN.format(TRAINER),)
