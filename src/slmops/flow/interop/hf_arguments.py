"""The keys of transformers' TrainingArguments, which LLaMA-Factory and Olive take as their own. Taken from transformers 5.

`TABLE` also has the older names that configuration files still use. The conversions are functions of a `Source` whose
keys are the names of the arguments.
"""

from __future__ import annotations

from slmops.flow.interop.rules import (
    Drop,
    Fits,
    Outcome,
    Set,
    Source,
    Table,
    To,
    because,
    flag_fits,
    joined,
    number_to,
    whole_to,
    works_through,
)
from slmops.flow.interop.training import (
    CHECKPOINTS,
    DEVICES,
    FLAT,
    SPEED,
    batch_note,
    beta,
    clip,
    evaluations,
    optimizer,
    precision,
    schedule,
    total_steps,
    warmup,
)

DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}
"""What a file leaves out and slmops would take otherwise."""


def batch(source: Source) -> int:
    """Examples per optimiser step, on one device."""
    return source.whole("per_device_train_batch_size") * source.whole("gradient_accumulation_steps")


def steps(source: Source) -> int | None:
    """Optimiser steps, where the file and its data tell; not with packing, which changes what a batch is."""
    packed = source.flag("packing") or source.flag("neat_packing")
    rows = None if packed else source.rows
    return total_steps(source.number("num_train_epochs"), source.whole("max_steps", -1), batch(source), rows)


def _batch(source: Source, _key: str) -> Outcome:
    per_device, parts = source.whole("per_device_train_batch_size"), source.whole("gradient_accumulation_steps")
    return Set("train.batch_size", per_device * parts, batch_note(per_device, parts))


def _accumulate(source: Source, key: str) -> list[Outcome]:
    parts = source.whole(key)
    return [Set("train.accumulate", parts), _batch(source, key)]


def _max_steps(source: Source, key: str) -> Outcome:
    most = source.whole(key)
    return Set("train.max_steps", most) if most > 0 else Fits("below 1: the epochs decide")


def _schedule(source: Source, key: str) -> list[Outcome]:
    return schedule(source.word(key), source.get("lr_scheduler_kwargs"), source.number("learning_rate"))


def _warmup(source: Source, key: str) -> Outcome:
    if source.word("lr_scheduler_type").lower() == FLAT[0]:
        note = f"lr_scheduler_type {FLAT[0]} has no warm-up" if key in source.values else ""
        return Set("train.warmup", 0.0, note)
    number = source.number("warmup_steps")
    if number and key == "warmup_ratio":
        return Fits("warmup_steps goes before it")
    if key == "warmup_steps" and not number:
        return Fits("0: the ratio decides")
    return warmup(source.number("warmup_ratio"), number, steps(source))


def _precision(source: Source, _key: str) -> Outcome:
    given = [source.flag(key) if key in source.values else None for key in ("bf16", "fp16")]
    if source.flag("pure_bf16"):
        given[0] = True
    return precision(*given)


def _evaluations(source: Source, key: str) -> Outcome:
    return evaluations(source.number(key), steps(source))


def _eval_strategy(source: Source, key: str) -> Outcome:
    found = source.word(key).lower()
    if found == "epoch":
        note = "once an epoch: how often in all"
        return Set("train.evaluations", max(1, round(source.number("num_train_epochs"))), note)
    if found in ("no", "false"):
        return Drop("slmops always looks at validation, train.evaluations times")
    return Fits("by steps, with eval_steps")


def _sampling(source: Source, key: str) -> Outcome:
    if source.word(key) in ("group_by_length", "true"):
        note = "batches of similar length, sorted within 8 batches"
        return Fits(f"{note}, unless train.batching is pack")
    if source.word(key) == "sequential":
        return Drop("slmops always shuffles, by the seed", changes=True)
    return Fits("the order is a function of the seed")


def _metric(source: Source, key: str) -> Outcome:
    if source.word(key) in ("loss", "eval_loss"):
        return Fits("the validation loss, as always")
    return Drop("the validation loss decides which weights are kept", changes=True)


def _epsilon(source: Source, key: str) -> Outcome:
    if source.number(key) == 1e-8:
        return Fits("the same as in slmops")
    return Drop("AdamW has 1e-8 here, always", changes=True)


_EVERY_RUN = "every run judges the result on test data"
TRANSLATED: dict[str, To] = {
    "per_device_train_batch_size": To("train.batch_size", _batch),
    "gradient_accumulation_steps": To("train.accumulate", _accumulate),
    "num_train_epochs": number_to("train.epochs"),
    "max_steps": To("train.max_steps", _max_steps),
    "learning_rate": number_to("train.learning_rate"),
    "lr_scheduler_type": To("train.final_learning_rate", _schedule),
    "lr_scheduler_kwargs": works_through("train.final_learning_rate", "lr_scheduler_type"),
    "warmup_ratio": To("train.warmup", _warmup),
    "warmup_steps": To("train.warmup", _warmup),
    "weight_decay": number_to("train.weight_decay"),
    "max_grad_norm": To("train.clip", lambda source, key: clip(source.number(key))),
    "label_smoothing_factor": number_to("train.label_smoothing"),
    "seed": whole_to("seed"),
    "bf16": To("train.precision", _precision),
    "fp16": To("train.precision", _precision),
    "gradient_checkpointing": To(
        "train.checkpointing", lambda source, key: Set("train.checkpointing", source.flag(key))
    ),
    "activation_checkpointing": To(
        "train.checkpointing", lambda source, key: Set("train.checkpointing", source.flag(key))
    ),
    "eval_steps": To("train.evaluations", _evaluations),
    "eval_strategy": To("train.evaluations", _eval_strategy),
    "evaluation_strategy": To("train.evaluations", _eval_strategy),
    "optim": To("always AdamW", lambda source, key: optimizer(source.word(key))),
    "adam_beta1": To("always 0.9", lambda source, key: beta(source.number(key), 0)),
    "adam_beta2": To("always 0.98", lambda source, key: beta(source.number(key), 1)),
    "adam_epsilon": To("always 1e-8", _epsilon),
    "train_sampling_strategy": To("train.batching", _sampling),
    "group_by_length": To("train.batching", _sampling),
    "metric_for_best_model": To("always the loss", _metric),
    "load_best_model_at_end": flag_fits("the best weights are kept, as always", "slmops always keeps the best weights"),
    "full_determinism": flag_fits("slmops is always deterministic", "slmops is always deterministic"),
    "do_train": flag_fits("slmops run trains", "slmops run trains whatever this says"),
    "do_eval": flag_fits(_EVERY_RUN, _EVERY_RUN),
    "do_predict": flag_fits(_EVERY_RUN, _EVERY_RUN),
}
IGNORED = joined(
    SPEED,
    CHECKPOINTS,
    DEVICES,
    because(
        "about speed or memory; slmops decides by the machine",
        "auto_find_batch_size bf16_full_eval fp16_full_eval use_liger_kernel liger_kernel_config use_cache "
        "activation_checkpointing_kwargs dataloader_persistent_workers dataloader_multiprocessing_context "
        "dataloader_in_order per_device_eval_batch_size eval_accumulation_steps eval_do_concat_batches "
        "eval_use_gather_object batch_eval_metrics prediction_loss_only length_column_name label_names include_for_metrics "
        "use_cpu no_cuda use_mps_device use_ipex jit_mode_eval fp16_backend fp16_opt_level half_precision_backend "
        "torchdynamo past_index skip_memory_metrics include_inputs_for_metrics debug sortish_sampler",
    ),
    because(
        "slmops keeps checkpoints by itself until a step is done",
        "save_on_each_node enable_jit_checkpoint restore_callback_states_from_checkpoint ignore_data_skip "
        "overwrite_output_dir",
    ),
    because(
        "slmops trains on one device",
        "ddp_backend ddp_static_graph fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap tpu_num_cores tpu_metrics_debug "
        "ray_scope split_batches dispatch_batches average_tokens_across_devices mp_parameters",
    ),
    because("slmops trains on one device", "parallelism_config", changes=True),
    because("results go to outputs/NAME, logs to the run's record", "output_dir logging_dir run_name project"),
    because(
        "slmops shows progress itself and records the losses",
        "logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level log_level_replica "
        "log_on_each_node disable_tqdm report_to include_num_input_tokens_seen include_tokens_per_second trackio_space_id "
        "trackio_bucket_id trackio_static_space_id",
    ),
    because(
        "slmops sends nothing to a hub",
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
        "push_to_hub_model_id push_to_hub_organization push_to_hub_token",
    ),
    because("looks at validation are spread evenly over the run", "eval_delay eval_on_start"),
    because("the lower validation loss is the better one", "greater_is_better"),
    because("answers are judged by evaluate, with greedy decoding", "predict_with_generate generation_num_beams"),
    because("answers are judged by evaluate, with greedy decoding", "generation_config generation_max_length"),
    because("there is one seed", "data_seed"),
    because("a run resumes by itself; it cannot start from another trainer's", "resume_from_checkpoint", changes=True),
    because(
        "slmops trains with AdamW, without further options", "optim_args optim_target_modules adafactor", changes=True
    ),
    because("noise on embeddings is not there", "neftune_noise_alpha", changes=True),
    because("the last, smaller batch is always trained on", "dataloader_drop_last", changes=True),
)
TABLE: Table = {**IGNORED, **TRANSLATED}
