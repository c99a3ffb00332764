"""The layouts that a search looks at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.moe import MoE
from megatron_moe.plan.costs.parameters import padded_vocab_size

_MOST_MICRO_BATCH = 8
_MOST_CHUNKS = 8
OTHER_SPLITS = ("num_layers_in_first_stage", "num_layers_in_last_stage", "mtp_stage")
"""Keys of the section `pipeline` about an experiment's own stages."""
_UNEVEN_CHUNKS = (2, 4)
"""Tried even where layers do not divide by them; the numbers between differ little from these."""
_LEAST_TOKENS_A_CONTEXT_RANK = 2048
"""Shorter pieces of a sequence are not worth a context-parallel rank."""


@dataclass(frozen=True, order=True)
class Candidate:
    """One layout, and what goes with it. DP follows."""

    tensor: int
    context: int
    pipeline: int
    chunks: int
    expert: int
    expert_tensor: int
    data: int
    micro_batch_size: int
    recompute: str
    """`modules` (the experts' activation and the norms), or `auto` (whole layers, as few as fit)."""


def candidates(experiment: Experiment, gpus: int, gpus_per_node: int) -> Iterator[Candidate]:
    """All layouts of a filled experiment over `gpus` ranks that the rules about sizes allow.

    The experiment's global batch and sequence stay. TP stays inside a node.
    """
    training = experiment.training
    for tensor in _tensor_sizes(experiment, gpus, gpus_per_node):
        for context in _context_sizes(experiment, gpus // tensor, tensor):
            for pipeline in _divisors(gpus // (tensor * context)):
                data = gpus // (tensor * context * pipeline)
                if pipeline - 2 > experiment.model.num_layers or training.global_batch_size % data:
                    continue
                for micro_batch_size in _micro_batches(training.global_batch_size // data):
                    microbatches = training.global_batch_size // data // micro_batch_size
                    for chunks in _chunks(experiment, pipeline, microbatches):
                        for expert, expert_tensor in _expert_sizes(
                            experiment, tensor, tensor * context * data
                        ):
                            for recompute in ("auto", "modules"):
                                yield Candidate(
                                    tensor,
                                    context,
                                    pipeline,
                                    chunks,
                                    expert,
                                    expert_tensor,
                                    data,
                                    micro_batch_size,
                                    recompute,
                                )


def is_own(experiment: Experiment, candidate: Candidate) -> bool:
    """Whether a candidate is laid out as the experiment is now."""
    parallel = experiment.parallel
    return (
        candidate.tensor == parallel.tensor_model_parallel_size
        and candidate.context == parallel.context_parallel_size
        and candidate.pipeline == parallel.pipeline_model_parallel_size
        and candidate.chunks == (parallel.virtual_pipeline_model_parallel_size or 1)
        and candidate.expert == parallel.expert_model_parallel_size
        and candidate.expert_tensor == parallel.expert_tensor_parallel_size
        and candidate.data == parallel.data_parallel_size
        and candidate.micro_batch_size == experiment.training.micro_batch_size
    )


def with_candidate(experiment: Experiment, candidate: Candidate) -> Experiment:
    """The experiment under that layout; `auto` where layers and recomputation are to be placed."""
    is_whole = candidate.recompute == "auto"
    update = {
        "parallel": experiment.parallel.model_copy(
            update={
                "tensor_model_parallel_size": candidate.tensor,
                "context_parallel_size": candidate.context,
                "pipeline_model_parallel_size": candidate.pipeline,
                "virtual_pipeline_model_parallel_size": candidate.chunks,
                "expert_model_parallel_size": candidate.expert,
                "expert_tensor_parallel_size": candidate.expert_tensor,
                "data_parallel_size": candidate.data,
                "sequence_parallel": candidate.tensor > 1,
            }
        ),
        "pipeline": experiment.pipeline.model_copy(
            update={"layers_per_stage": "auto", **dict.fromkeys(OTHER_SPLITS)}
        ),
        "recompute": experiment.recompute.model_copy(
            update={
                "granularity": "full"
                if is_whole
                else "none"
                if candidate.recompute == "none"
                else "selective",
                "layers_per_stage": "auto" if is_whole else [0] * candidate.pipeline,
                "method": "block",
                "modules": [] if is_whole else _modules(experiment),
            }
        ),
        "training": experiment.training.model_copy(update={"micro_batch_size": candidate.micro_batch_size}),
    }
    if experiment.moe is not None:
        update["moe"] = experiment.moe.model_copy(update=_exchange(experiment.moe, candidate))
    return experiment.model_copy(update=update)


def _exchange(moe: MoE, candidate: Candidate) -> dict[str, object]:
    """How tokens travel: as is best, or where the experiment asks for more than that, as it says."""
    is_overlapped = (
        moe.overlap_moe_expert_parallel_comm
        and candidate.expert > 1
        and candidate.recompute != "auto"
        and (candidate.pipeline == 1 or candidate.chunks > 1)
    )
    is_ours = moe.moe_overlap_degree > 1 or moe.moe_shadowing is not None
    return {
        "moe_token_dispatcher_type": moe.moe_token_dispatcher_type if is_overlapped or is_ours else "auto",
        "moe_ranks_per_node": None,
        "overlap_moe_expert_parallel_comm": is_overlapped,
        # The fused sorting of such a recipe has no effect without.
        "moe_permute_fusion": moe.moe_permute_fusion
        and is_overlapped == moe.overlap_moe_expert_parallel_comm,
    }


def _modules(experiment: Experiment) -> list[str]:
    return ["layernorm"] if experiment.moe is None else ["layernorm", "moe_act"]


def _tensor_sizes(experiment: Experiment, gpus: int, gpus_per_node: int) -> Iterator[int]:
    model = experiment.model
    assert model.num_query_groups is not None and model.ffn_hidden_size is not None
    for size in _divisors(gpus):
        over = (model.num_attention_heads, padded_vocab_size(experiment), experiment.training.seq_length)
        if size > gpus_per_node or any(value % size for value in over) or model.ffn_hidden_size % size:
            continue
        if model.num_query_groups % size and size % model.num_query_groups:
            continue
        yield size


def _context_sizes(experiment: Experiment, ranks: int, tensor: int) -> Iterator[int]:
    length = experiment.training.seq_length
    for size in _divisors(ranks):
        if size == 1 or (
            length % (2 * size * tensor) == 0 and length // size >= _LEAST_TOKENS_A_CONTEXT_RANK
        ):
            yield size


def _micro_batches(samples: int) -> Iterator[int]:
    size = 1
    while size <= _MOST_MICRO_BATCH:
        if samples % size == 0:
            yield size
        size *= 2


def _chunks(experiment: Experiment, pipeline: int, microbatches: int) -> Iterator[int]:
    yield 1
    if pipeline == 1 or microbatches % pipeline:
        return
    layers = experiment.model.num_layers
    for chunks in range(2, _MOST_CHUNKS + 1):
        is_even = layers % (pipeline * chunks) == 0
        if is_even or (chunks in _UNEVEN_CHUNKS and pipeline * chunks - 2 <= layers):
            yield chunks


def _expert_sizes(experiment: Experiment, tensor: int, stage_ranks: int) -> Iterator[tuple[int, int]]:
    if experiment.moe is None:
        yield 1, 1
        return
    assert experiment.moe.moe_ffn_hidden_size is not None
    for expert in _divisors(experiment.moe.num_moe_experts):
        for expert_tensor in dict.fromkeys((1, tensor)):
            together = expert * expert_tensor
            if stage_ranks % together == 0 and experiment.moe.moe_ffn_hidden_size % expert_tensor == 0:
                yield expert, expert_tensor


def _divisors(number: int) -> list[int]:
    small = [value for value in range(1, int(number**0.5) + 1) if number % value == 0]
    return sorted({*small, *(number // value for value in small)})
