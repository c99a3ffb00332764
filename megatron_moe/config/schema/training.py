"""The sections `optimizer` and `training`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_moe.config.schema.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    SequenceCount,
)


class Optimizer(Section):
    """Adam with decoupled weight decay, its state sharded over the data-parallel ranks, and the learning-rate
    schedule."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay, and after it."""
    decoupled_lr: PositiveFloat | None = None
    """Peak learning rate of the word embedding and the output layer, tied or not; learned positions have the
    main one. Default: lr."""
    decoupled_min_lr: NonNegativeFloat | None = None
    """The same at the end of the decay. Default: min_lr."""
    expert_lr: PositiveFloat | None = None
    """Peak learning rate of the routed experts; routers and shared experts have the main one. Default: lr."""
    expert_min_lr: NonNegativeFloat | None = None
    """The same at the end of the decay. Default: min_lr."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay after the warm-up. `inverse-square-root`: lr x sqrt(lr_warmup_iters / iteration), at
    least min_lr. `WSD`: stable at lr, then a decay over the last lr_wsd_decay_iters."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the final decay under `WSD`."""
    lr_wsd_decay_iters: PositiveInt | None = None
    """Iterations of the final decay under `WSD`. Default: a tenth of lr_decay_iters."""
    lr_warmup_iters: NonNegativeInt | None = None
    """Iterations of linear warm-up. Default: lr_warmup_fraction x lr_decay_iters."""
    lr_warmup_fraction: Fraction | None = None
    """Warm-up as a part of lr_decay_iters, instead of lr_warmup_iters. Default: 0."""
    lr_decay_iters: PositiveInt | None = None
    """Iterations until min_lr is reached, the warm-up included. Default: training.train_iters."""
    adam_beta1: Fraction = 0.9
    """Decay of the first moment."""
    adam_beta2: Fraction = 0.95
    """Decay of the second moment."""
    adam_eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay; norms and biases take none."""
    clip_grad: NonNegativeFloat = 1.0
    """Global gradient norm is clipped to this; 0: not at all."""
    use_precision_aware_optimizer: bool = False
    """Keep the optimizer's state in the dtypes below. Needs Transformer Engine and a GPU."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """Gradients that the precision-aware optimizer reads. `bf16` needs parallel.grad_reduce_in_fp32 false."""
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """First moment of the precision-aware optimizer."""
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Second moment of the precision-aware optimizer."""
    optimizer_cpu_offload: bool = False
    """Keep the optimizer's state in the host's memory and step there. Needs a GPU, whose memory it saves, and
    bf16."""
    optimizer_offload_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of the state that is offloaded, at least: whole weights are."""


AdaptedPart = Literal["attention", "mlp", "shared_experts", "experts"]


def _attention() -> list[AdaptedPart]:
    return ["attention"]


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021): only these are trained, all other weights stay as they are. A
    matrix W becomes W + (alpha / rank) B A, with B zero at first, so that training begins with the model as
    it was. Checkpoints hold both; `megatron-moe export` adds them up."""

    rank: PositiveInt
    """Rows of A, columns of B."""
    alpha: PositiveFloat | None = None
    """Over the rank, what B A is multiplied by. Default: twice the rank."""
    dropout: Fraction = 0.0
    """Of what goes into A. The same tokens' elements are dropped in every layout."""
    targets: Annotated[list[AdaptedPart], Field(min_length=1)] = Field(default_factory=_attention)
    """What gets adapters: the projections of attention, dense feed-forward layers, shared experts, routed
    experts (an A and a B for each matrix of each expert)."""


class Training(Section):
    """How long, how much at once, what of it, and in which precision."""

    train_iters: PositiveInt
    """Optimizer steps in all."""
    global_batch_size: SequenceCount
    """Sequences a step, over all replicas and microbatches."""
    rampup_batch_size: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)] | None = None
    """[start, increment, samples]: begin with a global batch of `start` sequences and add `increment` at
    equal distances of samples, so that global_batch_size is reached after so many. Default: none."""
    micro_batch_size: SequenceCount = 1
    """Sequences b that one replica runs at once."""
    seq_length: PositiveInt
    """Tokens s a sequence."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1234
    """Seeds weights, data order and dropout."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16` keeps fp32 master weights. `auto`: bf16 on a GPU with bf16 units, else fp32."""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """Matrix products in FP8: E4M3, or `hybrid` with E5M2 for gradients. Needs Transformer Engine and a GPU
    with FP8 units."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """How FP8 scales are found. `blockwise` needs compute capability 9.0, `mxfp8` 10.0, the others 8.9."""
    calculate_per_token_loss: bool | None = None
    """Divide the loss by the targets of the whole global batch. False: by those of each microbatch, and the
    mean over microbatches, so that a target in a microbatch with much padding weighs more. Default: false,
    and for data.kind instruction what data.instruction.weighting says."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to the fp32 buffer inside the matrix product. Needs apex's
    fused_weight_gradient_mlp_cuda, also beside Transformer Engine, and a GPU."""
    freeze: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """Weights that are not trained: groups (router, experts, shared_experts, mlp, attention, norms,
    embeddings, output) and shell patterns of names in the checkpoint, such as `decoder.layers.[0-3].*`.
    Default: none."""
    lora: Lora | None = None
    """Train small matrices beside the model's instead of these. Leave the section out to train all
    weights."""
    eval_interval: PositiveInt | None = None
    """Evaluate on the validation part every so many iterations, and at the end. Default: never."""
    eval_iters: PositiveInt = 10
    """Global batches an evaluation."""
