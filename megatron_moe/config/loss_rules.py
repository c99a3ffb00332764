"""Rules about balancing losses and their coefficients."""

from __future__ import annotations

from megatron_moe.config.defaults import divisors_of
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems
from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.moe import MoE

_LOSS, _COEFFICIENT = "moe.moe_router_load_balancing_type", "moe.moe_aux_loss_coeff"
_GATE, _EXPERTS, _GROUPS = "moe.moe_router_gate", "moe.num_moe_experts", "moe.moe_num_device_groups"
_OF_DEVICES = ("device_aux_loss", "communication_aux_loss")
_NOISY = "noisy_topk"


def losses_named_once(e: Experiment) -> Problems:
    """A list names different losses, and none stands alone."""
    if e.moe is None or not isinstance(e.moe.moe_router_load_balancing_type, list):
        return
    names = e.moe.moe_router_load_balancing_type
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names:
        yield Problem((_LOSS,), "names no loss", "write none instead of a list, or name one")
    elif "none" in names:
        yield Problem(
            (_LOSS,), "holds none, which is no loss", "write none instead of a list, or take it out"
        )
    elif twice:
        text = f"names {', '.join(twice)} more than once"
        yield Problem((_LOSS,), text, "name it once, with the sum of its coefficients")


def coefficient_for_each_loss(e: Experiment) -> Problems:
    """A list of coefficients has one for each loss; a coefficient is there for a loss."""
    if e.moe is None:
        return
    names, coefficients = _names(e.moe), e.moe.moe_aux_loss_coeff
    if names == ["none"]:
        default = MoE.model_fields["moe_aux_loss_coeff"].default
        if coefficients not in (0, default):
            text = f"has no effect where {_LOSS} names no loss"
            yield Problem((_COEFFICIENT, _LOSS), text, "name a loss, or leave this out")
    elif isinstance(coefficients, list) and len(coefficients) != len(names):
        text = f"has not as many entries as {_LOSS} names losses"
        yield Problem((_COEFFICIENT, _LOSS), text, f"give it {len(names)}, or one coefficient without a list")


def load_loss_needs_noise(e: Experiment) -> Problems:
    """How many tokens an expert would get if the noise were drawn again is a question to a noisy gate."""
    if e.moe is not None and "load_loss" in _names(e.moe) and e.moe.moe_router_gate != _NOISY:
        text = f"needs the noise of a gate, which {_GATE} does not draw"
        yield Problem((_LOSS, _GATE), text, f"set {_GATE} to {_NOISY}, or use importance_loss alone")


def device_groups(e: Experiment) -> Problems:
    """The losses over devices need groups of equally many experts; without them and the gate swipe nothing
    reads their number."""
    if e.moe is None:
        return
    wanting = [name for name in _names(e.moe) if name in _OF_DEVICES]
    groups, experts = e.moe.moe_num_device_groups, e.moe.num_moe_experts
    if not wanting:
        if e.moe.moe_router_gate != "swipe" and groups != e.moe.moe_router_num_groups:
            text = f"has no effect without one of {', '.join(_OF_DEVICES)} in {_LOSS}"
            yield Problem((_GROUPS, _LOSS), text, "name one there, or leave this out")
    elif groups is None:
        text = f"needs {_GROUPS} for its {wanting[0]}"
        yield Problem((_LOSS, _GROUPS), text, f"set that to {divisors_of(experts)}")
    elif experts % groups and groups != e.moe.moe_router_num_groups and e.moe.moe_router_gate != "swipe":
        # Else a rule about the router says so.
        yield Problem((_GROUPS, _EXPERTS), f"does not divide {_EXPERTS}", f"use {divisors_of(experts)}")


def _names(moe: MoE) -> list[str]:
    names = moe.moe_router_load_balancing_type
    return list(names) if isinstance(names, list) else [names]
