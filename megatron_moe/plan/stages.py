"""Which layers each pipeline stage holds, and which of them it recomputes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.layout_string import layers_per_stage
from megatron_moe.config.moe_layers import moe_layers as kinds
from megatron_moe.config.schema import Experiment
from megatron_moe.plan.layout import Layout


@dataclass(frozen=True)
class Stage:
    """One model chunk on one pipeline rank. Layers are numbered over the whole model, from 0."""

    index: int
    """Position in the order in which a token passes the stages."""
    pipeline_rank: int
    chunk: int
    """Which of the rank's model chunks (virtual pipeline stage)."""
    layers: tuple[int, ...]
    moe_layers: tuple[int, ...]
    recompute_num_layers: int
    """What Megatron-Core is told: layers to recompute (`block`), or layers a recomputed group (`uniform`)."""
    recomputed: int
    """Layers that the backward pass computes again, whole."""
    recomputed_modules: tuple[str, ...]
    """Modules of the stage's layers that the backward pass computes again by themselves."""
    has_embedding: bool
    has_loss: bool
    num_mtp_layers: int = 0
    """Multi-token-prediction layers: all of them, or none."""


def moe_layers(experiment: Experiment) -> tuple[int, ...]:
    """Numbers of the layers that hold experts; empty for a dense model."""
    return tuple(layer for layer, has_experts in enumerate(kinds(experiment)) if has_experts)


def mtp_stage(experiment: Experiment) -> int:
    """The stage, from 0, with the multi-token-prediction layers where a model has them: pipeline.mtp_stage,
    or the last."""
    given = experiment.pipeline.mtp_stage
    return Layout.of(experiment).num_stages - 1 if given is None else given


def stages_of(experiment: Experiment) -> tuple[Stage, ...]:
    """The PP x VPP stages of a filled experiment in token order: stage i is chunk i // PP of rank i % PP."""
    layout = Layout.of(experiment)
    pipeline_size = layout.pipeline_model_parallel_size
    sizes = layers_per_stage(experiment)
    recompute_counts = experiment.recompute.layers_per_stage
    assert len(sizes) == layout.num_stages
    assert isinstance(recompute_counts, list) and len(recompute_counts) == pipeline_size

    with_experts = frozenset(moe_layers(experiment))
    with_mtp = mtp_stage(experiment)
    stages = []
    first = 0
    for index, size in enumerate(sizes):
        layers = tuple(range(first, first + size))
        first += size
        count = recompute_counts[index % pipeline_size]
        stages.append(
            Stage(
                index=index,
                pipeline_rank=index % pipeline_size,
                chunk=index // pipeline_size,
                layers=layers,
                moe_layers=tuple(layer for layer in layers if layer in with_experts),
                recompute_num_layers=count,
                recomputed=_recomputed(experiment.recompute.method, count, size),
                recomputed_modules=_modules(experiment, size, sum(n in with_experts for n in layers)),
                has_embedding=index == 0,
                has_loss=index == layout.num_stages - 1,
                num_mtp_layers=experiment.model.mtp_num_layers if index == with_mtp else 0,
            )
        )
    owned = [layer for stage in stages for layer in stage.layers]
    assert owned == list(range(experiment.model.num_layers)), "each layer belongs to exactly one stage"
    return tuple(stages)


def _modules(experiment: Experiment, layers: int, moe_layers: int) -> tuple[str, ...]:
    """Those of `recompute.modules` that a stage has."""
    layers_with = {"core_attn": layers, "layernorm": layers, "mlp": layers - moe_layers}
    return tuple(name for name in experiment.recompute.modules or () if layers_with.get(name, moe_layers))


def _recomputed(method: str, count: int, layers: int) -> int:
    if method == "uniform":
        return layers if count else 0
    return min(count, layers)
