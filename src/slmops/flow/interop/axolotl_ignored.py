"""Axolotl's keys without a counterpart, by reason. Keys of version 0.18 and of the plugins that come with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slmops.flow.interop.rules import Ignored, because, joined
from slmops.flow.interop.training import CHECKPOINTS, DEVICES, SPEED


def _padding(value: Any) -> bool:
    """Padding never counts in the loss."""
    return isinstance(value, Mapping) and set(value) <= {"pad_token"}


IGNORED = joined(
    SPEED,
    CHECKPOINTS,
    DEVICES,
    because(
        "about speed or memory; slmops decides by the machine",
        "strict auto_find_batch_size eval_batch_size activation_offloading layer_offloading selective_checkpointing "
        "torch_compile_options fp8 fp8_enable_fsdp_float8_all_gather gc_steps gc_collect_steps low_cpu_mem_usage max_memory "
        "gpu_memory_limit device device_map lora_on_cpu qlora_sharded_model_loading lora_mlp_kernel lora_qkv_kernel "
        "lora_o_kernel lora_embedding_kernel chunked_cross_entropy chunked_cross_entropy_num_chunks tiled_mlp "
        "tiled_mlp_num_shards tiled_mlp_use_original_mlp embeddings_skip_upcast peft_autocast_adapter_dtype bnb_config_kwargs "
        "attn_implementation flash_attention sdp_attention xformers_attention flex_attention flex_attn_compile_kwargs "
        "sage_attention eager_attention flash_optimum flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp "
        "flash_attn_fuse_qkv unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm "
        "unsloth_rope gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 sdpa_varlen fused_attn_kernel "
        "experts_implementation quantize_moe_experts llama4_linearized_experts use_kernels experimental_skip_move_to_device "
        "dpo_use_liger_kernel dpo_padding_free dpo_use_logits_to_keep precompute_ref_log_probs pad_to_sequence_len "
        "pad_to_multiple_of batch_flattening multipack_real_batches sample_packing_group_size sample_packing_bin_size "
        "sample_packing_sequentially sample_packing_mp_start_method sample_packing_eff_est total_num_tokens "
        "total_supervised_tokens eval_sample_packing eval_sequence_len model_quantization_config "
        "model_quantization_config_kwargs cut_cross_entropy liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm "
        "liger_swiglu liger_glu_activation liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling "
        "expert_backend nonexpert_quantization moe_grouped_backend moe_dequant_chunk_size moe_bnb_fast use_scattermoe "
        "use_sonicmoe use_dsv4_kernels use_glm_dsa_kernels dsv4_fp8_nonexpert_mode dsv4_fp8_lora_kernel "
        "dsv4_shared_mlp_lora_kernel dsv4_bf16_all dsv4_fp4_grouped_mode gemma4_fp8_nonexpert gemma4_nf4_nonexpert "
        "nvfp4_merge_aware nvfp4_merge_aware_start_step",
    ),
    because(
        "slmops keeps checkpoints by itself until a step is done", "saves_per_epoch save_first_step dynamic_checkpoint"
    ),
    because(
        "a run resumes by itself; it cannot start from another trainer's",
        "resume_from_checkpoint lora_model_dir",
        changes=True,
    ),
    because("a run resumes by itself", "auto_resume_from_checkpoints"),
    because(
        "slmops trains on one device",
        "world_size ddp fsdp_version fsdp_final_state_dict_type deepcompile dp_shard_size dp_replicate_size "
        "heads_k_stride ring_attn_func fp32_norms fp32_norm_classes expert_parallel_backend expert_parallel_num_nvl_bytes "
        "expert_parallel_num_rdma_bytes expert_parallel_token_capacity expert_parallel_fallback_on_unsupported use_ray "
        "ray_run_name ray_num_workers resources_per_worker hatchery",
    ),
    because(
        "slmops trains on one device",
        "sequence_parallel_degree context_parallel_size tensor_parallel_size expert_parallel_size",
        changes=True,
        off=(1,),
    ),
    because(
        "results go to outputs/NAME, logs to the run's record",
        "output_dir dataset_prepared_path logging_steps use_tensorboard profiler_steps profiler_steps_start project_name "
        "include_tokens_per_second include_tkps axolotl_config_path debug eval_table_size generate_samples "
        "num_generation_samples generation_max_new_tokens generation_temperature generation_top_p generation_top_k "
        "generation_prompt_ratio generation_do_sample",
    ),
    because(
        "slmops sends nothing to a tracking service or hub from this file",
        "use_wandb wandb_name wandb_run_id wandb_mode wandb_project wandb_entity wandb_watch wandb_log_model use_mlflow "
        "mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts use_comet comet_api_key "
        "comet_workspace comet_project_name comet_experiment_key comet_mode comet_online comet_experiment_config use_trackio "
        "trackio_project_name trackio_run_name trackio_space_id use_otel_metrics otel_metrics_host otel_metrics_port "
        "use_swanlab swanlab_project swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace "
        "swanlab_api_key swanlab_log_model swanlab_web_host swanlab_api_host swanlab_lark_webhook_url swanlab_lark_secret "
        "swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer hub_model_id hub_strategy "
        "hub_revision push_dataset_to_hub hf_use_auth_token secrets",
    ),
    because(
        "slmops runs no code of a model or dataset; plugins of Axolotl are not loaded", "trust_remote_code plugins"
    ),
    because("slmops has its own training loop", "trainer_cls", changes=True),
    because(
        "the kind of model and tokenizer stands in their own files",
        "model_type type_of_model tokenizer_type processor_type processor_kwargs tokenizer_use_fast tokenizer_legacy "
        "tokenizer_use_mistral_common tokenizer_save_jinja_files is_falcon_derived_model is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model cls_model_config",
    ),
    because(
        "the base model's architecture is taken as it is",
        "base_model_config model_config overrides_of_model_config overrides_of_model_kwargs rope_scaling scaling_softmax "
        "scaling_softmax_factor scaling_softmax_bias s2_attention use_onebitllms reinit_weights dense_mixer",
        changes=True,
    ),
    because(
        "the tokenizer of the base model is taken as it is",
        "tokenizer_config tokens added_tokens_overrides resize_token_embeddings_to_32x "
        "mean_resizing_embeddings shrink_embeddings fix_untrained_tokens",
        changes=True,
    ),
    {"special_tokens": Ignored("the tokenizer of the base model is taken as it is", True, harmless=_padding)},
    because(
        "the base model's own chat template is used",
        "chat_template_jinja chat_template_kwargs eot_tokens",
        changes=True,
    ),
    because("only a base in 4 bits is there (qlora)", "load_in_8bit gptq", changes=True),
    because("only a base in 4 bits is there (qlora)", "gptq_groupsize gptq_model_v1"),
    because(
        "slmops trains low-rank weights on linear layers, of one rank, that start as in the paper",
        "lora_target_parameters lora_rank_pattern lora_alpha_pattern peft_layers_to_transform "
        "peft_layers_pattern peft peft_layer_replication peft_trainable_token_indices lora_fan_in_fan_out relora mora",
        changes=True,
    ),
    because(
        "slmops trains low-rank weights on linear layers, of one rank, that start as in the paper",
        "peft_init_lora_weights",
        changes=True,
        off=(True,),
    ),
    because(
        "slmops trains low-rank weights on linear layers, of one rank, that start as in the paper",
        "peft_ensure_weight_tying relora_steps relora_warmup_steps relora_anneal_steps relora_prune_ratio "
        "relora_prune_method relora_cpu_offload merge_lora merge_method loraplus_lr_embedding",
    ),
    because(
        "all trained weights have one learning rate, which rises, then falls along a cosine",
        "loraplus_lr_ratio embedding_lr embedding_lr_scale lr_groups cosine_constant_lr_ratio lr_quadratic_warmup lr_div_factor "
        "jagged_restart_steps eta_min",
        changes=True,
    ),
    because(
        "all trained weights have one learning rate, which rises, then falls along a cosine",
        "jagged_restart_warmup_steps jagged_restart_anneal_steps",
    ),
    because(
        "slmops trains all weights of `tuning`; freezing others is not there",
        "unfrozen_parameters lisa_n_layers spectrum_top_fraction",
        changes=True,
    ),
    because(
        "slmops trains all weights of `tuning`; freezing others is not there",
        "lisa_step_interval lisa_layers_attribute spectrum_model_name freeze_mm_modules",
    ),
    because(
        "slmops trains with AdamW, without further options",
        "optim_args optim_target_modules grokfast_alpha grokfast_lamb",
        changes=True,
    ),
    because("AdamW has 1e-8 here, always", "adam_epsilon", changes=True, off=(1e-8,)),
    because(
        "slmops trains with AdamW, without further options",
        "torchdistx_path adam_epsilon2 adam_beta3 dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank "
        "qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant qgalore_proj_bits "
        "qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj qgalore_queue_size",
    ),
    because("noise on embeddings is not there", "neftune_noise_alpha noisy_embedding_alpha", changes=True),
    because("the loss is the plain cross entropy", "use_eaft", changes=True),
    because("the loss is the plain cross entropy", "eaft_alpha eaft_k"),
    because("a diverging training is stopped by itself", "loss_watchdog_threshold loss_watchdog_patience"),
    because(
        "slmops joins all data and shuffles them by the seed",
        "curriculum_sampling shuffle_before_merging_datasets dataset_shard_num dataset_shard_idx",
        changes=True,
    ),
    because("slmops joins all data and shuffles them by the seed", "shuffle_merged_datasets", changes=True, off=(True,)),
    because("the last, smaller batch is always trained on", "dataloader_drop_last", changes=True),
    because(
        "data are read whole, by slmops itself",
        "skip_prepare_dataset num_dataset_shards_to_save dataset_processes dataset_num_proc dataset_keep_in_memory "
        "streaming streaming_multipack_buffer_size is_preprocess preprocess_iterable",
    ),
    because("short examples are kept, and long ones refused", "min_sample_len max_prompt_len", changes=True),
    because(
        "raw text is not read, only prompts with answers",
        "pretrain_multipack_buffer_size pretrain_multipack_attn pretraining_sample_concatenation max_packed_sequence_len",
    ),
    because("positions are counted one by one", "use_pose", changes=True),
    because(
        "positions are counted one by one", "pose_split_on_token_ids pose_max_context_len pose_num_chunks"
    ),
    because(
        "dpo and orpo have no further terms",
        "dpo_use_weighting dpo_loss_type dpo_loss_weights dpo_norm_loss rpo_alpha",
        changes=True,
        off=(["sigmoid"],),
    ),
    because(
        "kto, simpo, cpo and rewards are not there",
        "simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight center_rewards_coefficient num_labels",
    ),
    because(
        "online reinforcement is not there; see train.method: on_policy",
        "vllm ebft nemo_gym_enabled nemo_gym_dir nemo_gym_auto_clone nemo_gym_config_paths nemo_gym_head_port "
        "nemo_gym_server_timeout nemo_gym_verify_timeout nemo_gym_run_timeout nemo_gym_datasets nemo_gym_auto_start "
        "nemo_gym_model_name nemo_gym_multi_turn nemo_gym_max_turns dpo_generate_during_eval",
    ),
    because(
        "distillation is `teacher:` and train.method here",
        "kd_ce_alpha kd_alpha kd_temperature kd_beta kd_normalize_topk kd_online_server_base_url kd_online_topk "
        "kd_online_server kd_online_timeout kd_temperature_min",
    ),
    because("diffusion models are not there", "diffusion", changes=True),
    because("pruning goes by compress.prune, not by recipes", "llmcompressor", changes=True),
    because("the validation loss decides which weights are kept", "metric_for_best_model", changes=True, off=("loss", "eval_loss")),
    because("the lower validation loss is the better one", "greater_is_better"),
    because(
        "every run judges the result on test data; see evaluate",
        "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval bench_dataset bench_split bench_source_max_len "
        "eval_max_new_tokens lm_eval_tasks lm_eval_batch_size lm_eval_post_train lm_eval_model",
    ),
    because(
        "about a chat page, which is not part of training",
        "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature",
    ),
    because("text only", "image_size image_resize_algorithm role_boundaries"),
)  # fmt: skip
