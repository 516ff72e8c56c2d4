"""LLaMA-Factory: the YAML or JSON that `llamafactory-cli train` takes. Keys of version 0.9.6.

Its arguments are those of transformers' Seq2SeqTrainingArguments and its own about model, data, fine-tuning and
generation. Dataset names are looked up in dataset_info.json of `dataset_dir`, as LLaMA-Factory does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmops.flow.interop import datasets as places
from slmops.flow.interop import hf_arguments, training
from slmops.flow.interop.dataset_info import named
from slmops.flow.interop.rules import (
    Drop,
    Fits,
    OddError,
    Outcome,
    Set,
    Source,
    Table,
    To,
    because,
    joined,
    whole_to,
    word_to,
    works_through,
)

NAME = "LLaMA-Factory"
NEEDS = {"student.base": "model_name_or_path", "data.path": "dataset"}
DEFAULTS = {
    **hf_arguments.DEFAULTS,
    "stage": "sft",
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_dropout": 0.0,
    "cutoff_len": 2048,
    "early_stopping_steps": 0,
}


def defaults(source: Source) -> dict[str, Any]:
    """What LLaMA-Factory takes for keys that are not there."""
    found = dict(DEFAULTS)
    if source.get("finetuning_type") not in (None, "lora"):
        del found["lora_rank"], found["lora_dropout"]
    return found


def _tuning(source: Source) -> str:
    adapter = "lora" if source.word("finetuning_type") in ("lora", "oft") else "full"
    return training.tuning(
        adapter, source.whole("quantization_bit") == 4, source.flag("use_dora"), source.flag("use_rslora")
    )


def _finetuning(source: Source, key: str) -> list[Outcome]:
    kind = source.choice(key, ("lora", "full", "freeze", "oft"))
    out: list[Outcome] = [Set("train.tuning", _tuning(source))]
    if kind in ("freeze", "oft"):
        nearest = "all weights move" if kind == "freeze" else "LoRA in its place"
        out.append(Drop(f"{kind} is not there: {nearest}", changes=True))
    return out


def _bits(source: Source, key: str) -> list[Outcome]:
    bits = source.whole(key)
    if bits == 4:
        return [Set("train.tuning", _tuning(source))]
    return [Drop(f"a base in {bits} bits is not there, only in 4 (qlora)", changes=True)]


def _dora(source: Source, key: str) -> Outcome:
    return training.dora_switch(source.flag(key), _tuning(source))


def _rslora(source: Source, key: str) -> Outcome:
    if not source.flag(key):
        return Fits("off, as by default")
    tuning = _tuning(source)
    return Set("train.tuning", tuning) if tuning == "rslora" else _alpha(source, key)


def _alpha(source: Source, _key: str) -> Outcome:
    if _tuning(source) == "full":
        return Drop("about LoRA, which finetuning_type is not")
    rank = source.whole("lora_rank")
    return training.alpha(source.number("lora_alpha", 2 * rank), rank, _tuning(source), source.flag("use_rslora"))


def _lora(path: str, *, whole: bool = False) -> To:
    def convert(source: Source, key: str) -> Outcome:
        if _tuning(source) == "full":
            return Drop("about LoRA, which finetuning_type is not")
        return Set(path, source.whole(key) if whole else source.number(key))

    return To(path, convert)


def _targets(source: Source, key: str) -> Outcome:
    if _tuning(source) == "full":
        return Drop("about LoRA, which finetuning_type is not")
    return training.targets(source.names(key), key)


def _whole(source: Source, key: str) -> Outcome:
    if _tuning(source) == "full":
        return Drop("about LoRA, which finetuning_type is not")
    return training.whole(source.names(key), key)


def _stage(source: Source, key: str) -> Outcome:
    stage = source.word(key).lower()
    if stage == "sft":
        return Set("train.method", "sequence")
    if stage == "dpo":
        return Set("train.method", "orpo" if source.word("pref_loss") == "orpo" else "dpo")
    what = "slmops learns from answers (sft) and from preferences (dpo)"
    raise OddError(key, f"{stage} has no counterpart", what)


def _preference(source: Source) -> bool:
    return source.word("stage", "sft").lower() == "dpo"


def _pref_loss(source: Source, key: str) -> Outcome:
    loss = source.word(key).lower()
    if not _preference(source):
        return Drop("about preferences, which stage is not")
    if loss in ("sigmoid", "orpo"):
        return Set("train.method", "orpo" if loss == "orpo" else "dpo")
    return Drop(f"{loss} is not there: written as dpo", changes=True)


def _about_preference(path: str) -> To:
    def convert(source: Source, key: str) -> Outcome:
        return Set(path, source.number(key)) if _preference(source) else Drop("about preferences, which stage is not")

    return To(path, convert)


def _base(source: Source, _key: str) -> list[Outcome]:
    return places.model(source.word("model_name_or_path"), source.word("model_revision"), source)


def _packing(source: Source, key: str) -> list[Outcome]:
    if not source.flag(key):
        return [Set("train.batching", "bucket")]
    note = "a packed row counted as one example of a batch: raise train.batch_size by the examples that fit in one"
    if key == "packing" and not source.flag("neat_packing"):
        note += "; examples in one row do not see each other"
    return [Set("train.batching", "pack", note)]


def _history(source: Source, key: str) -> Outcome:
    if source.flag(key):
        return Fits("only the last answer is learned, as always")
    return Drop("slmops learns the last answer of a conversation only")


def _checkpointing(source: Source, key: str) -> Outcome:
    return Set("train.checkpointing", not source.flag(key))


def _prompt_weight(source: Source, key: str) -> Outcome:
    return Set("train.prompt_weight", 1.0 if source.flag(key) else 0.0)


def _pure_bf16(source: Source, key: str) -> Outcome:
    if not source.flag(key):
        return Fits("off, as by default")
    return Set("train.precision", "bf16", "products in bf16; the weights stay in full precision")


def _shipped(source: Source, key: str) -> Outcome:
    bits = source.whole(key)
    if bits not in (4, 8):
        return Drop(f"a result in {bits} bits is not there", changes=True)
    return Set("convert.precision", f"int{bits}", "ONNX Runtime GenAI rounds, without calibration data")


def _validation_share(source: Source, key: str) -> Outcome:
    size = source.number(key)
    if size < 1:
        return Set("data.splits.validation", size) if size else Fits("0: none is taken; slmops takes some always")
    rows = places.count(named(source, "dataset"), source.whole("max_samples"))
    if rows is None:
        return Drop(f"data.splits.validation is a share: set it to {size:g} / examples")
    return Set("data.splits.validation", round(min(0.9, size / rows), 4), f"{size:g} of {rows} examples, as a share")


def _dataset_key(source: Source, key: str) -> list[Outcome]:
    train = named(source, "dataset")
    if not train:
        raise OddError(key, "names no dataset")
    return places.combine(train, named(source, "eval_dataset"))


def _eval_dataset(source: Source, key: str) -> list[Outcome]:
    train = named(source, "dataset")
    return places.combine(train, named(source, key), at_validation=True) if train else [Drop("there is no dataset")]


def _cutoff(source: Source, key: str) -> Outcome:
    return Set("train.max_length", source.whole(key), "longer examples are refused, not cut")


def _most(source: Source, key: str) -> Outcome:
    return Set("data.max_examples", source.whole(key), "of all data, chosen by content; there: of each dataset")


def assumed(_source: Source) -> dict[str, str]:
    """What slmops decides as the file does not, by place."""
    return {}


def rows(source: Source) -> int | None:
    """Training examples, less those that LLaMA-Factory holds back."""
    found = places.count(named(source, "dataset"), source.whole("max_samples"))
    size = source.number("val_size")
    return None if found is None else int(found - (size if size >= 1 else found * size)) or None


def task(settings: Mapping[str, Any]) -> str:
    """The likeliest `task.type`."""
    return "chat" if settings.get("data.format") in ("sharegpt", "messages") else "generation"


SAMPLED = "answers are judged with greedy decoding"
GPU = "about speed or memory; slmops decides by the machine"
TRANSLATED: dict[str, To] = {
    **hf_arguments.TRANSLATED,
    "model_name_or_path": To("student.base", _base),
    "model_revision": works_through("student.base", "model_name_or_path"),
    "stage": To("train.method", _stage),
    "finetuning_type": To("train.tuning", _finetuning),
    "quantization_bit": To("train.tuning", _bits),
    "use_dora": To("train.tuning", _dora),
    "use_rslora": To("train.tuning", _rslora),
    "lora_rank": _lora("train.lora.rank", whole=True),
    "lora_alpha": To("train.lora.alpha", _alpha),
    "lora_dropout": _lora("train.lora.dropout"),
    "lora_target": To("train.lora.targets", _targets),
    "additional_target": To("train.lora.embeddings", _whole),
    "pref_loss": To("train.method", _pref_loss),
    "pref_beta": _about_preference("train.preference.beta"),
    "dpo_label_smoothing": _about_preference("train.preference.label_smoothing"),
    "dataset": To("data.path", _dataset_key),
    "eval_dataset": To("data.splits.validation", _eval_dataset),
    "dataset_dir": works_through("data.path", "dataset"),
    "val_size": To("data.splits.validation", _validation_share),
    "max_samples": To("data.max_examples", _most),
    "cutoff_len": To("train.max_length", _cutoff),
    "train_on_prompt": To("train.prompt_weight", _prompt_weight),
    "mask_history": To("always", _history),
    "packing": To("train.batching", _packing),
    "neat_packing": To("train.batching", _packing),
    "default_system": word_to("task.instruction"),
    "template": To("always", lambda _source, _key: Fits("the base model's own chat template is used")),
    "disable_gradient_checkpointing": To("train.checkpointing", _checkpointing),
    "early_stopping_steps": whole_to("train.patience"),
    "pure_bf16": To("train.precision", _pure_bf16),
    "max_new_tokens": whole_to("evaluate.max_new_tokens"),
    "export_quantization_bit": To("convert.precision", _shipped),
}
IGNORED = joined(
    hf_arguments.IGNORED,
    because(
        "training starts from the base model and new low-rank weights only",
        "adapter_name_or_path adapter_folder create_new_adapter train_from_scratch",
        changes=True,
    ),
    because(
        "the tokenizer of the base model is taken as it is",
        "resize_vocab split_special_tokens add_tokens add_special_tokens new_special_tokens_config init_special_tokens "
        "use_fast_tokenizer",
        changes=True,
        off=(True, "noise_init"),
    ),
    because(
        "the base model's architecture is taken as it is",
        "rope_scaling shift_attn mixture_of_depths moe_aux_loss_coef use_llama_pro upcast_layernorm",
        changes=True,
    ),
    because("slmops trains the weights of `tuning` only", "freeze_extra_modules", changes=True),
    because("freezing layers is not there", "freeze_trainable_layers freeze_trainable_modules", changes=True),
    because("low-rank weights start as in the paper", "pissa_init", changes=True),
    because("low-rank weights start as in the paper", "pissa_iter pissa_convert"),
    because("all trained weights have one learning rate", "loraplus_lr_ratio", changes=True),
    because("all trained weights have one learning rate", "loraplus_lr_embedding"),
    because("orthogonal fine-tuning is not there", "module_dropout oft_rank oft_block_size oft_target"),
    because(
        "the base in 4 bits is made by slmops",
        "quantization_method quantization_type",
        changes=True,
        off=("bnb", "nf4"),
    ),
    because("the base in 4 bits is made by slmops", "double_quantization quantization_device_map"),
    because("the reference is the base model", "ref_model ref_model_adapters", changes=True),
    because("the reference is the base model", "ref_model_quantization_bit"),
    because("dpo and orpo have no further terms", "pref_ftx pref_bco_weight ld_alpha", changes=True),
    because(
        "kto, simpo and ppo are not there",
        "kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target "
        "ppo_whiten_rewards reward_model reward_model_adapters reward_model_quantization_bit reward_model_type",
    ),
    because(
        "slmops trains with AdamW",
        "use_galore use_apollo use_badam use_adam_mini use_muon",
        changes=True,
    ),
    because(
        "slmops trains with AdamW",
        "galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise apollo_target "
        "apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise "
        "apollo_scale_front badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio "
        "badam_mask_mode badam_verbose",
    ),
    because("the loss is the plain cross entropy", "use_dft_loss use_asft_loss use_eaft_loss", changes=True),
    because("the loss is the plain cross entropy", "asft_alpha eaft_alpha"),
    because("slmops shuffles always", "disable_shuffling", changes=True),
    because("datasets are joined one after the other", "mix_strategy interleave_probs", changes=True, off=("concat",)),
    because("data are read whole, by slmops itself", "streaming buffer_size overwrite_cache preprocessing_batch_size"),
    because("data are read whole, by slmops itself", "preprocessing_num_workers data_shared_file_system"),
    because("data are read anew, not from a cache of tokens", "tokenized_path", changes=True),
    because("padding never counts in the loss", "ignore_pad_token_for_loss"),
    because("tool calls are read as JSON answers", "tool_format", changes=True),
    because(
        "the base model's own chat template decides", "enable_thinking preserve_thinking", changes=True, off=(True,)
    ),
    because("a report judges all test data together", "eval_on_each_dataset compute_accuracy"),
    because(
        SAMPLED,
        "do_sample temperature top_p top_k num_beams max_length repetition_penalty length_penalty skip_special_tokens "
        "eval_num_beams use_kv_cache infer_backend infer_dtype",
    ),
    because(
        "text only",
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels video_fps "
        "video_maxlen use_audio_in_video audio_sampling_rate media_dir freeze_vision_tower freeze_multi_modal_projector "
        "freeze_language_model train_mm_proj_only",
    ),
    because(
        GPU,
        "low_cpu_mem_usage flash_attn use_unsloth use_unsloth_gc enable_liger_kernel use_reentrant_gc upcast_lmhead_output "
        "use_v1_kernels offload_folder fp8 fp8_backend fp8_enable_fsdp_float8_all_gather compute_dtype device_map "
        "model_max_length block_diag_attn",
    ),
    because("results go to outputs/NAME, logs to the run's record", "plot_loss print_param_status"),
    because("slmops shows progress itself and records the losses", "include_effective_tokens_per_second"),
    because("models come from folders and the Hugging Face hub, keys from the environment", "cache_dir hf_hub_token"),
    because(
        "models come from folders and the Hugging Face hub, keys from the environment", "ms_hub_token om_hub_token"
    ),
    because("slmops runs no code of a model or dataset", "trust_remote_code"),
    because(
        "slmops converts to ONNX Runtime GenAI; see convert",
        "export_dir export_size export_device export_quantization_dataset export_quantization_nsamples "
        "export_quantization_maxlen export_legacy_format export_hub_model_id",
    ),
    because(
        "about a server, which is not part of training",
        "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction "
        "sglang_tp_size sglang_config sglang_lora_backend",
    ),
    because(
        "slmops trains with its own loop, on one device",
        "use_kt kt_config kt_cpu_activation kt_weight_path kt_non_expert_weight_path kt_expert_checkpoint_path kt_use_lora_experts "
        "kt_lora_expert_num kt_lora_expert_intermediate_size use_mca use_megatron_bridge megatron_bridge_args "
        "use_hyper_parallel hyper_parallel_args hyper_parallel_cp_size ray_num_workers ray_init_kwargs ray_run_name "
        "ray_storage_path ray_storage_filesystem resources_per_worker placement_strategy master_addr master_port "
        "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size context_parallel_size "
        "virtual_pipeline_model_parallel_size sequence_parallel recompute_granularity recompute_method recompute_num_layers "
        "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split bias_activation_fusion apply_rope_fusion "
        "masked_softmax_fusion cross_entropy_loss_fusion moe_grouped_gemm moe_token_dispatcher_type calculate_per_token_loss "
        "use_distributed_optimizer overlap_param_gather overlap_grad_reduce use_packed_sequences mixed_precision "
        "megatron_pretrained_checkpoint export_hf_on_finish extra_config",
    ),
    because(
        "slmops profiles nothing",
        "enable_torch_profiler profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps "
        "profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules",
    ),
    because(
        "slmops sends nothing to a tracking service from this file",
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir "
        "swanlab_lark_webhook_url swanlab_lark_secret",
    ),
)
TABLE: Table = {**IGNORED, **TRANSLATED}
