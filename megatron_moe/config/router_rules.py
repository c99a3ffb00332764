"""Rules about how experts are chosen: what each gate reads, and what its keys need of each other.

A key that the chosen gate does not read is an error: it would be ignored.
"""

from __future__ import annotations

from megatron_moe.config.defaults import divisors_of
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems, set_value
from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.moe import MoE

_GATE, _TOPK, _EXPERTS = "moe.moe_router_gate", "moe.moe_router_topk", "moe.num_moe_experts"
_GROUPS, _CHOSEN = "moe.moe_router_num_groups", "moe.moe_router_group_topk"
_GROUP_SCORE, _NORM = "moe.moe_router_group_score_topk", "moe.moe_router_norm_topk"
_SCORE, _BEFORE = "moe.moe_router_score_function", "moe.moe_router_pre_softmax"
_BIAS, _RATE = "moe.moe_router_enable_expert_bias", "moe.moe_router_bias_update_rate"
_JITTER = "moe.moe_input_jitter_eps"
_NORMALIZATION = "moe.moe_router_logit_normalization"
_LOSS, _Z_LOSS = "moe.moe_router_load_balancing_type", "moe.moe_z_loss_coeff"

CHOICES = {"switch": 1, "gshard": 2}
"""Gates that choose so many experts and no other number."""

_WEIGHS_BY_SCORE = ("topk", "swipe", "forced_balance")
_HAS_LOGITS = ("topk", "noisy_topk", "switch", "gshard", "sinkhorn", "swipe", "forced_balance")

READ_BY: dict[str, tuple[str, ...]] = {
    _SCORE: _WEIGHS_BY_SCORE,
    _BEFORE: ("noisy_topk", *_WEIGHS_BY_SCORE),
    _GROUPS: ("topk",),
    _CHOSEN: ("topk",),
    _GROUP_SCORE: ("topk",),
    _NORM: _WEIGHS_BY_SCORE,
    _BIAS: ("topk",),
    _NORMALIZATION: _HAS_LOGITS,
    _JITTER: _HAS_LOGITS,
    "moe.moe_router_bias": _HAS_LOGITS,
    "moe.moe_router_init_scale": _HAS_LOGITS,
    "moe.moe_router_dtype": _HAS_LOGITS,
    _Z_LOSS: _HAS_LOGITS,
}
"""Keys that not every gate reads, and the gates that do."""

TOKENS = 1 << 22
"""Numbers of the vocabulary that travel with tokens to gates that hash or draw (see `model.moe.marks`)."""
MARKED = ("noisy_topk", "gshard", "hash", "forced_balance")
"""These gates."""


def topk_within_experts(e: Experiment) -> Problems:
    """A token goes to different experts; a gate that chooses another number says so itself."""
    if e.moe is None or e.moe.moe_router_topk <= e.moe.num_moe_experts:
        return
    wanted = CHOICES.get(e.moe.moe_router_gate)
    if wanted is None or wanted == e.moe.moe_router_topk:
        advice = f"use at least {wanted} experts" if wanted else f"use at most {e.moe.num_moe_experts}"
        yield Problem((_TOPK, _EXPERTS), f"is more than {_EXPERTS}", advice)


def choices_of_gate(e: Experiment) -> Problems:
    """Some gates are made for one number of experts a token."""
    if e.moe is None or e.moe.moe_router_topk == CHOICES.get(e.moe.moe_router_gate, e.moe.moe_router_topk):
        return
    wanted = CHOICES[e.moe.moe_router_gate]
    text = f"is not the {wanted} that {_GATE} chooses"
    yield Problem((_TOPK, _GATE), text, f"use {wanted}, or {_GATE} topk")


def top1_needs_softmax_first(e: Experiment) -> Problems:
    """A softmax over the one chosen expert is 1 whatever the router says: it would learn nothing."""
    moe = e.moe
    if moe is None or moe.moe_router_topk > 1 or moe.moe_router_gate not in READ_BY[_BEFORE]:
        return
    if moe.moe_router_score_function == "softmax" and not moe.moe_router_pre_softmax:
        text = f"expert a token gives the router no gradient under {_BEFORE}"
        yield Problem((_TOPK, _BEFORE), text, "set that to true, or use at least 2 experts")


def keys_of_gate(e: Experiment) -> Problems:
    """What the chosen gate does not read is left at its default."""
    if e.moe is None:
        return
    for key, gates in READ_BY.items():
        if e.moe.moe_router_gate not in gates and _is_set(e.moe, key):
            others = f"use {_GATE} {' or '.join(gates)}, or "
            advice = f"{others if len(gates) <= len(_WEIGHS_BY_SCORE) + 1 else ''}leave it out"
            yield Problem((key, _GATE), f"has no effect under {_GATE}", advice)


def scores_of_gate(e: Experiment) -> Problems:
    """Sigmoids are taken one by one, before anything is chosen."""
    if e.moe is not None and e.moe.moe_router_score_function == "sigmoid" and e.moe.moe_router_pre_softmax:
        yield Problem(
            (_BEFORE, _SCORE), f"has no effect on the sigmoid in {_SCORE}", "leave one of the two out"
        )
    if e.moe is not None and e.moe.moe_router_score_function == "softmax" and not e.moe.moe_router_norm_topk:
        text = f"has no effect on the softmax in {_SCORE}, whose shares {_BEFORE} leaves as they are"
        yield Problem((_NORM, _SCORE), text, f"leave it out, and set {_BEFORE} to true")


def hash_learns_nothing(e: Experiment) -> Problems:
    """Without a router's weights no loss has a gradient."""
    if e.moe is not None and e.moe.moe_router_gate == "hash":
        names = e.moe.moe_router_load_balancing_type
        if set(names if isinstance(names, list) else [names]) != {"none"}:
            text = f"has nothing to move: {_GATE} has no weights"
            yield Problem((_LOSS, _GATE), text, f"set {_LOSS} to none")


def expert_bias_needs_sigmoid(e: Experiment) -> Problems:
    """Biases move scores that are not shares of one (DeepSeek-V3)."""
    if e.moe is None:
        return
    if not e.moe.moe_router_enable_expert_bias:
        if _is_set(e.moe, _RATE):
            text = f"has no effect without {_BIAS}"
            yield Problem((_RATE, _BIAS), text, "set that to true, or leave this out")
    elif e.moe.moe_router_gate in READ_BY[_BIAS] and e.moe.moe_router_score_function == "softmax":
        yield Problem((_BIAS, _SCORE), f"does not go with a softmax in {_SCORE}", f"set {_SCORE} to sigmoid")


def groups_of_experts(e: Experiment) -> Problems:
    """Group-limited routing (DeepSeek-V2): experts lie in groups, and a token chooses groups first."""
    if e.moe is None:
        return
    groups, chosen = e.moe.moe_router_num_groups, e.moe.moe_router_group_topk
    if groups is None and chosen is None:
        return
    if groups is None or chosen is None:
        keys = (_GROUPS, _CHOSEN) if groups else (_CHOSEN, _GROUPS)
        yield Problem(keys, f"needs {keys[1]}", "set both, or none")
    elif e.moe.num_moe_experts % groups:
        text, advice = f"does not divide {_EXPERTS}", f"use {divisors_of(e.moe.num_moe_experts)}"
        yield Problem((_GROUPS, _EXPERTS), text, advice)
    elif chosen > groups:
        yield Problem((_CHOSEN, _GROUPS), f"is more than {_GROUPS}", f"use at most {groups}")
    elif not chosen <= e.moe.moe_router_topk <= chosen * (e.moe.num_moe_experts // groups):
        inside = e.moe.num_moe_experts // groups
        group, expert = ("group" if chosen == 1 else "groups"), ("expert" if inside == 1 else "experts")
        text = f"{group} of {inside} {expert} cannot hold {_TOPK} choices with one in each"
        fitting = str(chosen) if inside == 1 else f"a number from {chosen} to {chosen * inside}"
        yield Problem((_CHOSEN, _TOPK), text, f"set {_TOPK} to {fitting}")


def scores_of_groups(e: Experiment) -> Problems:
    """A group's score is a sum of scores that are in it."""
    if e.moe is None or (summed := e.moe.moe_router_group_score_topk) is None:
        return
    groups, chosen = e.moe.moe_router_num_groups, e.moe.moe_router_group_topk
    # What follows from other keys that contradict each other is said of these.
    inside, by_default = e.moe.num_moe_experts // (groups or 1), e.moe.moe_router_topk // (chosen or 1)
    if groups is None or chosen is None:
        yield Problem((_GROUP_SCORE, _GROUPS), f"has no effect without {_GROUPS}", "leave it out")
    elif inside * groups == e.moe.num_moe_experts and summed > inside and by_default <= inside:
        text = f"is more than the {_EXPERTS} in each of {_GROUPS}"
        yield Problem((_GROUP_SCORE, _EXPERTS, _GROUPS), text, f"use at most {max(inside, 1)}")


def logit_normalization(e: Experiment) -> Problems:
    """A standard deviation needs two logits, and its epsilon a normalization."""
    if e.moe is None:
        return
    epsilon = "moe.moe_router_logit_normalization_epsilon"
    if e.moe.moe_router_logit_normalization is None:
        if _is_set(e.moe, epsilon):
            text = f"has no effect without {_NORMALIZATION}"
            yield Problem((epsilon, _NORMALIZATION), text, "set that, or leave this out")
    elif e.moe.num_moe_experts == 1:
        text = f"has no standard deviation over {_EXPERTS}"
        yield Problem((_NORMALIZATION, _EXPERTS), text, "use at least 2 experts, or leave it out")


def workers_of_swipe(e: Experiment) -> Problems:
    """The gate's workers have equal shares of the experts, as the groups of losses (`loss_rules`)."""
    key = "moe.moe_num_device_groups"
    if e.moe is None or e.moe.moe_router_gate != "swipe" or e.moe.moe_num_device_groups is None:
        return
    if e.moe.num_moe_experts % e.moe.moe_num_device_groups:
        text, advice = f"does not divide {_EXPERTS}", f"use {divisors_of(e.moe.num_moe_experts)}"
        yield Problem((key, _EXPERTS), text, advice)


def vocabulary_of_marked_tokens(e: Experiment) -> Problems:
    """A token's number travels to routers that hash or draw in a field of so many bits."""
    if e.moe is None or not (e.moe.moe_router_gate in MARKED or e.moe.moe_input_jitter_eps):
        return
    key = _GATE if e.moe.moe_router_gate in MARKED else _JITTER
    if set_value(e.model.vocab_size) > TOKENS:
        text = f"is more than the {TOKENS:,} numbers that {key} can tell apart"
        yield Problem(("model.vocab_size", key), text, f"use a vocabulary of at most {TOKENS:,} numbers")


def marked_tokens_reach_routers(e: Experiment) -> Problems:
    """Megatron-Core's own layer, which calls the kernels of the flex dispatcher, tells its router of padding
    and no more."""
    if e.moe is None or not (e.moe.moe_router_gate in MARKED or e.moe.moe_input_jitter_eps):
        return
    key, dispatcher = _GATE if e.moe.moe_router_gate in MARKED else _JITTER, "moe.moe_token_dispatcher_type"
    if e.moe.moe_token_dispatcher_type == "flex":
        text = f"goes by tokens' positions or numbers, which {dispatcher} does not bring to the router"
        yield Problem((key, dispatcher), text, f"set {dispatcher} to alltoall, or leave this out")


def _is_set(moe: MoE, key: str) -> bool:
    """Whether a key has another value than its default; no jitter is none."""
    name = key.rpartition(".")[2]
    default = MoE.model_fields[name].default
    return bool((getattr(moe, name) or default) != default)
