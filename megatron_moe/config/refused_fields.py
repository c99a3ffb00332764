"""Fields of Megatron-Core's `TransformerConfig` that `model.megatron_core` may not hold, with the reason.

Names are regular expressions that match a whole field name, because many fields come in families.
"""

from __future__ import annotations

import re

OTHER_NAMES = {
    "activation_func": "model.activation",
    "gated_linear_unit": "model.activation",
    "activation_func_clamp_value": "model.activation",
    "glu_linear_offset": "model.activation",
    "qk_layernorm": "model.qk_norm",
    "add_qkv_bias": "model.qkv_bias",
    "add_bias_linear": "model.mlp_bias",
    "window_size": "model.sliding_window",
    "softmax_type": "model.attention_sinks",
    "transformer_impl": "model.spec",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "params_dtype": "training.precision",
    "calculate_per_token_loss": "training.calculate_per_token_loss",
    "recompute_granularity": "recompute.granularity",
    "recompute_method": "recompute.method",
    "recompute_num_layers": "recompute.layers_per_stage",
    "recompute_modules": "recompute.modules",
    "moe_layer_recompute": "recompute.modules",
    "pipeline_model_parallel_layout": "pipeline.layers_per_stage",
    "num_layers_in_first_pipeline_stage": "pipeline.layers_per_stage",
    "num_layers_in_last_pipeline_stage": "pipeline.layers_per_stage",
    "account_for_embedding_in_pipeline_split": "pipeline.layers_per_stage",
    "account_for_loss_in_pipeline_split": "pipeline.layers_per_stage",
    "cpu_offloading": "recompute.cpu_offloading_num_layers",
    "multi_latent_attention": "model.multi_latent_attention",
    "moe_enable_deepep": "moe.moe_token_dispatcher_type",
    "moe_router_force_load_balancing": "moe.moe_router_gate",
    "moe_router_topk_limited_devices": "moe.moe_router_group_topk",
}
"""Fields that a key of ours with another name decides."""

NEEDS_TRANSFORMER_ENGINE = (
    r"fp8_\w+|fp4|fp4_\w+|activation_func_fp8_input_store|tp_only_amax_red|first_last_layers_bf16",
    r"num_layers_at_(start|end)_in_bf16|disable_parameter_transpose_cache",
    r"tp_comm_\w+|delay_wgrad_compute|overlap_dispatch_backward_with_experts_wgrad",
    r"fused_single_qkv_rope|fused_residual_rmsnorm|cross_entropy_fusion_impl",
    r"use_te_\w+|use_transformer_engine_op_fuser|use_grouped_gemm_for_\w+",
    r"moe_single_grouped_\w+|moe_(mlp|shared_expert)_glu_interleave_size",
    r"attention_output_gate|cp_comm_type",
)
"""Fields that only the blocks of Transformer Engine compute."""

_APEX = "it needs NVIDIA's apex kernels"
_ATTENTION = "the attention here does not compute it"
_EXPERTS = "the router and experts here do not compute it"
_IGNORED = "Megatron-Core itself does not look at it in a GPT model"
_LIBRARY = "it needs a library that is not supported here"
_MODEL = "this trainer does not build such a model"
_KERNELS = "the flex dispatcher runs with its library's own settings here"
_OFFLOADING = "of offloading only recompute.cpu_offloading_num_layers is built into this trainer"
_RANKS = "the section parallel says how ranks are laid out"
_RECOMPUTE = "the section recompute says what is recomputed"
_SCHEDULE = "the schedule here does not use it"
_SERVING = "it is for serving or CUDA graphs, which this trainer does not do"
_TRAINER = "the trainer sets it itself"

NOT_SETTABLE: dict[str, str] = {
    r"\w+_func|timers|(|output_layer_|embedding_)init_method|perform_initialization": _TRAINER,
    r"use_cpu_initialization|init_model_with_meta_device|config_logger_dir|test_mode": _TRAINER,
    r"pipeline_dtype|enable_autocast|autocast_dtype": _TRAINER,
    r"variable_seq_lengths|deallocate_pipeline_outputs|barrier_with_L1_time": _TRAINER,
    r"overlap_p2p_comm|batch_p2p_comm|batch_p2p_sync|overlap_p2p_comm_warmup_flush": _TRAINER,
    r"bias_activation_fusion|bias_dropout_fusion": _TRAINER,
    r"moe_grouped_gemm|moe_per_layer_logging": _TRAINER,
    r"defer_embedding_wgrad_compute|wgrad_deferral_limit": _APEX,
    r"persist_layer_norm|memory_efficient_layer_norm": _APEX,
    r"layernorm_zero_centered_gamma": "the weights of the norms here are centred at one",
    r"apply_query_key_layer_scaling|softmax_scale|attention_softmax_in_fp32": _ATTENTION,
    r"masked_softmax_fusion|qk_clip\w*|log_max_attention_logit|attention_backend": _ATTENTION,
    r"flash_decode|flash_attention_version": _ATTENTION,
    r"use_fused_weighted_squared_relu": _EXPERTS,
    r"moe_apply_probs_on_input|moe_token_dropping|moe_enable_routing_replay": _EXPERTS,
    r"moe_latent_size|moe_router_padding_for_\w+|moe_router_quantile_balancing_ema": _EXPERTS,
    r"moe_use_legacy_grouped_gemm|moe_router_force_biased|moe_router_fusion": _EXPERTS,
    r"apply_residual_connection_post_layernorm|async_tensor_model_parallel_allreduce": _IGNORED,
    r"\w*cuda_graph\w*|(use_)?inference_\w+|nccl_all_reduce_for_prefill|mlp_chunks_for_\w+": _SERVING,
    r"symmetric_ar_type|batch_invariant_mode|high_priority_a2a_comm_stream": _SERVING,
    r"(use_)?kitchen\w*|quant_recipe|use_ring_exchange_p2p|pipeline_model_parallel_comm_backend": _LIBRARY,
    r"moe_(deepep|hybridep|ncclep|flex_dispatcher_num)\w*|moe_permute_fusion_into_hybridep": _KERNELS,
    r"\w*offload\w*|moe_paged_stash\w*|moe_expert_rank_capacity_factor": _OFFLOADING,
    r"ep_overlap_early_attn_memory_release": _SCHEDULE,
    r"microbatch_group_size_per_vp_stage|num_microbatches_with_partial_activation_checkpoints": _SCHEDULE,
    r"distribute_saved_activations": _RECOMPUTE,
    r"mtp_\w+|experimental_attention_variant|dsa_\w+|linear_\w+": _MODEL,
    r"(use_)?mamba_\w+|is_hybrid_model|hetero\w+|hetereo\w+|mrope_section|use_mup|mup_\w+": _MODEL,
    r"hierarchical_context_parallel_sizes|hybrid_context_parallel|max_seqlen_per_dp_cp_rank": _RANKS,
    r"moe_extended_tp|(expert_)?tensor_parallel_num_weight_shards|(expert_)?gtp_weight_remat_size": _RANKS,
}
"""Fields that the trainer sets itself, or that do not work in it, with the reason."""


def refusal(field: str, spec: str) -> str | None:
    """Why this field cannot be set with this `model.spec`, None if it can."""
    if spec == "native" and any(re.fullmatch(pattern, field) for pattern in NEEDS_TRANSFORMER_ENGINE):
        return "model.spec native does not compute it, it needs Transformer Engine"
    return next((reason for pattern, reason in NOT_SETTABLE.items() if re.fullmatch(pattern, field)), None)
