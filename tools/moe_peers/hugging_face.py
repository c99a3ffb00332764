"""The MoE block of Mixtral in `transformers`, with each of its ways to compute experts."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from moe_peers.contender import Contender, Missing, Problem, of_module

IMPLEMENTATIONS = ("eager", "grouped_mm")
"""`batched_mm` copies the weights of its expert for each token: 17 GB for the first shape."""


def _block(implementation: str, problem: Problem) -> Contender:
    try:
        configuration: Any = importlib.import_module("transformers.models.mixtral.configuration_mixtral")
        modeling: Any = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    except ImportError as error:
        raise Missing(f"transformers is not installed ({error})") from error
    shape = problem.shape
    if shape.topk == 1:
        raise Missing("Mixtral's weights of one expert are 1 always; see Qwen3-MoE")
    config = configuration.MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.topk,
        experts_implementation=implementation,
    )
    block = modeling.MixtralSparseMoeBlock(config)
    return _ready(f"transformers Mixtral, {implementation}", block, problem)


def _qwen_block(implementation: str, problem: Problem) -> Contender:
    try:
        configuration: Any = importlib.import_module("transformers.models.qwen3_moe.configuration_qwen3_moe")
        modeling: Any = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    except ImportError as error:
        raise Missing(f"transformers is not installed ({error})") from error
    shape = problem.shape
    config = configuration.Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.topk,
        norm_topk_prob=shape.topk > 1,
        experts_implementation=implementation,
    )
    block = modeling.Qwen3MoeSparseMoeBlock(config)
    return _ready(f"transformers Qwen3-MoE, {implementation}", block, problem)


def _ready(name: str, block: Any, problem: Problem) -> Contender:
    block.gate.weight.data = problem.router.clone()
    block.experts.gate_up_proj.data, block.experts.down_proj.data = problem.fc1, problem.fc2
    return of_module(name, block, lambda tokens: block(tokens.unsqueeze(0)).squeeze(0))


MAKERS = [partial(_qwen_block, name) for name in IMPLEMENTATIONS] + [partial(_block, "grouped_mm")]
