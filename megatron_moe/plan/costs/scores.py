"""Memory for attention scores, where they cannot be spared."""

from __future__ import annotations

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.plan import Plan

_COPIES = 3
"""The probabilities, what dropout keeps of them, and their product (3.4 of them measured, torch 2.13)."""


def score_bytes(experiment: Experiment, plan: Plan) -> int:
    """What the scores [b, n, s, s], with a sliding window [b, n, s, w], in fp32 take at least, on all ranks
    together, where every layer keeps them for its backward pass: of one microbatch, and of recomputed layers
    one at a time.

    torch's fused attention keeps none, but on a host it knows no dropout.
    """
    training, recompute = experiment.training, experiment.recompute
    one_layer = _COPIES * 4 * training.micro_batch_size * experiment.model.num_attention_heads
    length, window = training.seq_length, experiment.model.sliding_window
    one_layer *= length * (length if window is None else min(window, length))
    kept = 0
    for rank in range(plan.layout.pipeline_model_parallel_size):
        stages = [stage for stage in plan.stages if stage.pipeline_rank == rank]
        layers = sum(len(stage.layers) for stage in stages)
        if "core_attn" in (recompute.modules or ()):
            kept += min(layers, 1)
        else:
            again = sum(min(stage.recompute_num_layers, len(stage.layers)) for stage in stages)
            kept += max(layers - again, min(layers, 1))
    return one_layer * kept * plan.layout.data_parallel_size
