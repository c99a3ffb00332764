"""Every rule that looks at more than one key, in one table."""

from __future__ import annotations

from megatron_moe.config import (
    attention_rules,
    capacity_rules,
    cluster_rules,
    data_rules,
    device_rules,
    dispatch_rules,
    layout_rules,
    loss_rules,
    model_rules,
    optimizer_rules,
    option_rules,
    overlap_rules,
    recompute_rules,
    router_rules,
    run_rules,
    sink_rules,
    structure_rules,
    tokenizer_rules,
)
from megatron_moe.config.megatron_core_rules import megatron_core_fields
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Rule
from megatron_moe.config.schema import Experiment

RULES: list[Rule] = [
    run_rules.megatron_core_supported,
    megatron_core_fields,
    device_rules.blocks_of_transformer_engine,
    device_rules.dead_without_their_switch,
    device_rules.main_grads_as_reduced,
    device_rules.one_optimizer_state,
    device_rules.offloaded_state_needs_bf16,
    device_rules.offloaded_layers,
    device_rules.flex_has_ranks_to_reach,
    model_rules.heads_over_tp,
    model_rules.heads_over_query_groups,
    model_rules.query_groups_over_tp,
    model_rules.rope_needs_even_width,
    attention_rules.keys_of_latent_attention,
    attention_rules.latent_attention_can_be_built,
    model_rules.ffn_over_tp,
    model_rules.padded_vocab_over_tp,
    model_rules.positions_reach_sequence,
    router_rules.topk_within_experts,
    router_rules.choices_of_gate,
    router_rules.top1_needs_softmax_first,
    router_rules.keys_of_gate,
    router_rules.scores_of_gate,
    router_rules.hash_learns_nothing,
    router_rules.expert_bias_needs_sigmoid,
    router_rules.groups_of_experts,
    router_rules.logit_normalization,
    router_rules.workers_of_swipe,
    router_rules.vocabulary_of_marked_tokens,
    router_rules.marked_tokens_reach_routers,
    loss_rules.losses_named_once,
    loss_rules.coefficient_for_each_loss,
    loss_rules.load_loss_needs_noise,
    loss_rules.device_groups,
    model_rules.expert_ffn_over_etp,
    model_rules.shared_experts_over_tp,
    model_rules.biases_of_experts,
    structure_rules.moe_layer_list_length,
    structure_rules.first_dense_layers,
    structure_rules.shared_expert_gate_has_experts,
    structure_rules.experts_of_transformer_engine,
    capacity_rules.capacity_that_is_used,
    capacity_rules.padded_experts,
    dispatch_rules.shared_expert_overlap,
    dispatch_rules.ranks_per_node,
    dispatch_rules.sorted_in_a_kernel,
    overlap_rules.overlap_degree,
    overlap_rules.shadowing,
    overlap_rules.overlapped_batches,
    option_rules.rotary_options,
    option_rules.one_norm_of_queries,
    option_rules.biases_of_recomputed_layers,
    layout_rules.ranks_can_be_written_down,
    layout_rules.experts_over_ep,
    layout_rules.expert_ranks_fold,
    layout_rules.dense_has_no_experts,
    layout_rules.moe_with_tp_needs_sp,
    layout_rules.sp_needs_tp,
    layout_rules.sequence_over_ranks,
    layout_rules.vpp_needs_pp,
    layout_rules.stages_add_up,
    layout_rules.param_gather_needs_grad_reduce,
    recompute_rules.recompute_said_once,
    recompute_rules.recompute_within_stages,
    recompute_rules.modules_are_there,
    recompute_rules.modules_can_be_recomputed,
    data_rules.data_said_once,
    data_rules.source_said_once,
    data_rules.weights_or_epochs,
    data_rules.sources_are_read,
    tokenizer_rules.tokenizer_keys_of_kind,
    tokenizer_rules.tokenizer_said_once,
    data_rules.split_has_training_part,
    data_rules.evaluation_has_data,
    data_rules.ends_of_documents,
    data_rules.positions_can_be_reset,
    data_rules.attention_can_be_reset,
    optimizer_rules.warmup_said_once,
    optimizer_rules.warmup_within_decay,
    optimizer_rules.inverse_root_needs_warmup,
    optimizer_rules.wsd_keys_need_wsd,
    optimizer_rules.wsd_decay_after_warmup,
    optimizer_rules.min_lr_below_lr,
    optimizer_rules.expert_rates_need_experts,
    optimizer_rules.ramp_reaches_batch,
    layout_rules.batch_over_replicas,
    sink_rules.wandb_names_are_names,
    cluster_rules.memory_is_left,
    cluster_rules.units_for_fp8,
    optimizer_rules.ramp_over_replicas,
]


def violations(experiment: Experiment, partial: bool = False) -> list[Problem]:
    """All problems of a filled experiment. A `partial` one lacks keys; rules that need one of these are
    skipped."""
    found: list[Problem] = []
    for rule in RULES:
        try:
            found += list(rule(experiment))
        except AttributeError:
            if not partial:
                raise
    return found
