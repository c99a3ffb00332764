"""Megatron-Core's MoE layer with its SequentialMLP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_moe.engine import groups
from megatron_moe.engine.versions import build, repair_missing_transformer_engine
from megatron_moe.plan.layout import Layout
from moe_peers.contender import Contender, Problem, of_module


def layer(problem: Problem) -> Contender:
    """Over all ranks as expert-parallel data-parallel ones."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    if not parallel_state.model_parallel_is_initialized():
        layout = Layout(1, 1, 1, 1, problem.ranks, 1, problem.ranks)
        groups.initialize_model_parallel(layout, seed=0, timeout_s=600)
    repair_missing_transformer_engine()
    shape, dtype = problem.shape, problem.fc1.dtype
    config = TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden,
        num_attention_heads=8,
        num_moe_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_ffn_hidden_size=shape.width,
        moe_router_pre_softmax=shape.topk == 1,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=problem.ranks,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    spec: Any = get_gpt_layer_local_spec(num_experts=shape.experts).submodules.mlp
    module = build(spec, config=config, pg_collection=get_default_pg_collection())
    module.set_layer_number(1)
    module.router.weight.data = problem.router.clone()
    local = shape.experts // problem.ranks
    for number, expert in enumerate(module.experts.local_experts, start=local * problem.rank):
        expert.linear_fc1.weight.data, expert.linear_fc2.weight.data = (
            problem.fc1[number],
            problem.fc2[number],
        )
    return of_module(
        "Megatron-Core, SequentialMLP", module, lambda tokens: module(tokens.unsqueeze(1))[0].squeeze(1)
    )
