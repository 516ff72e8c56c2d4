"""Conversions that the trainers share: schedules, warm-up, tunings, optimisers. Pure functions of values.

slmops trains with AdamW (betas 0.9 and 0.98), a linear warm-up and a cosine that ends at `train.final_learning_rate`;
a batch is `train.batch_size` examples per optimiser step, in `train.accumulate` parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from slmops.core.spec import DataFormat
from slmops.flow.interop.rules import Drop, Fits, OddError, Outcome, Set, because, joined, share

BETAS = (0.9, 0.98)
LORA_TUNINGS = ("lora", "rslora", "dora", "qlora")
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
ADAMW_STATES = ("8bit", "4bit", "32bit", "paged", "anyprecision")
FLAT = ("constant", "constant_with_warmup")
PEFT_TARGETS = "all linear layers of the blocks; there those that peft lists for the model, often q_proj and v_proj"
EVERY_LAYER = ("all", "all-linear", "all_linear")


def preference_format() -> str:
    """`data.format` for prompt, chosen and rejected: `preference` where slmops has it."""
    return "preference" if "preference" in get_args(DataFormat) else "auto"


def total_steps(epochs: float, max_steps: int, batch: int, rows: int | None) -> int | None:
    """Optimiser steps of the trainer's run, or None where they cannot be told."""
    if max_steps > 0:
        return max_steps
    return None if rows is None or batch < 1 else max(1, math.ceil(epochs * math.ceil(rows / batch)))


def batch_note(per_device: int, parts: int, unit: str = "") -> str:
    """How the effective batch came about."""
    return f"{per_device} per device × {parts} accumulation steps{unit}; multiply by the devices it ran on"


def warmup(ratio: float, steps: float, total: int | None) -> Outcome:
    """`train.warmup` is a share of the steps; a number of steps becomes one where their total is known."""
    if 0 < steps < 1:
        return Set("train.warmup", steps)
    if not steps:
        return Set("train.warmup", ratio)
    if total is None:
        reason = f"train.warmup is a share of the steps, whose total is not in this file: set it to {steps:g} / steps"
        return Drop(reason, changes=True)
    return Set("train.warmup", share(steps, total), f"{steps:g} of {total} steps, as a share")


def schedule(name: str, options: Any, learning_rate: float) -> list[Outcome]:
    """A named schedule as the end of the cosine; 1 makes it constant."""
    path, name = "train.final_learning_rate", name.lower()
    settings: Mapping[str, Any] = options if isinstance(options, Mapping) else {}
    if name in FLAT:
        return [Set(path, 1.0, f"{name}: a cosine that ends where it starts")]
    if name == "cosine":
        return [Set(path, 0.0)]
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        rate, lowest = settings.get("min_lr_rate"), settings.get("min_lr")
        try:
            end = float(rate) if rate is not None else float(lowest or 0) / learning_rate
        except (TypeError, ValueError, ZeroDivisionError):
            end = math.nan
        if not 0 <= end <= 1:
            return [Drop("its lowest learning rate is not a share of learning_rate: the cosine ends at 0", True)]
        return [Set(path, round(end, 6), "its lowest learning rate, as a share of learning_rate")]
    if name == "linear":
        return [Set(path, 0.0, "linear: slmops falls along a cosine, to the same end")]
    return [Set(path, 0.0), Drop(f"{name}: slmops has a linear warm-up and a cosine", True)]


def optimizer(name: str) -> Outcome:
    """AdamW in its many packagings fits."""
    name = name.lower()
    if name in ADAMW:
        return Fits("AdamW, as always")
    if name.startswith(("adamw", "paged_adamw")) and any(word in name for word in ADAMW_STATES):
        return Drop(f"{name}: slmops keeps the states of AdamW in full precision")
    return Drop(f"{name}: slmops trains with AdamW", changes=True)


def beta(value: float, which: int) -> Outcome:
    """The decay rates of AdamW are fixed."""
    if value == BETAS[which]:
        return Fits("the same as in slmops")
    return Drop(f"AdamW has {BETAS[which]} here, always", changes=True)


def precision(bf16: bool | None, fp16: bool | None) -> Outcome:
    """bf16 and fp16 switches of a trainer, None where it is not said."""
    path = "train.precision"
    if bf16:
        return Set(path, "bf16")
    if fp16:
        return Set(path, "auto", "there is no fp16: bf16 where the machine has it, else fp32")
    return Set(path, "auto") if bf16 is None and fp16 is None else Set(path, "fp32")


def tuning(adapter: str, four_bits: bool, dora: bool, rslora: bool) -> str:
    """The one word of slmops for a set of switches; `adapter` is lora or full."""
    if adapter != "lora":
        return "full"
    return "qlora" if four_bits else "dora" if dora else "rslora" if rslora else "lora"


def dora_switch(on: bool, tuning: str) -> Outcome:
    """DoRA over a base in 4 bits has no word."""
    if not on:
        return Fits("off, as by default")
    if tuning == "qlora":
        return Drop("DoRA over a base in 4 bits is not there: written as qlora", changes=True)
    return Set("train.tuning", tuning)


def alpha(alpha: float, rank: int, tuning: str, rslora: bool) -> Set:
    """Where rank stabilisation cannot be said by the word, alpha × √rank has the same effect (arXiv 2312.03732)."""
    path = "train.lora.alpha"
    if rslora and tuning in ("dora", "qlora"):
        return Set(path, round(alpha * math.sqrt(rank), 6), f"{alpha:g} × √{rank}: stands for rank stabilisation")
    return Set(path, alpha)


def targets(names: tuple[str, ...], key: str) -> Outcome:
    """Names of linear layers; all of them is the default."""
    if len(names) == 1 and names[0].lower() in EVERY_LAYER:
        return Fits("all linear layers of the blocks, as by default")
    odd = next((name for name in names if not name.replace("_", "").replace(".", "").isalnum()), None)
    if odd is not None:
        return Drop(f"{key} is a pattern; train.lora.targets takes names such as q_proj", changes=True)
    return Set("train.lora.targets", list(names))


TABLES = {"embed_tokens", "lm_head"}


def whole(names: tuple[str, ...], key: str) -> Outcome:
    """Modules that are trained whole beside low-rank weights: the token embedding and the output matrix, which go together."""
    if not names:
        return Fits("none, as by default")
    if set(names) - TABLES:
        return Drop(f"{key}: only the token embedding and the output matrix can be trained whole", changes=True)
    return Set("train.lora.embeddings", True, "the token embedding and the output matrix")


def evaluations(every: float, total: int | None) -> Outcome:
    """Looks at validation: each `every` steps, or each share of the run."""
    path = "train.evaluations"
    if every <= 0:
        return Fits("not set")
    if every < 1:
        return Set(path, max(1, round(1 / every)), "how often in all, instead of how far apart")
    if total is None:
        return Drop("train.evaluations is how often in all; the total of the steps is not in this file")
    return Set(path, max(1, round(total / every)), f"every {every:g} of {total} steps: how often in all")


def clip(value: float) -> Outcome:
    """Zero means no clipping, which slmops says by a bound that is never reached."""
    return Set("train.clip", value) if value > 0 else Set("train.clip", 1e9, "never reached: no clipping")


def positive(value: float, key: str) -> float:
    """A number above zero.

    Raises:
        OddError: it is not.
    """
    if value <= 0:
        raise OddError(key, f"must be above 0 (given: {value:g})")
    return value


SPEED = because(
    "about speed or memory; slmops decides by the machine",
    "torch_compile torch_compile_backend torch_compile_mode tf32 dataloader_num_workers dataloader_pin_memory "
    "dataloader_prefetch_factor torch_empty_cache_steps gradient_checkpointing_kwargs remove_unused_columns",
)
CHECKPOINTS = because(
    "slmops keeps checkpoints by itself until a step is done",
    "save_steps save_strategy save_total_limit save_only_model save_safetensors",
)
DEVICES = joined(
    because("slmops trains on one device", "deepspeed fsdp fsdp_config accelerator_config", changes=True),
    because(
        "slmops trains on one device",
        "ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters local_rank",
    ),
)
