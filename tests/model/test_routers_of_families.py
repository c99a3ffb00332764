"""Our router, with the keys that a family maps to, against that family's own in transformers."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.config.schema import MoE
from megatron_moe.model.moe.router import Router

HIDDEN, EXPERTS, TOKENS = 16, 16, 64
SOFTMAX = {"moe_router_pre_softmax": True}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
V3 = {**SIGMOID, **GROUPS, "moe_router_group_score_topk": 2, "moe_router_topk_scaling_factor": 2.5}
DEEPSEEK = {"n_group": 4, "topk_group": 2}

CASES: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    # family, its router, name of the number of experts, its keys, ours
    "Mixtral": ("mixtral", "MixtralTopKRouter", "num_local_experts", {}, {}),
    "Qwen2-MoE": ("qwen2_moe", "Qwen2MoeTopKRouter", "num_experts", {"norm_topk_prob": False}, SOFTMAX),
    "Qwen2-MoE, renormalised": (
        "qwen2_moe",
        "Qwen2MoeTopKRouter",
        "num_experts",
        {"norm_topk_prob": True},
        {},
    ),
    "Qwen3-MoE": ("qwen3_moe", "Qwen3MoeTopKRouter", "num_experts", {"norm_topk_prob": True}, {}),
    "OLMoE": ("olmoe", "OlmoeTopKRouter", "num_experts", {"norm_topk_prob": False}, SOFTMAX),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", "num_local_experts", {}, {"moe_router_bias": True}),
    "DeepSeek-V2, greedy": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        "n_routed_experts",
        {"topk_method": "greedy", "routed_scaling_factor": 16.0},
        {**SOFTMAX, "moe_router_topk_scaling_factor": 16.0},
    ),
    "DeepSeek-V2, groups": (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        "n_routed_experts",
        {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.0, **DEEPSEEK},
        {**SOFTMAX, **GROUPS},
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        "n_routed_experts",
        {"norm_topk_prob": True, "routed_scaling_factor": 2.5, **DEEPSEEK},
        V3,
    ),
    "DeepSeek-V3, not renormalised": (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        "n_routed_experts",
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5, **DEEPSEEK},
        {**V3, "moe_router_norm_topk": False},
    ),
}


def theirs_and_ours(name: str, topk: int) -> tuple[torch.nn.Module, Router]:
    """Both with the same random weights."""

    family, router, experts, their_keys, our_keys = CASES[name]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config_class = next(
        value for key, value in vars(module).items() if key.lower() == f"{family.replace('_', '')}config"
    )
    config = config_class(
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts_per_tok=topk,
        **{experts: EXPERTS},
        **their_keys,
    )
    theirs = getattr(module, router)(config)
    ours = Router(
        MoE(
            num_moe_experts=EXPERTS,
            moe_router_topk=topk,
            moe_router_load_balancing_type="none",
            **our_keys,
        ),
        HIDDEN,
    )
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        ours.weight.copy_(theirs.weight)
        if ours.bias is not None:
            ours.bias.copy_(theirs.bias)
        if ours.expert_bias is not None:
            theirs.e_score_correction_bias.copy_(0.3 * torch.randn(EXPERTS, generator=generator))
            ours.expert_bias.copy_(theirs.e_score_correction_bias)
    return theirs, ours


def spread(weights: Tensor, experts: Tensor) -> Tensor:
    """[t, k] twice -> [t, e] the weights where the chosen experts are."""
    return torch.zeros(len(weights), EXPERTS).scatter(1, experts, weights)


@pytest.mark.second_pair
@pytest.mark.parametrize("topk", [2, 5, 6])
@pytest.mark.parametrize("name", CASES)
def test_experts_weights_and_gradients(name: str, topk: int) -> None:
    theirs, ours = theirs_and_ours(name, topk)
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(topk)) * 0.4
    first, second = (hidden.clone().requires_grad_() for _ in range(2))
    _, weights, experts = theirs(first)
    routing = ours(second[:, None])
    expected = spread(weights, experts)
    actual = spread(routing.weights, routing.experts)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(9))
    expected.backward(upstream)
    actual.backward(upstream)
    torch.testing.assert_close(second.grad, first.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)
    if ours.bias is not None:
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-4, atol=1e-4)
