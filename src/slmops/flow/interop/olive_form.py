"""The three forms of Olive's fine-tuning as one flat list of keys: a workflow, the options of a command, its line.

A workflow (`olive run`) nests what `olive finetune` takes as options; both become the same keys, such as `pass.r` for
`lora_r`, each with the place where the file has it. Training arguments of transformers keep their names.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from slmops.errors import UsageError

Place = tuple[str | int, ...]
PASSES = ("lora", "qlora", "dora", "loha", "lokr", "loftq")
OPTIONS = {
    "model_name_or_path": "input_model.model_path", "task": "input_model.task", "adapter_path": "input_model.adapter_path",
    "trust_remote_code": "input_model.trust_remote_code", "method": "pass.type", "lora_r": "pass.r",
    "lora_alpha": "pass.alpha", "target_modules": "pass.target_modules", "torch_dtype": "pass.torch_dtype",
    "data_name": "data.data_name", "train_subset": "data.subset", "train_split": "data.split",
    "eval_subset": "eval.subset", "eval_split": "eval.split", "data_files": "data.data_files",
    "text_field": "data.text_cols", "text_template": "data.text_template", "use_chat_template": "data.chat_template",
    "max_seq_len": "data.max_seq_len", "add_special_tokens": "data.add_special_tokens",
    "max_samples": "data.max_samples", "batch_size": "data.batch_size", "input_cols": "data.input_cols",
}  # fmt: skip
"""Options of `olive finetune` by the key that a workflow has for them."""

SHORT = {"m": "model_name_or_path", "t": "task", "a": "adapter_path", "o": "output_path", "d": "data_name"}
COMPONENTS = ("load_dataset_config", "pre_process_data_config", "dataloader_config", "post_process_data_config")


def command(text: str) -> dict[str, Any] | None:
    """The options of an `olive finetune` command line, or None if the text is something else.

    Raises:
        UsageError: quotes that do not end, or a word where an option should be.
    """
    lines = [line.strip() for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines()]
    found = next((line for line in lines if line.lstrip("$!> ").startswith("olive finetune")), None)
    if found is None or any(line and line != found and not line.startswith("#") for line in lines):
        return None
    try:
        words = shlex.split(found.lstrip("$!> "), comments=True)[2:]
    except ValueError as error:
        raise UsageError(f"the command line cannot be taken apart: {error}", "check its quotes") from None
    out: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("-") and not _negative(word):
            name, equals, value = word.lstrip("-").partition("=")
            name = (SHORT.get(name, name) if not word.startswith("--") else name).replace("-", "_")
            out[name] = value if equals else True
        elif not name:
            raise UsageError(f"{word!r} is not an option of olive finetune", "options begin with --")
        else:
            before = out[name]
            out[name] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    return out


def _negative(word: str) -> bool:
    return word[1:2].isdigit() or word[1:2] == "."


def flatten(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Place]]:
    """Keys, values and places.

    Raises:
        UsageError: a workflow without a pass that fine-tunes, or parts of it that are no mappings.
    """
    values: dict[str, Any] = {}
    places: dict[str, Place] = {}

    def add(key: str, place: Place, value: Any) -> None:
        if key not in values:
            values[key], places[key] = value, place

    if "passes" not in tree:
        for key, value in tree.items():
            add(OPTIONS.get(key, key), (key,), value)
        return values, places
    for key, value in tree.items():
        if key == "input_model":
            _model(add, value, (key,))
        elif key == "passes":
            _passes(add, _mapping(value, key), tree)
        elif key != "data_configs" or not isinstance(value, list):
            add(key, (key,), value)
    return values, places


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{what} is not a mapping", "write it as Olive's documentation shows it")
    return value


def _model(add: Any, value: Any, place: Place) -> None:
    if isinstance(value, str):
        add("input_model.model_path", place, value)
        return
    for key, inner in _mapping(value, "input_model").items():
        if key == "config" and isinstance(inner, Mapping):
            _model(add, inner, (*place, key))
        else:
            add(f"input_model.{key}", (*place, key), inner)


def _passes(add: Any, passes: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
    used: set[int] = set()
    taken = False
    for name, value in passes.items():
        several = isinstance(value, list)
        for index, item in enumerate(value if several else [value]):
            place: Place = ("passes", name, index) if several else ("passes", name)
            kind = str(item.get("type", "")).lower() if isinstance(item, Mapping) else ""
            if kind not in PASSES or taken:
                add(".".join(str(part) for part in place), place, item)
                continue
            taken = True
            _pass(add, item, place, tree, used)
    if not taken:
        raise UsageError(
            "no pass of this workflow fine-tunes", f"`passes` needs one with a type of: {', '.join(PASSES)}"
        )
    configs = tree.get("data_configs")
    for index, item in enumerate(configs if isinstance(configs, list) else []):
        if index not in used:
            add(f"data_configs.{index}", ("data_configs", index), item)


def _pass(add: Any, item: Mapping[str, Any], place: Place, tree: Mapping[str, Any], used: set[int]) -> None:
    for key, value in item.items():
        if key == "config" and isinstance(value, Mapping):
            _pass(add, value, (*place, key), tree, used)
        elif key in ("training_args", "extra_args") and isinstance(value, Mapping):
            for name, inner in value.items():
                if name == "extra_args" and isinstance(inner, Mapping):
                    for deeper, last in inner.items():
                        add(deeper, (*place, key, name, deeper), last)
                else:
                    add(name, (*place, key, name), inner)
        elif key in ("train_data_config", "eval_data_config"):
            _data(add, value, (*place, key), tree, used, "data" if key == "train_data_config" else "eval")
        else:
            add(f"pass.{key}", (*place, key), value)


def _data(add: Any, value: Any, place: Place, tree: Mapping[str, Any], used: set[int], prefix: str) -> None:
    if isinstance(value, str):
        configs = tree.get("data_configs")
        listed = configs if isinstance(configs, list) else []
        index = next((i for i, c in enumerate(listed) if isinstance(c, Mapping) and c.get("name") == value), None)
        if index is None:
            raise UsageError(f"{'.'.join(map(str, place))}: no data config {value!r}", "name one of data_configs")
        used.add(index)
        value, place = listed[index], ("data_configs", index)
    for key, inner in _mapping(value, ".".join(map(str, place))).items():
        if key in COMPONENTS and isinstance(inner, Mapping):
            for name, deeper in inner.items():
                if name == "params" and isinstance(deeper, Mapping):
                    for last, what in deeper.items():
                        add(f"{prefix}.{last}", (*place, key, name, last), what)
                else:
                    add(f"{prefix}.{'component' if name == 'type' else name}", (*place, key, name), deeper)
        else:
            add(f"{prefix}.{'container' if key == 'type' else key}", (*place, key), inner)
