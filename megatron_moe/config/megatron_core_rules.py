"""What may stand under `model.megatron_core`: a field of the installed `TransformerConfig`, of its type, that is not ours to set.

Fields are refused with the reason, whatever their value: the model room sets many of them to what works here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from megatron_moe.config.keys import annotations, section_in
from megatron_moe.config.origin import Problem
from megatron_moe.config.schema import Experiment
from megatron_moe.config.transformer_fields import NotInstalled, accepts, describe, transformer_fields

OTHER_NAMES = {
    "activation_func": "model.activation",
    "gated_linear_unit": "model.activation",
    "transformer_impl": "model.spec",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "params_dtype": "training.precision",
    "recompute_granularity": "recompute.layers_per_stage",
    "recompute_method": "recompute.method",
    "recompute_num_layers": "recompute.layers_per_stage",
    "pipeline_model_parallel_layout": "pipeline.layers_per_stage",
    "num_layers_in_first_pipeline_stage": "pipeline.layers_per_stage",
    "num_layers_in_last_pipeline_stage": "pipeline.layers_per_stage",
    "account_for_embedding_in_pipeline_split": "pipeline.layers_per_stage",
    "account_for_loss_in_pipeline_split": "pipeline.layers_per_stage",
}
"""Fields of Megatron-Core that a key of ours with another name decides."""

SET_BY_THE_TRAINER = (
    r"\w+_func|timers|(|output_layer_|embedding_)init_method|pipeline_dtype|enable_autocast|autocast_dtype|perform_initialization|"
    r"use_cpu_initialization|init_model_with_meta_device|calculate_per_token_loss|variable_seq_lengths|deallocate_pipeline_outputs|"
    r"overlap_p2p_comm|batch_p2p_comm|batch_p2p_sync|overlap_p2p_comm_warmup_flush|moe_grouped_gemm|bias_activation_fusion|bias_dropout_fusion|apply_rope_fusion|moe_per_layer_logging|"
    r"config_logger_dir|barrier_with_L1_time|test_mode"
)
"""Fields, as a pattern, whose value follows from how this trainer runs."""

NEEDS_TRANSFORMER_ENGINE = (
    r"fp8|fp8_\w+|fp4|fp4_\w+|tp_comm_\w+|activation_func_fp8_input_store|tp_only_amax_red|first_last_layers_bf16|"
    r"num_layers_at_(start|end)_in_bf16|apply_rope_fusion|fused_single_qkv_rope|fused_residual_rmsnorm|use_te_\w+|"
    r"use_transformer_engine_op_fuser|moe_permute_fusion|moe_router_fusion|moe_latent_size|moe_router_padding_for_(fp8|quantization)|"
    r"cross_entropy_fusion_impl|delay_wgrad_compute|overlap_dispatch_backward_with_experts_wgrad|moe_single_grouped_\w+|"
    r"use_grouped_gemm_for_\w+|moe_(mlp|shared_expert)_glu_interleave_size|disable_parameter_transpose_cache|"
    r"softmax_type|attention_output_gate|window_size|window_attn_skip_freq|cp_comm_type"
)
"""Fields, as a pattern, that only the blocks of Transformer Engine compute."""

NOT_BUILT = {
    r"add_bias_linear": "biases in linear layers fail in Megatron-Core without Transformer Engine's blocks",
    r"gradient_accumulation_fusion|defer_embedding_wgrad_compute|wgrad_deferral_limit": "it needs NVIDIA's apex kernels",
    r"persist_layer_norm|memory_efficient_layer_norm": "it needs NVIDIA's apex kernels",
    r"layernorm_zero_centered_gamma": "the norms here keep their weight around one",
    r"apply_query_key_layer_scaling|softmax_scale|attention_softmax_in_fp32|masked_softmax_fusion|qk_clip\w*|log_max_attention_logit"
    r"|flash_decode|flash_attention_version|attention_backend": "the attention here does not compute it",
    r"glu_linear_offset|activation_func_clamp_value|use_fused_weighted_squared_relu|moe_apply_probs_on_input": "the experts here do "
    "not compute it",
    r"\w*cuda_graph\w*|inference_\w+|use_inference_\w+|nccl_all_reduce_for_prefill|mlp_chunks_for_\w+|symmetric_ar_type|"
    r"batch_invariant_mode|high_priority_a2a_comm_stream": "it is for serving or CUDA graphs, which this trainer does not use",
    r"use_kitchen\w*|kitchen_\w+|quant_recipe": "it needs a package that is not supported here",
    r"cpu_offloading\w*|fine_grained_\w+|\w*offload\w*|moe_paged_stash\w*|moe_expert_rank_capacity_factor": "offloading is not built "
    "into this trainer",
    r"moe_(enable_deepep|deepep|hybridep|ncclep|flex)\w*|moe_permute_fusion_into_hybridep|use_ring_exchange_p2p|"
    r"pipeline_model_parallel_comm_backend": "it needs a communication library that is not supported here",
    r"overlap_moe_expert_parallel_comm|ep_overlap_early_attn_memory_release|"
    r"microbatch_group_size_per_vp_stage|num_microbatches_with_partial_activation_checkpoints": "this trainer's schedule does not use it",
    r"recompute_modules|moe_layer_recompute|distribute_saved_activations": "recompute.layers_per_stage decides what is recomputed",
    r"mtp_\w+|multi_latent_attention|experimental_attention_variant\w*|dsa_\w+|linear_\w+|mamba_\w+|use_mamba_\w+|is_hybrid_model|"
    r"hetero\w+|hetereo\w+|mrope_section|use_mup|mup_\w+": "this trainer does not build such a model",
    r"hierarchical_context_parallel_sizes|hybrid_context_parallel|max_seqlen_per_dp_cp_rank|moe_extended_tp|"
    r"(expert_)?tensor_parallel_num_weight_shards|(expert_)?gtp_weight_remat_size": "this trainer lays ranks out by the section parallel",
    r"moe_token_dropping|moe_enable_routing_replay|moe_use_legacy_grouped_gemm|moe_router_force_biased": "the router and experts here "
    "do not use it",
}
"""Fields, as patterns, that do not work here, with the reason."""


def megatron_core_fields(e: Experiment) -> Iterator[Problem]:
    """One problem for each entry that cannot be passed on."""
    if not e.model.megatron_core:
        return
    try:
        known = transformer_fields()
    except NotInstalled:
        text = "cannot be checked, because megatron-core is not installed"
        yield Problem(
            ("model.megatron_core",), text, "pip install 'megatron-core>=0.16.1,<0.20', or leave it out"
        )
        return
    for name, value in e.model.megatron_core.items():
        key = f"model.megatron_core.{name}"
        own, reason = own_key(name), refusal(name, e.model.spec)
        if own is not None:
            yield Problem((key, own), f"is what {own} decides", f"set {own} and leave this out")
        elif name not in known:
            yield Problem((key,), "is no field of the installed TransformerConfig", _meant(name, list(known)))
        elif reason is not None:
            yield Problem((key,), f"cannot be set: {reason}", "leave it out")
        elif not accepts(known[name], value):
            words = describe(known[name])
            if words is None:
                yield Problem((key,), "stands where only a Python object fits", "leave it out")
            else:
                yield Problem((key,), f"must be {words}", "write it so, or leave it out")
        elif name.startswith("moe_") and e.moe is None:
            yield Problem((key, "moe"), "is for experts, and there is no section moe", "leave it out")


def own_key(field: str) -> str | None:
    """The key of the schema that decides this field of Megatron-Core, None if there is none."""
    if field in OTHER_NAMES:
        return OTHER_NAMES[field]
    sections = ("model.", "moe.", "parallel.")
    for key, annotation in annotations().items():
        if key.startswith(sections) and key.rpartition(".")[2] == field and section_in(annotation) is None:
            return key
    return None


def refusal(field: str, spec: str) -> str | None:
    """Why this field cannot be set, None if it can."""
    if spec == "native" and re.fullmatch(NEEDS_TRANSFORMER_ENGINE, field):
        return "model.spec native does not compute it, it needs Transformer Engine"
    if re.fullmatch(SET_BY_THE_TRAINER, field):
        return "the trainer sets it"
    for pattern, reason in NOT_BUILT.items():
        if re.fullmatch(pattern, field):
            return reason
    return None


def _meant(name: str, known: list[Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return (
        f"did you mean {close[0]}?"
        if close
        else "look the name up in megatron.core.transformer.TransformerConfig"
    )
