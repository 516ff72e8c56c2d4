"""Olive: the options of `olive finetune`, its command line, or a workflow with a pass that fine-tunes. As of August 2026.

See `olive_form` for how the three become one. Olive has no full fine-tuning and no preference tuning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.flow.interop import datasets as places
from slmops.flow.interop import hf_arguments, training
from slmops.flow.interop.datasets import LAST_TURN, Dataset
from slmops.flow.interop.olive_form import OPTIONS, PASSES
from slmops.flow.interop.rules import (
    Drop,
    Fits,
    Ignored,
    OddError,
    Outcome,
    Set,
    Source,
    Table,
    To,
    because,
    joined,
    works_through,
)

NAME = "Olive"
NEEDS = {"student.base": "model_name_or_path", "data.path": "data_name"}
DEFAULTS: dict[str, Any] = {
    **hf_arguments.DEFAULTS,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.03,
    "pass.type": "lora",
    "pass.r": 64,
    "pass.alpha": 16.0,
    "pass.lora_dropout": 0.05,
    "pass.torch_dtype": "bfloat16",
    "data.max_seq_len": 1024,
    "data.strategy": "join",
}
LOADERS = ("json", "csv", "parquet", "text")
ALWAYS: dict[str, tuple[Any, str]] = {
    "train.method": ("sequence", ""),
    "train.prompt_weight": (1.0, "Olive learns all of the text, the prompt as well as the answer"),
    "train.patience": (0, "Olive stops no training early"),
}
"""What Olive does whatever its file says."""


def defaults(source: Source) -> dict[str, Any]:
    """What Olive takes for keys that are not there; the command has more of them than a workflow."""
    command = all(len(place) == 1 for place in source.places.values())
    return {**DEFAULTS, **({"data.max_samples": 256} if command else {})}


def table(source: Source) -> Table:
    """`TABLE`, with the passes and data of a workflow that are not about fine-tuning."""
    more = {key: OTHER_PASS for key in source.values if key.startswith("passes.")}
    more |= {key: OTHER_DATA for key in source.values if key.startswith("data_configs.")}
    return {**TABLE, **more}


def _trains_nothing(item: Any) -> bool:
    return isinstance(item, Mapping) and str(item.get("type", "")).lower() not in PASSES


OTHER_PASS = Ignored(
    "slmops takes the first pass that fine-tunes; see `convert` for the rest", True, harmless=_trains_nothing
)
OTHER_DATA = Ignored("the pass that fine-tunes does not use it")


def _type(source: Source, key: str) -> list[Outcome]:
    kind = source.choice(key, PASSES)
    word = {"loftq": "qlora", "loha": "lora", "lokr": "lora"}.get(kind, kind)
    out: list[Outcome] = [Set("train.tuning", word)]
    if word != kind:
        what = "low-rank weights start as in the paper" if kind == "loftq" else "LoRA in its place"
        out.append(Drop(f"{kind} is not there: {what}", changes=True))
    return out


def _alpha(source: Source, key: str) -> Outcome:
    return Set("train.lora.alpha", source.number(key))


def _dtype(source: Source, key: str) -> Outcome:
    kind = source.choice(key, ("bfloat16", "float16", "float32"))
    return training.precision(kind == "bfloat16", kind == "float16")


def _model_type(source: Source, key: str) -> Outcome:
    if source.word(key).lower() in ("hfmodel", "hfmodelhandler"):
        return Fits("a model in Hugging Face form, as always")
    raise OddError(key, f"{source.word(key)} cannot be fine-tuned", "give an HfModel")


def _base(source: Source, key: str) -> list[Outcome]:
    name = source.word(key).removeprefix("https://huggingface.co/")
    if name.startswith("azureml://"):
        return [Set("student.base", name), Drop("models of a registry are not read: give a folder or hub id", True)]
    return places.model(name, "", source)


def _dataset(source: Source, prefix: str) -> Dataset:
    name = source.word(f"{prefix}.data_name", source.word("data.data_name"))
    files = source.names(f"{prefix}.data_files") or source.names("data.data_files")
    part, drops = places.split_name(source.word(f"{prefix}.split", "train"))
    config = source.word(f"{prefix}.subset", source.word("data.subset"))
    kind, columns, notes, odd = _shape(source)
    if files:
        base = Path() if name in LOADERS else Path(name)
        where, local = places.place(str(base / files[0]), source)
        if len(files) > 1:
            drops = (*drops, Drop(f"only {files[0]} of data_files is taken; data.splits.train may name several", True))
    else:
        where, local = places.place(name, source, config)
    part = part if where.startswith("hf:") else ""
    more = tuple(Drop(reason, changes=True) for reason in odd)
    return Dataset(name, where, local, part, kind, columns, "", notes, (*drops, *more) if prefix == "data" else drops)


def _shape(source: Source) -> tuple[str, dict[str, str], tuple[str, ...], list[str]]:
    if source.get("data.chat_template"):
        column = source.word("data.message_col", "messages")
        odd = [] if column == "messages" else [f"rename the column {column} to messages"]
        return "messages", {}, (LAST_TURN.format(NAME),), odd
    fields = list(dict.fromkeys(re.findall(r"\{(\w+)\}", source.word("data.text_template"))))
    if len(fields) == 2:
        note = "the first field of the template is the prompt, the second the answer"
        return "auto", {"prompt": fields[0], "answer": fields[1]}, (note,), []
    if fields:
        return "auto", {}, (), ["say in data.columns which field of the template is the prompt and which the answer"]
    return "auto", {}, (), ["text in one piece is not read, only prompts with answers: see data.columns"]


def _data(source: Source, _key: str) -> list[Outcome]:
    return places.combine([_dataset(source, "data")], [])


def _eval_split(source: Source, key: str) -> list[Outcome]:
    if not source.word(key):
        return [Fits("empty: no validation; slmops takes some always")]
    train = [_dataset(source, "data")]
    return places.combine(train, [_dataset(source, "eval")], at_validation=True)


def _strategy(source: Source, key: str) -> Outcome:
    kind = source.word(key).lower()
    if kind.startswith("line-by-line"):
        return Set("train.batching", "bucket")
    note = "rows of max_seq_len tokens counted as one example of a batch: raise train.batch_size accordingly"
    return Set("train.batching", "pack", note)


def _most(source: Source, key: str) -> Outcome:
    most = source.whole(key)
    return Set("data.max_examples", most, "chosen by content") if most > 0 else Fits("all of them")


def _length(source: Source, key: str) -> Outcome:
    return Set("train.max_length", source.whole(key), "longer examples are refused, not cut")


def assumed(source: Source) -> dict[str, str]:
    """What slmops decides as the file does not, by place."""
    return {} if "pass.target_modules" in source.values else {"train.lora.targets": training.PEFT_TARGETS}


def rows(source: Source) -> int | None:
    """Training examples, where rows are not joined."""
    if not source.word("data.strategy").lower().startswith("line-by-line"):
        return None
    return places.count([_dataset(source, "data")], source.whole("data.max_samples"))


def task(settings: Mapping[str, Any]) -> str:
    """The likeliest `task.type`."""
    return "chat" if settings.get("data.format") == "messages" else "generation"


TRANSLATED: dict[str, To] = {
    **hf_arguments.TRANSLATED,
    "input_model.model_path": To("student.base", _base),
    "input_model.type": To("student.base", _model_type),
    "pass.type": To("train.tuning", _type),
    "pass.r": To("train.lora.rank", lambda source, key: Set("train.lora.rank", source.whole(key))),
    "pass.alpha": To("train.lora.alpha", _alpha),
    "pass.lora_dropout": To("train.lora.dropout", lambda s, key: Set("train.lora.dropout", s.number(key))),
    "pass.target_modules": To("train.lora.targets", lambda s, key: training.targets(s.names(key), key)),
    "pass.modules_to_save": To("train.lora.embeddings", lambda s, key: training.whole(s.names(key), key)),
    "pass.torch_dtype": To("train.precision", _dtype),
    "data.data_name": To("data.path", _data),
    "data.subset": works_through("data.path", "data_name"),
    "data.data_files": works_through("data.path", "data_name"),
    "data.split": works_through("data.splits.train", "data_name"),
    "eval.data_name": works_through("data.splits.validation", "the split for evaluation"),
    "eval.data_files": works_through("data.splits.validation", "the split for evaluation"),
    "eval.subset": works_through("data.splits.validation", "the split for evaluation"),
    "eval.split": To("data.splits.validation", _eval_split),
    "data.text_template": works_through("data.columns", "data_name"),
    "data.text_cols": works_through("data.columns", "data_name"),
    "data.chat_template": works_through("data.format", "data_name"),
    "data.message_col": works_through("data.format", "chat_template"),
    "data.max_seq_len": To("train.max_length", _length),
    "data.max_samples": To("data.max_examples", _most),
    "data.strategy": To("train.batching", _strategy),
}
"""By the names of `olive_form`."""

IGNORED = joined(
    hf_arguments.IGNORED,
    because("the loader of slmops decides by the file", "data.container data.component eval.container eval.component"),
    because("names inside the file", "data.name eval.name"),
    because("slmops runs no code of a model or dataset", "data.user_script data.script_dir data.trust_remote_code"),
    because("slmops runs no code of a model or dataset", "eval.user_script eval.script_dir eval.trust_remote_code"),
    because("slmops runs no code of a model or dataset", "input_model.trust_remote_code input_model.load_kwargs"),
    because("the task stands in task.type", "input_model.task"),
    because(
        "the base model is taken as it is, without Olive's attributes",
        "input_model.model_attributes input_model.io_config input_model.test_model_path input_model.test_model_config",
    ),
    because("training starts from new low-rank weights", "input_model.adapter_path", changes=True),
    because("a batch for training is per_device_train_batch_size", "data.batch_size eval.batch_size"),
    because("the base model's own chat template sets the marks", "data.add_special_tokens eval.add_special_tokens"),
    because(
        "the text of an example is its messages; see data.columns",
        "data.text_formatting_func data.input_cols data.label_col data.label_cols data.col_filters data.data_dir",
        changes=True,
    ),
    because(
        "slmops pads and cuts by itself",
        "data.pad_to_max_len data.padding_side data.drop_short_sequences data.use_attention_mask data.joiner data.stride "
        "data.processing_batch_size data.random_seed data.random_retries data.collate_fn data.shuffle data.drop_last "
        "data.num_workers data.max_length data.limit",
    ),
    because(
        "validation is read as the training data are",
        "eval.text_template eval.text_cols eval.chat_template eval.message_col eval.max_seq_len eval.max_samples "
        "eval.strategy eval.text_formatting_func eval.input_cols eval.pad_to_max_len eval.padding_side "
        "eval.drop_short_sequences eval.use_attention_mask eval.joiner eval.stride eval.processing_batch_size "
        "eval.random_seed eval.random_retries eval.limit",
    ),
    because(
        "slmops trains low-rank weights on linear layers, of one rank, that start as in the paper",
        "pass.exclude_modules pass.layers_to_transform pass.layers_pattern pass.rank_pattern "
        "pass.alpha_pattern pass.rank_dropout pass.module_dropout",
        changes=True,
        off=({},),
    ),
    because("low-rank weights start as in the paper", "pass.init_weights", changes=True, off=(True,)),
    because(
        "about LoHa, LoKr or LoftQ, which are not there",
        "pass.use_effective_conv2d pass.decompose_both pass.decompose_factor pass.rank_dropout_scale pass.loftq_iter",
    ),
    because("the base in 4 bits is made by slmops", "pass.quant_type", changes=True, off=("nf4",)),
    because("the base in 4 bits is made by slmops", "pass.double_quant pass.compute_dtype pass.save_quant_config"),
    because("about speed or memory; slmops decides by the machine", "pass.device_map pass.allow_tf32"),
    because("about speed or memory; slmops decides by the machine", "pass.ephemeral_gpu_offload"),
    because(
        "about Olive's engine; slmops plans by itself",
        "systems host target engine cache_dir cache_config clean_cache clean_evaluation_cache enable_shared_cache "
        "log_severity_level ort_log_severity_level ort_py_log_severity_level log_to_file workflow_id no_artifacts "
        "evaluate_input_model packaging_config plot_pareto_frontier azureml_client auto_optimizer_options builds "
        "max_concurrent_builds workflow_host pass.host pass.target pass.evaluator pass.name pass.disable_search "
        "output_path save_config_file dry_run account_name container_name disable_telemetry test test_metrics "
        "test_llama_path",
    ),
    because("search is not there in this file", "search_strategy", changes=True),
    because("the result is judged by evaluate", "evaluator evaluators"),
)
TABLE: Table = {**IGNORED, **TRANSLATED}
KEYS = frozenset(
    {*OPTIONS, *hf_arguments.TABLE, "input_model", "passes", "data_configs"} | {k for k in TABLE if "." not in k}
)
"""What may stand at the top of a file."""
