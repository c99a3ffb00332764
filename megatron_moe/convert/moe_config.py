"""What config.json says of balancing, and of which layers hold experts, and back."""

from __future__ import annotations

from typing import Any

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.moe import MoE
from megatron_moe.convert.config_json import ConfigJson
from megatron_moe.convert.family import NotOfFamily

Values = dict[str, Any]


def mixture_of(e: Experiment) -> MoE:
    """The section `moe`, which a family of MoE models needs. Raises NotOfFamily."""
    if e.moe is None:
        raise NotOfFamily("moe: left out, but this family has experts")
    return e.moe


def read_balance(coefficient: float, loss: str = "aux_loss") -> Values:
    """Keys of `moe`. A coefficient of 0 is no loss."""
    if not coefficient:
        return {"moe_router_load_balancing_type": "none"}
    return {"moe_router_load_balancing_type": loss, "moe_aux_loss_coeff": coefficient}


def write_balance(moe: MoE, loss: str = "aux_loss") -> float:
    """The coefficient, or 0 where the experiment balances in a way that the family has no word for: its
    weights compute the same."""
    coefficient = moe.moe_aux_loss_coeff
    is_number = isinstance(coefficient, int | float) and moe.moe_router_load_balancing_type == loss
    return float(coefficient) if is_number else 0.0  # type: ignore[arg-type]


def read_softmax(config: ConfigJson, normalized: bool = False) -> Values:
    """Whether the weights of the chosen experts are their shares of all experts, or of the chosen ones.

    Args:
        normalized: the family's default of norm_topk_prob.
    """
    return {"moe_router_pre_softmax": not config.get("norm_topk_prob", default=normalized)}


def read_sparse_layers(config: ConfigJson) -> Values:
    """Keys of `moe`, from decoder_sparse_step and mlp_only_layers (Qwen)."""
    layers = config.layers()
    step, nothing = config.get("decoder_sparse_step", default=1), list[int]()
    dense = config.get("mlp_only_layers", default=nothing)
    if step < 1:
        config.refuse("decoder_sparse_step", "is less than 1")
        step = 1
    frequency = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers)]
    return {"moe_layer_freq": 1 if all(frequency) else frequency}


def write_sparse_layers(e: Experiment) -> Values:
    """The other way round."""
    dense = [layer for layer, holds_experts in enumerate(moe_layers(e)) if not holds_experts]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}
