"""How a model is laid out for inference: what of its experiment still holds, and what the user may set."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_moe.config import layout_rules, model_rules
from megatron_moe.config import overrides as override_arguments
from megatron_moe.config.checking import check
from megatron_moe.config.defaults import fill
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.keys import leaves
from megatron_moe.config.origin import Origin, Problem, dotted
from megatron_moe.config.rule import CP, DP, EP, ETP, PP, TP, VPP, Problems, set_value
from megatron_moe.config.schema import Experiment, Pipeline, Recompute
from megatron_moe.config.yaml_tree import Tree
from megatron_moe.plan.inference import dealt

KEYS = (TP, PP, EP, ETP, DP, "pipeline.layers_per_stage")
"""What may be set."""
_REFUSED = {
    CP: "sequences are not split in inference; use parallel.tensor_model_parallel_size for long ones",
    VPP: "chunks are interleaved in training only; use parallel.pipeline_model_parallel_size",
}


def inference_experiment(experiment: Experiment, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment whose model generates what that of `experiment` does: without the layout and all that is
    of training only, in one process unless `overrides` lay it out.

    Experts have no capacity: what they made of a token would depend on what else is in the batch.

    Args:
        overrides: `section.key=value`, of KEYS.

    Raises ConfigError with all that is wrong with them.
    """
    tree = Tree()
    override_arguments.apply(tree, overrides)
    problems = tree.problems + list(_refused(tree))
    if problems:
        raise ConfigError(*problems)
    values: dict[str, Any] = {
        **experiment.model_dump(),
        "parallel": {"sequence_parallel": False, **tree.values.get("parallel", {})},
        "pipeline": tree.values.get("pipeline", {}),
    }
    checked = check(values, tree.origins, "")
    if checked.problems:
        raise ConfigError(*checked.problems)
    result = fill(_without_training(fill(_split(checked.experiment))))
    origins = {dotted(path): origin for path, origin in tree.origins.items()}
    shown = dict(leaves(result))
    found = [problem.render(shown, origins) for rule in _RULES for problem in rule(result)]
    if found:
        raise ConfigError(*found)
    return result


def _refused(tree: Tree) -> Iterator[str]:
    """Keys that are not to be set here."""
    for path, origin in tree.origins.items():
        key = dotted(path)
        if key.startswith("pipeline.layers_per_stage") or key in KEYS or key in ("parallel", "pipeline"):
            continue
        assert isinstance(origin, Origin)
        reason = _REFUSED.get(key, f"only the layout may be set: {', '.join(KEYS)}")
        yield f"override {key}: is not for inference; {reason}"


def _split(experiment: Experiment) -> Experiment:
    """Where nothing is said of layers, the first stages have one more where they do not come out even."""
    stages, layers = experiment.parallel.pipeline_model_parallel_size, experiment.model.num_layers
    if experiment.pipeline.layers_per_stage is not None or stages > layers:
        return experiment
    counts = [count for _, count in dealt(layers, stages)]
    return experiment.model_copy(update={"pipeline": Pipeline(layers_per_stage=counts)})


def _without_training(experiment: Experiment) -> Experiment:
    model, ranks = experiment.model, experiment.parallel.tensor_model_parallel_size
    changes: dict[str, Any] = {
        "recompute": Recompute(),
        "model": model.model_copy(
            update={
                "mtp_num_layers": 0,
                "spec": "native",
                "apply_rope_fusion": False,
                # Rows that no token has are never looked at.
                "make_vocab_size_divisible_by": math.lcm(model.make_vocab_size_divisible_by, ranks),
            }
        ),
        "training": experiment.training.model_copy(
            update={
                "fp8": None,
                "gradient_accumulation_fusion": False,
                # One sequence a replica, as far as plans ask for it.
                "micro_batch_size": 1,
                "global_batch_size": experiment.parallel.data_parallel_size,
                "rampup_batch_size": None,
            }
        ),
    }
    if experiment.moe is not None:
        changes["moe"] = experiment.moe.model_copy(
            update={
                "moe_expert_capacity_factor": None,
                "moe_eval_capacity_factor": None,
                "moe_pad_expert_input_to_capacity": False,
                "moe_token_dispatcher_type": "alltoall",
                "moe_ranks_per_node": None,
                "moe_overlap_degree": 1,
                "moe_shadowing": None,
                "moe_shared_expert_overlap": False,
                "overlap_moe_expert_parallel_comm": False,
                "moe_permute_fusion": False,
            }
        )
    return experiment.model_copy(update=changes)


def _heads_over_tp(e: Experiment) -> Problems:
    """Each tensor-parallel rank has whole key and value heads with their queries, or as many ranks share
    each."""
    groups, tp = set_value(e.model.num_query_groups), e.parallel.tensor_model_parallel_size
    key, heads = "model.num_query_groups", e.model.num_attention_heads
    if e.model.multi_latent_attention is not None:
        key, groups = "model.num_attention_heads", heads
    if tp > groups and (tp % groups or heads % tp):
        text = f"is less than {TP}, and its ranks cannot share them evenly"
        yield Problem((key, TP), text, f"use a tensor_model_parallel_size of at most {groups}")


def _layers_are_given(e: Experiment) -> Problems:
    """Nobody plans for inference."""
    if e.pipeline.layers_per_stage == "auto":
        key = "pipeline.layers_per_stage"
        yield Problem((key,), "is for training", "give it a list, or leave it out for an even split")


_RULES = (
    _layers_are_given,
    _heads_over_tp,
    model_rules.ffn_over_tp,
    model_rules.expert_ffn_over_etp,
    model_rules.shared_experts_over_tp,
    model_rules.biases_of_experts,
    layout_rules.ranks_can_be_written_down,
    layout_rules.experts_over_ep,
    layout_rules.expert_ranks_fold,
    layout_rules.dense_has_no_experts,
    layout_rules.stages_add_up,
)
