"""Whether an experiment and a config.json describe the same computation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.origin import shown
from megatron_moe.config.schema import Experiment, Model, MoE
from megatron_moe.convert.family import Json, NotOfFamily
from megatron_moe.convert.windows import layers_with_window

_OF_TRAINING = """
    model.make_vocab_size_divisible_by model.mtp_loss_scaling_factor model.apply_rope_fusion model.spec
    model.hidden_dropout model.attention_dropout model.init_method_std
    moe.moe_expert_dropout moe.moe_expert_init_scale moe.moe_router_init_scale moe.moe_router_dtype
    moe.moe_input_jitter_eps moe.moe_router_bias_update_rate moe.moe_router_load_balancing_type
    moe.moe_aux_loss_coeff moe.moe_z_loss_coeff moe.moe_num_device_groups
    moe.moe_expert_capacity_factor moe.moe_eval_capacity_factor moe.moe_token_drop_policy
    moe.moe_pad_expert_input_to_capacity moe.moe_would_drop_capacity_factor
    moe.moe_token_dispatcher_type moe.moe_flex_dispatcher_backend moe.moe_ranks_per_node
    moe.moe_overlap_degree moe.moe_shared_expert_overlap moe.overlap_moe_expert_parallel_comm
    moe.moe_shadowing moe.moe_permute_fusion
"""
OF_TRAINING = frozenset(_OF_TRAINING.split())
"""Keys that say how a model is trained and run. Without dropped tokens, which no other program drops when it
runs a model, they change nothing of what its weights compute."""
_FUSIONS = re.compile(r".*fusion.*|.*recompute.*|.*cuda_graph.*|deterministic_mode")
"""Fields of Megatron-Core of the same sort."""


class Disagreement(NamedTuple):
    """A key of the experiment, its value, and the one that the other side stands for."""

    key: str
    value: Any
    other: Any

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.value)}, not {shown(self.other)}"


def disagreements(e: Experiment, sections: Json) -> Iterator[Disagreement]:
    """Where what the experiment computes differs from what these sections `model` and `moe` compute.

    Keys of OF_TRAINING are not looked at, and two spellings of the same are equal.
    """
    moe = sections.get("moe")
    if (e.moe is None) != (moe is None):
        yield Disagreement("moe", *("a section" if held else None for held in (e.moe, moe)))
        return
    other = e.model_copy(
        update={
            "model": Model.model_validate(sections["model"]),
            "moe": None if moe is None else MoE.model_validate(moe),
        }
    )
    mine, theirs = computed(e), computed(other)
    for key, value in mine.items():
        if value != theirs[key]:
            yield Disagreement(key, value, theirs[key])


def computed(e: Experiment) -> dict[str, Any]:
    """Every key of the sections `model` and `moe` that changes what the weights compute, each computation in
    one spelling."""
    values = {f"model.{key}": value for key, value in e.model.model_dump().items()}
    values |= {f"moe.{key}": value for key, value in (e.moe.model_dump() if e.moe else {}).items()}
    values = {key: value for key, value in values.items() if key not in OF_TRAINING}
    fields = e.model.megatron_core
    values["model.megatron_core"] = {name: fields[name] for name in fields if not _FUSIONS.fullmatch(name)}
    values["model.window_attn_skip_freq"] = layers_with_window(e)
    if e.model.multi_latent_attention is not None:
        # They follow from it.
        values["model.kv_channels"] = values["model.num_query_groups"] = None
    if (scaling := e.model.rotary_scaling) is not None:
        values["model.rotary_scaling"] = _scaling(scaling.model_dump())
    if e.moe is not None:
        values |= _routing(e, e.moe)
    return values


def _routing(e: Experiment, moe: MoE) -> dict[str, Any]:
    layers, sigmoid = moe_layers(e), moe.moe_router_score_function == "sigmoid"
    values: dict[str, Any] = {
        "moe.moe_layer_freq": layers,
        "moe.moe_first_k_dense_layers": None,
        "moe.moe_router_topk_scaling_factor": moe.moe_router_topk_scaling_factor or 1.0,
        "moe.moe_expert_activation": moe.moe_expert_activation or e.model.activation,
    }
    if all(layers):
        values["model.ffn_hidden_size"] = None
    if not sigmoid or moe.moe_router_topk == 1:
        values["moe.moe_router_norm_topk"] = None
    if moe.moe_router_logit_normalization is None:
        values["moe.moe_router_logit_normalization_epsilon"] = None
    if moe.moe_router_num_groups is None or moe.moe_router_num_groups == moe.moe_router_group_topk:
        # All groups are chosen.
        values |= {f"moe.moe_router_{key}": None for key in ("num_groups", "group_topk", "group_score_topk")}
    elif moe.moe_router_group_score_topk is None and moe.moe_router_group_topk is not None:
        summed = moe.moe_router_topk // moe.moe_router_group_topk if sigmoid else 1
        values["moe.moe_router_group_score_topk"] = summed
    return values


def _scaling(values: dict[str, Any]) -> dict[str, Any]:
    """Only what the kind reads."""
    read = {
        "linear": ("kind", "factor"),
        "llama3": (
            "kind",
            "factor",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
        ),
    }
    return {key: values[key] for key in read.get(values["kind"], values)}


def checked(
    sections: Callable[[Json], dict[str, Any]], write: Callable[[Experiment], dict[str, Any]]
) -> Callable[[Experiment], dict[str, Any]]:
    """`write`, held against what `sections` reads of it: an experiment that a family has no words for would
    come back as another one."""

    def config(experiment: Experiment) -> dict[str, Any]:
        written = write(experiment)
        try:
            read = sections(written)
        except NotOfFamily as problems:
            raise NotOfFamily(
                "\n".join(f"in config.json: {line}" for line in str(problems).splitlines())
            ) from None
        lost = [str(it) for it in disagreements(experiment, read)]
        if lost:
            raise NotOfFamily("\n".join(lost))
        return written

    return config
