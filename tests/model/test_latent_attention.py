"""Multi-latent attention against DeepSeek's own, as transformers has it, in float64."""

from __future__ import annotations

from typing import Any

import latent_on_ranks
import pytest
import torch
from distributed import ranks
from experiments import experiment, layout

LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 6}
YARN = {
    "rotary_scaling_factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "mscale": 0.707,
    "mscale_all_dim": 1.2,
}
CASES = {
    "narrow queries": LATENT,
    "queries at once": {**LATENT, "q_lora_rank": None},
    "stretched positions": {**LATENT, "yarn": YARN},
}
NAMES = {
    "linear_q_proj.weight": "q_proj.weight",
    "linear_q_down_proj.weight": "q_a_proj.weight",
    "q_layernorm.weight": "q_a_layernorm.weight",
    "linear_q_up_proj.weight": "q_b_proj.weight",
    "linear_kv_down_proj.weight": "kv_a_proj_with_mqa.weight",
    "kv_layernorm.weight": "kv_a_layernorm.weight",
    "linear_kv_up_proj.weight": "kv_b_proj.weight",
    "linear_proj.weight": "o_proj.weight",
}
"""Ours -> those of transformers."""


def of_deepseek(latent: dict[str, Any]) -> tuple[Any, Any]:
    """DeepSeek-V3's attention and rotary positions with the sizes of the test's model."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3Attention,
        DeepseekV3RotaryEmbedding,
    )

    rope = {"rope_type": "default", "rope_theta": 500.0}
    if yarn := latent.get("yarn"):
        rope |= {
            "rope_type": "yarn",
            "factor": yarn["rotary_scaling_factor"],
            **{name: yarn[name] for name in yarn if name != "rotary_scaling_factor"},
        }
    config = DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=latent["q_lora_rank"],
        kv_lora_rank=latent["kv_lora_rank"],
        qk_nope_head_dim=latent["qk_head_dim"],
        qk_rope_head_dim=latent["qk_pos_emb_head_dim"],
        v_head_dim=latent["v_head_dim"],
        max_position_embeddings=128,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    return DeepseekV3Attention(config, 0).double(), DeepseekV3RotaryEmbedding(config)


@pytest.mark.second_pair
@pytest.mark.parametrize("name", CASES)
def test_computes_what_deepseeks_attention_computes(name: str) -> None:
    latent = CASES[name]
    generator = torch.Generator().manual_seed(11)
    hidden, upstream = (
        torch.randn(32, 2, 32, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)
    )
    model = {
        "num_query_groups": None,
        "rotary_base": 500.0,
        # transformers' norms behind narrow projections have this one.
        "layernorm_epsilon": 1e-6,
        "multi_latent_attention": latent,
    }
    (ours,) = ranks(1).run(
        latent_on_ranks.attention, experiment(model=model), hidden.detach(), upstream.detach()
    )
    theirs, rotary = of_deepseek(latent)
    theirs.load_state_dict({NAMES[name]: value for name, value in ours["values"].items()})
    positions = rotary(hidden.detach(), torch.arange(32).expand(2, -1))
    mask = torch.full((32, 32), -torch.inf, dtype=torch.float64).triu(1)
    output = theirs(hidden.transpose(0, 1), positions, mask[None, None])[0].transpose(0, 1)
    output.backward(upstream.detach())

    def check(mine: torch.Tensor, exact: torch.Tensor | None) -> None:
        # Cosines and sines are taken in float32.
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)

    check(ours["output"], output.detach())
    check(ours["input"], hidden.grad)
    of_weights = dict(theirs.named_parameters())
    assert ours["weights"].keys() == {name for name in NAMES if NAMES[name] in of_weights}
    for name, gradient in ours["weights"].items():
        check(gradient, of_weights[NAMES[name]].grad)


@pytest.mark.second_pair
def test_weights_have_the_names_of_transformer_engines_blocks() -> None:
    model = {"num_layers": 1, "num_query_groups": None, "multi_latent_attention": LATENT}
    names = ranks(2).run(
        latent_on_ranks.names_in_checkpoint, experiment(model=model, moe=None, parallel=layout(tp=2))
    )
    assert names[0] == names[1]
    attention = "decoder.layers.self_attention."
    assert [name.removeprefix(attention) for name in names[0] if name.startswith(attention)] == [
        "linear_kv_down_proj.weight",
        "linear_kv_up_proj.layer_norm_weight",
        "linear_kv_up_proj.weight",
        "linear_proj.weight",
        "linear_q_down_proj.weight",
        "linear_q_up_proj.layer_norm_weight",
        "linear_q_up_proj.weight",
    ]
    assert "decoder.layers.input_layernorm.weight" in names[0]
