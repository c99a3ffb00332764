"""Megatron-Core's TransformerConfig for one rank, made from the experiment and the plan."""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe.config.device_needs import needs_of
from megatron_moe.config.errors import InputError
from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment
from megatron_moe.model import uneven_heads
from megatron_moe.model.activations import ACTIVATIONS
from megatron_moe.model.rotary import softmax_scale
from megatron_moe.plan.plan import Plan

_UNCHECKED_MODULES = ("core_attn", "moe_act")
"""Recomputed modules that TransformerConfig must not see: of the first it warns that Transformer Engine's
attention needs none, and the second it ties to its own grouped experts."""


def transformer_config(experiment: Experiment, plan: Plan, pipeline_rank: int, dtype: torch.dtype) -> Any:
    """The TransformerConfig of the ranks of one pipeline rank.

    Pipeline ranks may recompute different numbers of layers, so that each has a config of its own. Raises
    InputError where Megatron-Core refuses what `model.megatron_core` adds, or the installed kernels.
    """
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    moe = experiment.moe
    if moe is not None and moe.overlap_moe_expert_parallel_comm and dtype == torch.float32:
        keys = "moe.overlap_moe_expert_parallel_comm needs bf16, and training.precision"
        raise InputError(f"{keys} ({experiment.training.precision}) is fp32 on this machine: set it to bf16")
    fields = (
        _model_fields(experiment, dtype)
        | _attention_fields(experiment)
        | _latent_attention_fields(experiment)
        | _moe_fields(experiment)
        | _parallel_fields(experiment, plan)
        | _recompute_fields(experiment, plan, pipeline_rank)
        | _device_fields(experiment)
    )
    heads_are_uneven = uneven_heads.are_uneven(experiment)
    if heads_are_uneven:
        fields |= uneven_heads.of_even_heads(experiment)
    further = experiment.model.megatron_core
    kind = TransformerConfig if experiment.model.multi_latent_attention is None else MLATransformerConfig
    try:
        config = kind(**fields, **further)
    except (AssertionError, TypeError, ValueError) as error:
        named = [need.key for need in needs_of(experiment)]
        if further:
            entries = ", ".join(f"{name}: {value}" for name, value in further.items())
            named.insert(0, f"model.megatron_core ({entries})")
        if not named:
            raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(
            f"{', '.join(named)}: Megatron-Core refuses this in the experiment: {reason}; "
            "change or leave out what it names"
        ) from error
    # Not before its checks: they refuse experts with biases where ETP > 1, which its own add up wrongly.
    config.add_bias_linear = experiment.model.mlp_bias
    if heads_are_uneven:
        config.num_attention_heads = experiment.model.num_attention_heads
        config.num_query_groups = experiment.model.num_query_groups
    if experiment.recompute.granularity == "selective":
        config.recompute_modules = list(experiment.recompute.modules or ())
    return config


def _model_fields(experiment: Experiment, dtype: torch.dtype) -> dict[str, Any]:
    model = experiment.model
    activation = ACTIVATIONS[model.activation]
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "ffn_hidden_size": model.ffn_hidden_size,
        "mtp_num_layers": model.mtp_num_layers or None,
        "mtp_loss_scaling_factor": model.mtp_loss_scaling_factor,
        "normalization": model.normalization,
        "layernorm_epsilon": model.layernorm_epsilon,
        "activation_func": activation.function,
        "gated_linear_unit": activation.is_gated,
        "activation_func_clamp_value": activation.limit,
        "glu_linear_offset": activation.offset,
        "add_bias_linear": False,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "init_method_std": model.init_method_std,
        # Weights are drawn by `model.initialization`, by name, so that they don't depend on the layout.
        # Megatron-Core must believe that it initialises, or it leaves the marks of tensor parallelism off the
        # parameters.
        "init_method": _leave_to_initialization,
        "output_layer_init_method": _leave_to_initialization,
        "embedding_init_method": _leave_to_initialization,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }


def _attention_fields(experiment: Experiment) -> dict[str, Any]:
    model = experiment.model
    fields: dict[str, Any] = {"softmax_type": "learnable" if model.attention_sinks else "vanilla"}
    if model.multi_latent_attention is None:
        fields |= {"qk_layernorm": model.qk_norm == "head", "softmax_scale": softmax_scale(model)}
    if model.qk_norm == "all_heads":
        # Ours takes its place, whose weights ranks share: under the other field Megatron-Core adds up their
        # gradients over tensor-parallel ranks, as those of copies (0.16.1 and 0.19.2).
        fields |= {"qk_l2_norm": True}
    if model.sliding_window is not None:
        fields["window_size"] = (model.sliding_window - 1, 0)
        fields["window_attn_skip_freq"] = model.window_attn_skip_freq
    return fields


def _latent_attention_fields(experiment: Experiment) -> dict[str, Any]:
    model, latent = experiment.model, experiment.model.multi_latent_attention
    if latent is None:
        return {}
    fields: dict[str, Any] = {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_head_dim,
        "qk_pos_emb_head_dim": latent.qk_pos_emb_head_dim,
        "v_head_dim": latent.v_head_dim,
        # The norms behind the narrow projections.
        "qk_layernorm": True,
        "rotary_base": model.rotary_base,
        "rope_type": "rope",
        # The softmax scale follows from it also where positions are not stretched.
        "mscale_all_dim": 0.0,
    }
    if (yarn := latent.yarn) is None:
        return fields
    return fields | {
        "rope_type": "yarn",
        "rotary_scaling_factor": yarn.rotary_scaling_factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def _leave_to_initialization(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _moe_fields(experiment: Experiment) -> dict[str, Any]:
    moe = experiment.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_moe_experts,
        "moe_router_topk": moe.moe_router_topk,
        "moe_ffn_hidden_size": moe.moe_ffn_hidden_size,
        "moe_layer_freq": [int(has_experts) for has_experts in moe_layers(experiment)],
        "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
        # What the router does is ours; Megatron-Core's own does nothing of it a second time.
        "moe_router_load_balancing_type": "none",
        # What our routers compute in at least; with many experts it warns of less.
        "moe_router_dtype": "fp32",
        # It refuses top-1 without; `config.router_rules` does it where our gates would not learn.
        "moe_router_pre_softmax": True,
        # Any number makes its dispatchers count what is left, instead of taking that for k a token.
        "moe_expert_capacity_factor": 1.0,
        "moe_shared_expert_gate": moe.moe_shared_expert_gate,
        # All others are ours.
        "moe_token_dispatcher_type": "flex" if moe.moe_token_dispatcher_type == "flex" else "alltoall",
        "overlap_moe_expert_parallel_comm": moe.overlap_moe_expert_parallel_comm,
    }


def _parallel_fields(experiment: Experiment, plan: Plan) -> dict[str, Any]:
    parallel, layout = experiment.parallel, plan.layout
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "context_parallel_size": layout.context_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        # Batched sends pair wrongly where the next and the previous stage are one rank (PP2 with VPP); single
        # ones are right.
        "batch_p2p_comm": False,
        "deallocate_pipeline_outputs": True,
    }
    if layout.virtual_pipeline_model_parallel_size > 1:
        fields["virtual_pipeline_model_parallel_size"] = layout.virtual_pipeline_model_parallel_size
    if layout.pipeline_model_parallel_size > 1:
        fields["pipeline_model_parallel_layout"] = [
            ["embedding"] * stage.has_embedding
            + ["decoder"] * len(stage.layers)
            + ["mtp"] * stage.num_mtp_layers
            + ["loss"] * stage.has_loss
            for stage in plan.stages
        ]
    return fields


def _recompute_fields(experiment: Experiment, plan: Plan, pipeline_rank: int) -> dict[str, Any]:
    recompute = experiment.recompute
    if recompute.granularity == "selective":
        modules = [name for name in recompute.modules or () if name not in _UNCHECKED_MODULES]
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    count = max(stage.recompute_num_layers for stage in plan.stages if stage.pipeline_rank == pipeline_rank)
    if count == 0:
        return {}
    return {
        "recompute_granularity": "full",
        "recompute_method": recompute.method,
        "recompute_num_layers": count,
    }


def _device_fields(experiment: Experiment) -> dict[str, Any]:
    """What runs in kernels of Transformer Engine, apex or DeepEP, by explicit keys only."""
    training, moe, layers = (
        experiment.training,
        experiment.moe,
        experiment.recompute.cpu_offloading_num_layers,
    )
    fields: dict[str, Any] = {
        "gradient_accumulation_fusion": training.gradient_accumulation_fusion,
        "apply_rope_fusion": experiment.model.apply_rope_fusion,
    }
    if training.fp8 is not None:
        fields |= {"fp8": training.fp8, "fp8_recipe": training.fp8_recipe}
    if layers:
        fields |= {"cpu_offloading": True, "cpu_offloading_num_layers": layers}
    if moe is not None:
        fields |= {
            "moe_permute_fusion": moe.moe_permute_fusion,
            "moe_flex_dispatcher_backend": moe.moe_flex_dispatcher_backend,
        }
    return fields
