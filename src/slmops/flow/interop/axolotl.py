"""Axolotl: the YAML that `axolotl train` takes. Keys of version 0.18, with those of its plugins and its renamed ones.

Keys inside an entry of `datasets` are in `axolotl_data`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmops.flow.interop import datasets as places
from slmops.flow.interop import training
from slmops.flow.interop.axolotl_data import entries
from slmops.flow.interop.axolotl_ignored import IGNORED
from slmops.flow.interop.rules import (
    Drop,
    Fits,
    OddError,
    Outcome,
    Set,
    Source,
    Table,
    To,
    flag_fits,
    number_to,
    whole_to,
    word_to,
    works_through,
)

NAME = "Axolotl"
NEEDS = {"student.base": "base_model", "data.path": "datasets"}
MOST_WARMUP = 100
"""Steps of warm-up at most, where the file does not say."""

DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1.0,
    "lr_scheduler": "cosine",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "sequence_len": 512,
    "early_stopping_patience": 0,
}


def defaults(source: Source) -> dict[str, Any]:
    """What Axolotl takes for keys that are not there."""
    found = {"adapter": "", "rl": "", **DEFAULTS}
    if source.get("adapter"):
        found["lora_dropout"] = 0.0
    return found


def _tuning(source: Source) -> str:
    adapter = source.word("adapter").lower()
    four = adapter == "qlora" or source.flag("load_in_4bit")
    kind = "lora" if adapter else "full"
    return training.tuning(kind, four, source.flag("peft_use_dora"), source.flag("peft_use_rslora"))


def _adapter(source: Source, key: str) -> list[Outcome]:
    adapter = source.word(key).lower()
    out: list[Outcome] = [Set("train.tuning", _tuning(source))]
    if adapter not in ("", "lora", "qlora"):
        out.append(Drop(f"{adapter} is not there: LoRA in its place", changes=True))
    return out


def _four_bits(source: Source, key: str) -> Outcome:
    if not source.flag(key):
        return Fits("off, as by default")
    if not source.get("adapter"):
        return Drop("only a base under LoRA can be held in 4 bits", changes=True)
    return Set("train.tuning", _tuning(source))


def _dora(source: Source, key: str) -> Outcome:
    return training.dora_switch(source.flag(key), _tuning(source)) if source.get("adapter") else Drop(_NO_ADAPTER)


_NO_ADAPTER = "about LoRA, and there is no adapter"


def _rslora(source: Source, key: str) -> Outcome:
    tuning = _tuning(source)
    if not source.flag(key):
        return Fits("off, as by default")
    return Set("train.tuning", tuning) if tuning == "rslora" else _alpha(source, key)


def _alpha(source: Source, _key: str) -> Outcome:
    if not source.get("adapter"):
        return Drop(_NO_ADAPTER)
    rank = source.whole("lora_r", 16)
    return training.alpha(source.number("lora_alpha", 2 * rank), rank, _tuning(source), source.flag("peft_use_rslora"))


def _lora(path: str, *, whole: bool = False) -> To:
    def convert(source: Source, key: str) -> Outcome:
        if not source.get("adapter"):
            return Drop(_NO_ADAPTER)
        return Set(path, source.whole(key) if whole else source.number(key))

    return To(path, convert)


def _targets(source: Source, key: str) -> Outcome:
    if not source.get("adapter"):
        return Drop(_NO_ADAPTER)
    if source.flag("lora_target_linear"):
        return Fits("lora_target_linear takes all linear layers of the blocks, as by default")
    return training.targets(source.names(key), key)


def _whole(source: Source, key: str) -> Outcome:
    if not source.get("adapter"):
        return Drop(_NO_ADAPTER)
    return training.whole(source.names(key), key)


def _linear(source: Source, key: str) -> Outcome:
    if source.flag(key):
        return Fits("all linear layers of the blocks, as by default")
    return Fits("lora_target_modules decides")


def _parts(source: Source) -> tuple[int, int]:
    """Examples per device and accumulation parts, as Axolotl works them out."""
    per_device = source.whole("micro_batch_size")
    if "batch_size" in source.values and "gradient_accumulation_steps" not in source.values:
        if per_device < 1:
            raise OddError("micro_batch_size", "must be at least 1")
        return per_device, max(1, source.whole("batch_size") // per_device)
    return per_device, source.whole("gradient_accumulation_steps")


def _batch(source: Source, _key: str) -> list[Outcome]:
    per_device, parts = _parts(source)
    note = training.batch_note(per_device, parts)
    return [Set("train.batch_size", per_device * parts, note), Set("train.accumulate", parts)]


def _steps(source: Source) -> int | None:
    per_device, parts = _parts(source)
    rows = None if source.flag("sample_packing") else source.rows
    return training.total_steps(source.number("num_epochs"), source.whole("max_steps", -1), per_device * parts, rows)


def _packing(source: Source, key: str) -> Outcome:
    if not source.flag(key):
        return Set("train.batching", "bucket")
    note = "micro_batch_size counts packed rows: raise train.batch_size by the examples that fit in one"
    return Set("train.batching", "pack", note)


def _max_steps(source: Source, key: str) -> Outcome:
    most = source.whole(key)
    return Set("train.max_steps", most) if most > 0 else Fits("below 1: the epochs decide")


def _schedule(source: Source, key: str) -> list[Outcome]:
    name = source.word(key, "cosine").lower()
    if name == "cosine" and "cosine_min_lr_ratio" in source.values:
        return [Set("train.final_learning_rate", source.number("cosine_min_lr_ratio"))]
    options = source.get("lr_scheduler_kwargs")
    return training.schedule(name, options, source.number("learning_rate"))


def _warmup(source: Source, key: str) -> Outcome:
    if source.word("lr_scheduler").lower() == training.FLAT[0]:
        note = f"lr_scheduler {training.FLAT[0]} has no warm-up" if key in source.values else ""
        return Set("train.warmup", 0.0, note)
    number = source.number("warmup_steps")
    if number and key == "warmup_ratio":
        return Fits("warmup_steps goes before it")
    if "warmup_steps" in source.values and not number:
        return Set("train.warmup", 0.0)
    total, ratio = _steps(source), source.number("warmup_ratio")
    if key not in source.values and total is not None and ratio * total > MOST_WARMUP:
        return training.warmup(0.0, MOST_WARMUP, total)
    return training.warmup(ratio, number, total)


def _precision(source: Source, _key: str) -> Outcome:
    def given(*keys: str) -> bool | None:
        found = [source.flag(key) for key in keys if key in source.values and source.get(key) not in ("auto", "full")]
        return True if any(source.get(key) == "full" for key in keys) else any(found) if found else None

    if source.get("bf16") == "auto":
        return Set("train.precision", "auto")
    if source.flag("float32"):
        return Set("train.precision", "fp32")
    return training.precision(given("bf16", "bfloat16"), given("fp16", "float16"))


def _checkpointing(source: Source, key: str) -> Outcome:
    value = source.get(key)
    if isinstance(value, str) and value.startswith("offload"):
        return Set("train.checkpointing", True, "activations are not moved off the device")
    return Set("train.checkpointing", source.flag(key))


def _rl(source: Source, key: str) -> list[Outcome]:
    kind = source.word(key).lower()
    if kind in ("", "dpo", "orpo"):
        return [Set("train.method", kind or "sequence")]
    if kind in ("ipo", "simpo"):
        return [Set("train.method", "dpo"), Drop(f"{kind} is not there: written as dpo", changes=True)]
    raise OddError(key, f"{kind} has no counterpart", "slmops learns from answers and from preferences (dpo, orpo)")


def _beta(source: Source, key: str) -> Outcome:
    kind = source.word("rl").lower()
    if not kind:
        return Drop("about preferences, and rl is not set")
    given = [name for name in ("rl_beta", "dpo_beta", "orpo_alpha") if name in source.values]
    if given and given[0] != key:
        return Fits(f"{given[0]} goes before it")
    return Set("train.preference.beta", source.number(key))


def _smoothing(source: Source, key: str) -> Outcome:
    if source.word("rl").lower() != "dpo":
        return Drop("about dpo, which rl is not")
    return Set("train.preference.label_smoothing", source.number(key))


def _reward(source: Source, key: str) -> Outcome:
    if source.flag(key):
        raise OddError(key, "reward models have no counterpart", "slmops trains models that answer")
    return Fits("off, as always")


def _raw_text(source: Source, key: str) -> Outcome:
    if "datasets" in source.values:
        return Drop("raw text is not read, only prompts with answers", changes=True)
    raise OddError(key, "raw text has no counterpart", "slmops learns from prompts with answers: give `datasets`")


def _base(source: Source, _key: str) -> list[Outcome]:
    return places.model(source.word("base_model"), source.word("revision_of_model"), source)


def _datasets(source: Source, key: str) -> list[Outcome]:
    found, outcomes = entries(source, key)
    return [*places.combine(found, []), *outcomes]


def _test_datasets(source: Source, key: str) -> list[Outcome]:
    held, outcomes = entries(source, key)
    if "datasets" not in source.values:
        return [Drop("there is no `datasets` to learn from")]
    return [*places.combine(entries(source, "datasets")[0], held, at_validation=True), *outcomes]


def _validation_share(source: Source, key: str) -> Outcome:
    size = source.number(key)
    if 0 <= size < 1:
        return Set("data.splits.validation", size) if size else Fits("0: none is taken; slmops takes some always")
    rows = places.count(entries(source, "datasets")[0]) if "datasets" in source.values else None
    if rows is None:
        return Drop(f"data.splits.validation is a share: set it to {size:g} / examples")
    return Set("data.splits.validation", round(min(0.9, size / rows), 4), f"{size:g} of {rows} examples, as a share")


def _evals_per_epoch(source: Source, key: str) -> Outcome:
    looks = max(1, round(source.number(key) * source.number("num_epochs")))
    return Set("train.evaluations", looks, "times the epochs: how often in all")


def _eval_steps(source: Source, key: str) -> Outcome:
    return training.evaluations(source.number(key), _steps(source))


def _eval_strategy(source: Source, key: str) -> Outcome:
    found = source.word(key).lower()
    if found == "epoch":
        note = "once an epoch: how often in all"
        return Set("train.evaluations", max(1, round(source.number("num_epochs"))), note)
    if found in ("no", "false"):
        return Drop("slmops always looks at validation, train.evaluations times")
    return Fits("by steps, with eval_steps")


def _qat(source: Source, key: str) -> Outcome:
    value = source.get(key)
    kind = str(value.get("weight_dtype", "int8")) if isinstance(value, Mapping) else ""
    if kind == "int4" and _tuning(source) == "full":
        return Set("train.quantization_aware", "int4", "blocks of train.block_size; weights only, in the last part")
    return Drop(f"training on weights rounded to {kind or 'this'} is not there, only to int4, all weights moving", True)


def _quantization(source: Source, key: str) -> Outcome:
    value = source.get(key)
    kind = str(value.get("weight_dtype", "int8")) if isinstance(value, Mapping) else ""
    if kind in ("int4", "int8"):
        return Set("convert.precision", kind, "ONNX Runtime GenAI rounds; weights only")
    return Drop(f"a result in {kind or 'this form'} is not there: see convert.precision", changes=True)


def _trl(source: Source, key: str) -> list[Outcome]:
    value = source.get(key)
    if not isinstance(value, Mapping):
        raise OddError(key, "must be a mapping")
    out: list[Outcome] = []
    for name, inner in value.items():
        if name == "beta" and source.word("rl"):
            at = Source(source.file, source.out, {f"{key}.beta": inner}, {}, {f"{key}.beta": (key, "beta")})
            out.append(Set("train.preference.beta", at.number(f"{key}.beta"), at="beta"))
        else:
            out.append(Drop("about online reinforcement, which is not there", at=str(name)))
    return out


def _kd(source: Source, key: str) -> Outcome:
    return Drop("distillation is `teacher:` and train.method here; see docs/guides/your-own-task.md", changes=True)


def assumed(source: Source) -> dict[str, str]:
    """What slmops decides as the file does not, by place."""
    said = "lora_target_modules" in source.values or source.flag("lora_target_linear")
    return {} if said or not source.get("adapter") else {"train.lora.targets": training.PEFT_TARGETS}


def rows(source: Source) -> int | None:
    """Training examples, less those that Axolotl holds back."""
    if "datasets" not in source.values:
        return None
    found = places.count(entries(source, "datasets")[0])
    size = source.number("val_set_size")
    return None if found is None else int(found - (size if size >= 1 else found * size)) or None


def task(settings: Mapping[str, Any]) -> str:
    """The likeliest `task.type`."""
    return "chat" if settings.get("data.format") in ("sharegpt", "messages") else "generation"


TRANSLATED: dict[str, To] = {
    "base_model": To("student.base", _base),
    "revision_of_model": works_through("student.base", "base_model"),
    "model_revision": works_through("student.base", "base_model"),
    "adapter": To("train.tuning", _adapter),
    "load_in_4bit": To("train.tuning", _four_bits),
    "peft_use_dora": To("train.tuning", _dora),
    "peft_use_rslora": To("train.tuning", _rslora),
    "lora_r": _lora("train.lora.rank", whole=True),
    "lora_alpha": To("train.lora.alpha", _alpha),
    "lora_dropout": _lora("train.lora.dropout"),
    "lora_target_modules": To("train.lora.targets", _targets),
    "lora_modules_to_save": To("train.lora.embeddings", _whole),
    "lora_target_linear": To("train.lora.targets", _linear),
    "micro_batch_size": To("train.batch_size", _batch),
    "gradient_accumulation_steps": To("train.accumulate", _batch),
    "batch_size": To("train.batch_size", _batch),
    "num_epochs": number_to("train.epochs"),
    "max_steps": To("train.max_steps", _max_steps),
    "learning_rate": number_to("train.learning_rate"),
    "lr_scheduler": To("train.final_learning_rate", _schedule),
    "lr_scheduler_kwargs": works_through("train.final_learning_rate", "lr_scheduler"),
    "cosine_min_lr_ratio": works_through("train.final_learning_rate", "lr_scheduler"),
    "warmup_ratio": To("train.warmup", _warmup),
    "warmup_steps": To("train.warmup", _warmup),
    "weight_decay": number_to("train.weight_decay"),
    "max_grad_norm": To("train.clip", lambda source, key: training.clip(source.number(key))),
    "optimizer": To("always AdamW", lambda source, key: training.optimizer(source.word(key))),
    "adam_beta1": To("always 0.9", lambda source, key: training.beta(source.number(key), 0)),
    "adam_beta2": To("always 0.98", lambda source, key: training.beta(source.number(key), 1)),
    "bf16": To("train.precision", _precision),
    "bfloat16": To("train.precision", _precision),
    "fp16": To("train.precision", _precision),
    "float16": To("train.precision", _precision),
    "float32": To("train.precision", _precision),
    "gradient_checkpointing": To("train.checkpointing", _checkpointing),
    "sequence_len": To(
        "train.max_length", lambda s, key: Set("train.max_length", s.whole(key), "longer examples are refused, not cut")
    ),
    "excess_length_strategy": works_through("train.max_length", "sequence_len"),
    "sample_packing": To("train.batching", _packing),
    "train_on_inputs": To(
        "train.prompt_weight", lambda s, key: Set("train.prompt_weight", 1.0 if s.flag(key) else 0.0)
    ),
    "group_by_length": To("always", lambda _s, _k: Fits("batches hold examples of similar length, unless packed")),
    "seed": whole_to("seed"),
    "datasets": To("data.path", _datasets),
    "test_datasets": To("data.splits.validation", _test_datasets),
    "val_set_size": To("data.splits.validation", _validation_share),
    "pretraining_dataset": To("none", _raw_text),
    "default_system_message": word_to("task.instruction"),
    "chat_template": To("always", lambda _s, _k: Fits("the base model's own chat template is used")),
    "dataset_exact_deduplication": To("always", lambda _s, _k: Fits("copies of test data are removed, as always")),
    "evals_per_epoch": To("train.evaluations", _evals_per_epoch),
    "eval_steps": To("train.evaluations", _eval_steps),
    "eval_strategy": To("train.evaluations", _eval_strategy),
    "evaluation_strategy": To("train.evaluations", _eval_strategy),
    "early_stopping_patience": whole_to("train.patience"),
    "load_best_model_at_end": flag_fits("the best weights are kept, as always", "slmops always keeps the best weights"),
    "rl": To("train.method", _rl),
    "rl_beta": To("train.preference.beta", _beta),
    "dpo_beta": To("train.preference.beta", _beta),
    "orpo_alpha": To("train.preference.beta", _beta),
    "dpo_label_smoothing": To("train.preference.label_smoothing", _smoothing),
    "trl": To("train.preference.beta", _trl),
    "reward_model": To("none", _reward),
    "process_reward_model": To("none", _reward),
    "qat": To("train.quantization_aware", _qat),
    "quantization": To("convert.precision", _quantization),
    "kd_trainer": To("teacher", _kd),
}
TABLE: Table = {**IGNORED, **TRANSLATED}
