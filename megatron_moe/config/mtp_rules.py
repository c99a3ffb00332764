"""Rules about multi-token prediction: where its layers may stand, and what they do not go with."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_moe.config.layout_string import layers_are_placed, layers_per_stage
from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import PP, VPP, Problems, set_value
from megatron_moe.config.schema import Experiment, Model

MTP = "model.mtp_num_layers"
STAGE = "pipeline.mtp_stage"
_SCALE = "model.mtp_loss_scaling_factor"


def keys_of_mtp(e: Experiment) -> Problems:
    """Keys for layers that the model does not have."""
    if e.model.mtp_num_layers:
        return
    advice = f"leave it out, or set {MTP}"
    if e.pipeline.mtp_stage is not None:
        yield Problem((STAGE, MTP), f"has no effect without {MTP}", advice)
    if e.model.mtp_loss_scaling_factor != Model.model_fields["mtp_loss_scaling_factor"].default:
        yield Problem((_SCALE, MTP), f"has no effect without {MTP}", advice)


def mtp_can_be_trained(e: Experiment) -> Problems:
    """What the layers lack, and what one of Megatron-Core's ways to share weights between stages lacks."""
    depths, length = e.model.mtp_num_layers, "training.seq_length"
    if depths >= e.training.seq_length:
        text = f"is not below {length}: the last layer would have no token to predict"
        yield Problem((MTP, length), text, f"use at most {e.training.seq_length - 1}")
    if depths:
        for key, why, advice in _not_beside(e):
            yield Problem((key, MTP), f"does not go with {MTP}: {why}", advice)


def _not_beside(e: Experiment) -> Iterator[tuple[str, str, str]]:
    """Keys that are set and do not go with multi-token prediction, why, and what would."""
    tied, kind = "model.untie_embeddings_and_output_weights", "model.position_embedding_type"
    if e.model.position_embedding_type == "learned_absolute":
        yield kind, "its copy of the embedding would learn other positions than the first stage's", "use rope"
    if not e.model.untie_embeddings_and_output_weights and e.parallel.pipeline_model_parallel_size > 1:
        why = f"Megatron-Core builds the shared matrix twice on the stage of its layers under {PP} above 1"
        yield tied, why, "set it to true"
    if e.training.fp8 is not None:
        yield "training.fp8", "its layers are not run in FP8 here", "leave it out"
    if e.moe is not None and e.moe.overlap_moe_expert_parallel_comm:
        why = "the schedule of two microbatches takes Megatron-Core's own layers apart"
        yield "moe.overlap_moe_expert_parallel_comm", why, "leave one of the two out"


def mtp_stage_can_be(e: Experiment) -> Problems:
    """The layers stand behind all others, with the loss or on the stage before it."""
    stage, p = e.pipeline.mtp_stage, e.parallel
    if stage is None or not e.model.mtp_num_layers:
        return
    ranks = p.pipeline_model_parallel_size
    last = ranks * set_value(p.virtual_pipeline_model_parallel_size) - 1
    layers = None if layers_are_placed(e) else layers_per_stage(e)
    own, advice = last - 1, f"use {last}, the last stage, or leave it out"
    if stage not in (own, last) or stage < 0:
        text = f"is neither the last of {PP} times {VPP} stages, {last}, nor the one before it"
        yield Problem((STAGE, PP, VPP), text, advice)
    elif stage == own and own % ranks == 0:
        text = (
            f"is on the first of {PP}, which has an embedding already, and Megatron-Core keeps two in step "
        )
        yield Problem((STAGE, PP), f"{text}only between ranks", advice)
    elif stage == own and own < last + 1 - ranks:
        text = f"is not on the last model chunk of its rank under {VPP}, where Megatron-Core wants it"
        yield Problem((STAGE, VPP), text, advice)
    elif stage == own and layers is not None and layers[last:] != [0]:
        text = "is before a layer in pipeline.layers_per_stage"
        advice = f"{advice}, or give the last stage the loss only"
        yield Problem((STAGE, "pipeline.layers_per_stage"), text, advice)
