"""Rules about which layers are MoE, and what experts are made of."""

from __future__ import annotations

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems
from megatron_moe.config.schema import Experiment

_EVERY, _FIRST = "moe.moe_layer_freq", "moe.moe_first_k_dense_layers"
_SHARED = "moe.moe_shared_expert_intermediate_size"


def moe_layer_list_length(e: Experiment) -> Problems:
    """A list of MoE layers says so for each layer, and names one at least."""
    if e.moe is None or not isinstance(e.moe.moe_layer_freq, list):
        return
    keys = (_EVERY, "model.num_layers")
    if len(e.moe.moe_layer_freq) != e.model.num_layers:
        text = f"has {len(e.moe.moe_layer_freq)} entries and not one for each of the model.num_layers"
        yield Problem(keys, text, f"give it {e.model.num_layers} entries, 1 for MoE and 0 for dense")
    elif not any(e.moe.moe_layer_freq):
        yield Problem(keys[:1], "names no MoE layer", "set an entry to 1, or make the model dense: moe=null")


def first_dense_layers(e: Experiment) -> Problems:
    """The first layers are dense where a list does not say it for all layers; MoE layers come behind them."""
    if e.moe is None or not e.moe.moe_first_k_dense_layers:
        return
    every = e.moe.moe_layer_freq
    if isinstance(every, list):
        text = f"stands beside a list in {_EVERY}, which says of each layer what it is"
        yield Problem((_FIRST, _EVERY), text, "write 0 for these layers in the list, and leave this out")
    elif not any(moe_layers(e)):
        last = (e.model.num_layers - 1) // every * every
        text = f"leaves no MoE layer of model.num_layers under {_EVERY}"
        yield Problem((_FIRST, "model.num_layers", _EVERY), text, f"use at most {last}")


def shared_expert_gate_has_experts(e: Experiment) -> Problems:
    """The gate weighs the output of shared experts."""
    if e.moe and e.moe.moe_shared_expert_gate and e.moe.moe_shared_expert_intermediate_size is None:
        keys = ("moe.moe_shared_expert_gate", _SHARED)
        yield Problem(keys, f"has no effect without {_SHARED}", "set that, or leave this out")


def experts_of_transformer_engine(e: Experiment) -> Problems:
    """Transformer Engine's experts have the activation of the dense layers, and no dropout."""
    if e.moe is None or e.model.spec != "transformer_engine":
        return
    if e.moe.moe_expert_activation != e.model.activation:
        keys = ("moe.moe_expert_activation", "model.activation", "model.spec")
        text = "is not model.activation, which the experts of model.spec have"
        yield Problem(keys, text, "leave it out, or set model.spec to native")
    if e.moe.moe_expert_dropout:
        of_dropout = ("moe.moe_expert_dropout", "model.spec")
        yield Problem(of_dropout, "is not in the experts of model.spec", "use 0, or set model.spec to native")
