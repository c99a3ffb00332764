"""Rules about what is trained: frozen weights and low-rank adapters."""

from __future__ import annotations

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import ETP, Problems, set_value
from megatron_moe.config.schema import Experiment

_LORA, _TARGETS, _DROPOUT = "training.lora", "training.lora.targets", "training.lora.dropout"
_FREEZE = "training.freeze"


def adapters_or_frozen_weights(e: Experiment) -> Problems:
    """Beside adapters nothing is trained anyway."""
    if e.training.lora is not None and e.training.freeze is not None:
        text = f"has no effect beside {_LORA}, under which all weights of the model are frozen"
        yield Problem((_FREEZE, _LORA), text, "leave one of the two out")


def targets_are_there(e: Experiment) -> Problems:
    """Each target is a part that this model has, and is named once."""
    if (lora := e.training.lora) is None:
        return
    for target in dict.fromkeys(lora.targets):
        if lora.targets.count(target) > 1:
            yield Problem((_TARGETS,), f"names {target} {lora.targets.count(target)} times", "name it once")
    layers = moe_layers(e)
    if "experts" in lora.targets and not any(layers):
        yield Problem((_TARGETS, "moe"), "names experts, and no layer has any", "leave experts out")
    if "mlp" in lora.targets and all(layers):
        text = "names mlp, dense feed-forward layers, and all layers have experts"
        yield Problem((_TARGETS, "moe.moe_layer_freq"), text, "name experts instead")
    if "shared_experts" in lora.targets and (
        e.moe is None or e.moe.moe_shared_expert_intermediate_size is None
    ):
        keys = (_TARGETS, "moe.moe_shared_expert_intermediate_size")
        yield Problem(keys, "names shared_experts, and there are none", "leave them out")


def adapters_can_be_built(e: Experiment) -> Problems:
    """Transformer Engine's layers compute the norm inside; an adapter is less than its matrix; experts' parts
    of adapters are equal."""
    if (lora := e.training.lora) is None:
        return
    if e.model.spec != "native":
        text = f"cannot be added under model.spec {e.model.spec}, whose projections hold the norm before them"
        yield Problem((_LORA, "model.spec"), text, "set model.spec to native")
    if lora.rank > e.model.hidden_size:
        text = f"is more than model.hidden_size ({e.model.hidden_size}), the rank of the whole matrix"
        remedy = "use less, such as 16, or train the model itself"
        yield Problem((f"{_LORA}.rank", "model.hidden_size"), text, remedy)
    parts = set_value(e.parallel.expert_tensor_parallel_size)
    if "experts" in lora.targets and e.model.hidden_size % parts:
        keys = (_TARGETS, "model.hidden_size", ETP)
        text = f"names experts, whose adapters need a model.hidden_size that is divisible by {ETP}"
        yield Problem(keys, text, f"set {ETP} to 1")
    if "experts" in lora.targets and e.moe is not None and e.moe.overlap_moe_expert_parallel_comm:
        overlap = "moe.overlap_moe_expert_parallel_comm"
        text = (
            f"names experts, which under {overlap} round differently than without: in bf16, by up to a tenth"
        )
        yield Problem((_TARGETS, overlap), text, "leave one of the two out")
    if "experts" in lora.targets and e.moe is not None and e.moe.moe_shadowing:
        copying = "moe.moe_shadowing"
        text = f"names experts, and {copying} copies experts without their adapters"
        yield Problem((_TARGETS, copying), text, "leave one of the two out")


def adapters_can_drop(e: Experiment) -> Problems:
    """What is dropped goes by the tokens' places in the run, which must be known where adapters are."""
    if (lora := e.training.lora) is None or not lora.dropout:
        return
    if "experts" in lora.targets:
        text = f"must be 0 where {_TARGETS} has experts, which do not know where in the run a token stands"
        yield Problem((_DROPOUT, _TARGETS), text, "set it to 0, or leave experts out")
    again = [name for name in ("mlp", "moe", "shared_experts") if name in (e.recompute.modules or ())]
    if again:
        keys = (_DROPOUT, "recompute.modules")
        text = f"cannot be drawn again the same where {keys[1]} has {', '.join(again)}"
        yield Problem(keys, text, "set it to 0, or recompute.granularity to full")
    if e.model.mtp_num_layers:
        keys = (_DROPOUT, "model.mtp_num_layers")
        text = f"must be 0 beside {keys[1]}, whose layers see other tokens"
        yield Problem(keys, text, "set it to 0")
    if e.moe is not None and e.moe.overlap_moe_expert_parallel_comm:
        keys = (_DROPOUT, "moe.overlap_moe_expert_parallel_comm")
        yield Problem(keys, f"must be 0 under {keys[1]}, which takes layers apart", "set it to 0")


def rates_have_weights(e: Experiment) -> Problems:
    """A learning rate of weights that are not trained does nothing."""
    frozen, lora = e.training.freeze or (), e.training.lora
    for name in ("expert_lr", "expert_min_lr"):
        if getattr(e.optimizer, name) is None:
            continue
        if "experts" in frozen:
            yield Problem(
                (f"optimizer.{name}", _FREEZE), "is for experts, and they are frozen", "leave it out"
            )
        if lora is not None and "experts" not in lora.targets:
            text = f"is for experts, and {_TARGETS} does not name them"
            yield Problem((f"optimizer.{name}", _TARGETS), text, "leave it out")
    for name in ("decoupled_lr", "decoupled_min_lr"):
        if getattr(e.optimizer, name) is not None and lora is not None:
            text = f"is for the embedding and the output layer, which have no adapters under {_LORA}"
            yield Problem((f"optimizer.{name}", _LORA), text, "leave it out")


def similarity_has_experts(e: Experiment) -> Problems:
    """There must be two experts in some layer to be alike, and they must change."""
    key = "logging.expert_similarity"
    if not e.logging.expert_similarity:
        return
    if e.moe is None:
        yield Problem((key, "moe"), "is of experts, and there is no section moe", "leave it out")
    elif e.moe.num_moe_experts == 1:
        keys = (key, "moe.num_moe_experts")
        yield Problem(keys, f"is of pairs of experts, and {keys[1]} is 1", "leave it out")
    if e.model.spec != "native":
        text = f"cannot be computed of the experts of model.spec {e.model.spec}"
        yield Problem((key, "model.spec"), text, "leave it out, or set model.spec to native")
    if e.training.lora is not None:
        text = f"would be the same at every step: {_LORA} leaves the experts' own weights as they are"
        yield Problem((key, _LORA), text, "leave it out")
