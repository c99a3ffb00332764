"""The GPT model of one rank: its pipeline chunks, built from the plan."""

from __future__ import annotations

from typing import Any

import torch

from megatron_moe.config.schema import Experiment
from megatron_moe.engine import recompute
from megatron_moe.engine.versions import repair_missing_transformer_engine
from megatron_moe.model import trained
from megatron_moe.model.initialization import initialize
from megatron_moe.model.layers import block_spec, prediction_spec
from megatron_moe.model.rotary import scale_frequencies
from megatron_moe.model.transformer_config import transformer_config
from megatron_moe.plan.plan import Plan
from megatron_moe.plan.stages import Stage


def padded_vocab_size(experiment: Experiment) -> int:
    """Vocabulary rounded up to a multiple of `model.make_vocab_size_divisible_by`; the same in every
    layout."""
    vocab, multiple = experiment.model.vocab_size, experiment.model.make_vocab_size_divisible_by
    assert vocab is not None
    return -(-vocab // multiple) * multiple


def build_chunks(
    experiment: Experiment, plan: Plan, dtype: torch.dtype, *, drawn: bool = True
) -> list[torch.nn.Module]:
    """This rank's model chunks in token order, initialised, on its device, in training mode.

    Megatron-Core's parallel state must be initialised for `plan.layout`.

    Args:
        drawn: give weights their first values; else they are whatever memory held, to be filled.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.module import Float16Module

    repair_missing_transformer_engine()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    config = transformer_config(experiment, plan, rank, dtype)
    if config.recompute_granularity == "selective" and not config.fp8:
        recompute.use_for_norms()
    stages = [stage for stage in plan.stages if stage.pipeline_rank == rank]
    chunks: list[torch.nn.Module] = []
    for stage in stages:
        chunk = build_chunk(experiment, config, stage, virtual=len(stages) > 1)
        chunk.to(torch.cuda.current_device())
        if drawn:
            initialize(chunk, experiment, stage)
        trained.choose(chunk, experiment)
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def build_chunk(experiment: Experiment, config: Any, stage: Stage, virtual: bool) -> torch.nn.Module:
    """One chunk as Megatron-Core makes it, where `torch.cuda.current_device` says, its weights undrawn."""
    from megatron.core.models.gpt import GPTModel

    model = experiment.model
    kind = GPTModel
    if model.mtp_num_layers:
        from megatron_moe.model.multi_token import FurtherPredictingModel as kind
    chunk: torch.nn.Module = kind(
        config=config,
        transformer_layer_spec=block_spec(experiment, config, stage),
        vocab_size=padded_vocab_size(experiment),
        max_sequence_length=model.max_position_embeddings,
        pre_process=stage.has_embedding,
        post_process=stage.has_loss,
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        # It says int, and takes what it is raised to a power of.
        rotary_base=model.rotary_base,
        mtp_block_spec=prediction_spec(experiment, config, stage),
        vp_stage=stage.chunk if virtual else None,
    )
    scale_frequencies(chunk, model)
    return chunk
