"""Which building block stands where, for both specs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from experiments import MOE, experiment

from megatron_moe.model.attention import CoreAttention
from megatron_moe.model.layers import block_spec, prediction_spec
from megatron_moe.model.moe.experts import Experts
from megatron_moe.model.norms import Norm
from megatron_moe.model.transformer_config import transformer_config
from megatron_moe.plan import plan as plans

pytestmark = pytest.mark.second_pair


def block(spec: str = "native", **fields: Any) -> Any:
    setup = experiment(moe=MOE | {"moe_layer_freq": [0, 1, 0, 1]}, model={"spec": spec, **fields})
    plan = plans.make(setup)
    return block_spec(setup, transformer_config(setup, plan, 0, torch.float32), plan.stages[0])


@pytest.fixture
def transformer_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Megatron-Core's classes over Transformer Engine, which stand on mocks where it is not installed."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.models.gpt import gpt_layer_specs

    for module in (provider, gpt_layer_specs):
        monkeypatch.setattr(module, "is_te_min_version", lambda version: True, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    for name in ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"):
        stand_in = type(name, (torch.nn.Module,), {})
        monkeypatch.setattr(provider, name, stand_in)
    yield transformer_engine


def test_native_layers_are_ours() -> None:
    spec = block()
    assert spec.layer_norm is Norm
    dense, moe = spec.layer_specs[0].submodules, spec.layer_specs[1].submodules
    for layer in (dense, moe):
        assert layer.input_layernorm is layer.pre_mlp_layernorm is Norm
        assert layer.self_attention.submodules.core_attention is CoreAttention
    assert issubclass(moe.mlp.parts.experts, Experts)
    assert spec.layer_specs[2].submodules.mlp is dense.mlp and spec.layer_specs[3].submodules.mlp is moe.mlp


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "IdentityOp"),
        ({"qk_norm": "head"}, "Norm"),
        ({"megatron_core": {"qk_l2_norm": True}}, "L2Norm"),
    ],
    ids=["none", "head", "l2"],
)
def test_norms_of_query_and_key(fields: dict[str, Any], kind: str) -> None:
    attention = block(**fields).layer_specs[1].submodules.self_attention.submodules
    names = {getattr(norm, "__name__", str(norm)) for norm in (attention.q_layernorm, attention.k_layernorm)}
    assert names == {kind}


def test_latent_attention_and_further_tokens_of_transformer_engine(transformer_engine: Any) -> None:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_head_dim": 4, "qk_pos_emb_head_dim": 4}
    model = {"spec": "transformer_engine", "num_query_groups": None, "mtp_num_layers": 2}
    setup = experiment(model={**model, "multi_latent_attention": latent})
    plan = plans.make(setup)
    config = transformer_config(setup, plan, 0, torch.float32)
    attention = block_spec(setup, config, plan.stages[0]).layer_specs[0].submodules.self_attention
    assert attention.module.__name__ == "MLASelfAttention"
    assert attention.submodules.core_attention is transformer_engine.TEDotProductAttention
    # The norm is in the projection behind it.
    assert attention.submodules.linear_q_up_proj is transformer_engine.TELayerNormColumnParallelLinear
    further = prediction_spec(setup, config, plan.stages[0])
    assert len(further.layer_specs) == 2
    parts = further.layer_specs[0].submodules
    assert (parts.norm, parts.linear) == (
        transformer_engine.TENorm,
        transformer_engine.TEColumnParallelLinear,
    )
    assert parts.layer.submodules.self_attention.module.__name__ == "MLASelfAttention"


def test_transformer_engine_layers(transformer_engine: Any) -> None:
    """By the explicit key; the layer around them stays ours."""
    spec = block("transformer_engine", qk_norm="head")
    assert spec.layer_norm is transformer_engine.TENorm
    dense, moe = spec.layer_specs[0].submodules, spec.layer_specs[1].submodules
    for layer in (dense, moe):
        attention = layer.self_attention.submodules
        assert attention.core_attention is transformer_engine.TEDotProductAttention
        assert attention.q_layernorm is transformer_engine.TENorm
    assert "TEGroupedMLP" in repr(moe.mlp.parts.experts)
    assert "TENorm" in moe.pre_mlp_layernorm.__name__
