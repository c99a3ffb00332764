"""The sections `parallel`, `pipeline` and `recompute`."""

from __future__ import annotations

from typing import Literal

from megatron_moe.config.schema.section import NonNegativeInt, RankCount, Section


class Parallel(Section):
    """How the model and the batch are spread over ranks: ranks = TP x PP x CP x DP."""

    tensor_model_parallel_size: RankCount = 1
    """TP: ranks that share each attention and dense matrix."""
    pipeline_model_parallel_size: RankCount = 1
    """PP: pipeline stages."""
    virtual_pipeline_model_parallel_size: RankCount | None = None
    """VPP: model chunks a pipeline rank (interleaved schedule). Default: 1, the plain 1F1B schedule."""
    context_parallel_size: RankCount = 1
    """CP: ranks that share each sequence."""
    expert_model_parallel_size: RankCount | None = None
    """EP: ranks that share the experts. Default: TP, which is Expert Data Parallelism (EDP); 1 without
    experts."""
    expert_tensor_parallel_size: RankCount | None = None
    """ETP: ranks that share each expert's matrices. Default: 1 (it does not inherit TP)."""
    data_parallel_size: RankCount | None = None
    """DP: replicas. Default: under torchrun or srun what the number of ranks leaves, alone the smallest that
    EP allows."""
    sequence_parallel: bool | None = None
    """Shard the sequence over the TP ranks between the tensor-parallel regions. Default: TP > 1."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the replicas bucket by bucket while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights from the replicas while the next forward pass begins. Needs
    overlap_grad_reduce."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32. False: in the precision of the weights, which halves the
    traffic under bf16, and is the same under fp32."""


class Pipeline(Section):
    """Which layers each pipeline stage holds."""

    layers_per_stage: list[NonNegativeInt] | str | None = None
    """Layers of each of the PP x VPP stages, in the order in which a token passes them: a list, Megatron's
    layout string, such as `Et*3|(tt|)*29,m|L` (E embedding, t layer, m multi-token prediction, L loss), or
    `auto`: the planner places them, so that every stage fits its memory and an iteration is shortest. The
    first stage may have no layer beside the embedding, the last none beside the loss. Default: even."""
    num_layers_in_first_stage: NonNegativeInt | None = None
    """Layers of the first stage, those of the others being even; instead of layers_per_stage."""
    num_layers_in_last_stage: NonNegativeInt | None = None
    """Layers of the last stage, those of the others being even; instead of layers_per_stage."""
    mtp_stage: NonNegativeInt | None = None
    """Stage, from 0, that holds the multi-token-prediction layers: the last, or the one before it where the
    last holds the loss only. Default: the last, beside the loss."""


class Recompute(Section):
    """What is computed again in the backward pass instead of keeping its activations."""

    granularity: Literal["none", "selective", "full"] | None = None
    """`full`: whole layers, as many as layers_per_stage says. `selective`: the modules of each layer.
    Default: what layers_per_stage or modules imply, else `none`."""
    layers_per_stage: list[NonNegativeInt] | Literal["auto"] | None = None
    """Recomputed layers of each pipeline rank (PP entries; within VPP of each chunk of that rank), or `auto`:
    as few as let each rank fit its memory, by the plan. Default: all layers under granularity `full`, else
    none."""
    method: Literal["block", "uniform"] = "block"
    """Under granularity `full`. `block` recomputes the first n layers of a stage, each by itself; `uniform`
    recomputes every layer of the stage, in groups of n that keep only their input."""
    modules: list[Literal["core_attn", "layernorm", "moe_act", "mlp", "moe", "shared_experts"]] | None = None
    """What `selective` recomputes in each layer: core attention (which keeps little, being fused), norms, the
    experts' activation, dense feed-forwards, whole MoE layers, shared experts. Default: core_attn under
    granularity `selective`, else nothing."""
    cpu_offloading_num_layers: NonNegativeInt = 0
    """Layers whose activations wait in the host's memory for the backward pass. Needs Transformer Engine and
    a GPU."""
