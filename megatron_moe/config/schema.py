"""The experiment: every key that a YAML file may hold, its type, its default and what it does.

One pydantic model a section. Models are strict (no silent conversion), frozen, and refuse unknown keys.
``None`` as a default means "derived": `config.defaults.fill` replaces it by the value that the docstring
names, so that everything behind the loader sees concrete values. Rules that look at more than one key are in
`config.rules`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

InputPath = Annotated[str, Field(min_length=1, json_schema_extra={"path": "input"})]
"""A path that the experiment reads. In a YAML file it is relative to that file, as an override to the working
directory."""


class Section(BaseModel):
    """Strict, frozen, closed to unknown keys; the docstring under a field is its description."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Model(Section):
    """The transformer."""

    num_layers: PositiveInt
    """Transformer layers."""
    hidden_size: PositiveInt
    """Width h of the residual stream."""
    num_attention_heads: PositiveInt
    """Query heads."""
    num_query_groups: PositiveInt | None = None
    """Key and value heads (grouped-query attention). Default: num_attention_heads."""
    kv_channels: PositiveInt | None = None
    """Width of one attention head. Default: hidden_size / num_attention_heads."""
    ffn_hidden_size: PositiveInt | None = None
    """Inner width of a dense feed-forward layer. Default: 4 x hidden_size."""
    vocab_size: PositiveInt | None = None
    """Token ids the model knows, before padding. Default: the tokenizer's."""
    make_vocab_size_divisible_by: PositiveInt = 128
    """The vocabulary is padded to a multiple of this. Unlike in Megatron-LM it does not depend on the
    tensor-parallel size, so that a checkpoint fits every layout."""
    max_position_embeddings: PositiveInt | None = None
    """Longest sequence that positions are defined for. Default: training.seq_length."""
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    """How positions reach the model."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies (theta)."""
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of each head that is rotated."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Normalisation of every layer's inputs and of the final output."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Added to the variance."""
    activation: Literal["swiglu", "geglu", "gelu", "relu", "squared_relu"] = "swiglu"
    """Feed-forward activation, dense layers and experts alike."""
    untie_embeddings_and_output_weights: bool = True
    """Whether the output layer has a weight of its own."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream take std / sqrt(2
    num_layers)."""
    hidden_dropout: Fraction = 0.0
    """Dropout on each residual branch."""
    attention_dropout: Fraction = 0.0
    """Dropout on attention probabilities."""
    spec: Literal["native", "transformer_engine"] = "native"
    """Which building blocks. `native` needs neither Transformer Engine nor apex. Recorded in the checkpoint;
    never chosen by what happens to be installed."""
    megatron_core: dict[str, Any] = Field(default_factory=dict)
    """Any further field of Megatron-Core's `TransformerConfig`, checked by name and type against the
    installed version."""


class MoE(Section):
    """The mixture of experts. Leave the section out for a dense model."""

    num_moe_experts: PositiveInt
    """Routed experts e in each MoE layer."""
    moe_router_topk: PositiveInt = 2
    """Experts k that each token goes to."""
    moe_ffn_hidden_size: PositiveInt | None = None
    """Inner width of one expert. Default: model.ffn_hidden_size."""
    moe_layer_freq: PositiveInt | list[Annotated[int, Field(ge=0, le=1)]] = 1
    """n: every n-th layer is MoE, the first one included. A list of 0 and 1: one entry a layer, 1 is MoE."""
    moe_shared_expert_intermediate_size: PositiveInt | None = None
    """Inner width of the shared experts together, which every token passes. Default: none."""
    moe_router_load_balancing_type: Literal["aux_loss", "none"] = "aux_loss"
    """The balancing loss. `aux_loss` is the Switch form e * sum_j f_j P_j over one microbatch (1 at perfect
    balance); by definition it is a function of the microbatch."""
    moe_aux_loss_coeff: NonNegativeFloat = 0.01
    """Weight of the balancing loss."""
    moe_z_loss_coeff: NonNegativeFloat = 0.0
    """Weight of the router z-loss mean(logsumexp(logits)^2) (ST-MoE)."""
    moe_router_pre_softmax: bool = False
    """True: softmax over all experts, then top-k. False: top-k of the logits, then softmax over the k
    (Mixtral)."""
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Precision of the router's product and softmax."""
    moe_expert_capacity_factor: PositiveFloat | None = None
    """Each expert takes at most ceil(t * k / e * factor) of a microbatch's t tokens, the rest is dropped.
    Default: dropless."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an overfull expert drops: those with the smallest probability, or the last ones."""
    moe_would_drop_capacity_factor: PositiveFloat = 1.0
    """Dropless runs report the drop rate that this capacity factor would have caused
    (`moe/would_drop_rate`)."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens travel to the ranks of their experts."""


class Parallel(Section):
    """How the model and the batch are spread over ranks: ranks = TP x PP x CP x DP."""

    tensor_model_parallel_size: PositiveInt = 1
    """TP: ranks that share each attention and dense matrix."""
    pipeline_model_parallel_size: PositiveInt = 1
    """PP: pipeline stages."""
    virtual_pipeline_model_parallel_size: PositiveInt | None = None
    """VPP: model chunks a pipeline rank (interleaved schedule). Default: 1, the plain 1F1B schedule."""
    context_parallel_size: PositiveInt = 1
    """CP: ranks that share each sequence."""
    expert_model_parallel_size: PositiveInt | None = None
    """EP: ranks that share the experts. Default: TP, which is Expert Data Parallelism (EDP); 1 without
    experts."""
    expert_tensor_parallel_size: PositiveInt | None = None
    """ETP: ranks that share each expert's matrices. Default: 1 (it does not inherit TP)."""
    data_parallel_size: PositiveInt | None = None
    """DP: replicas. Default: under torchrun or srun what the number of ranks leaves, alone the smallest that
    EP allows."""
    sequence_parallel: bool | None = None
    """Shard the sequence over the TP ranks between the tensor-parallel regions. Default: TP > 1."""


class Pipeline(Section):
    """Which layers each pipeline stage holds."""

    layers_per_stage: list[NonNegativeInt] | None = None
    """Layers of each of the PP x VPP stages, in the order in which a token passes them. Default: even."""


class Recompute(Section):
    """Which layers are recomputed in the backward pass instead of keeping their activations."""

    layers_per_stage: list[NonNegativeInt] | None = None
    """Recomputed layers of each pipeline rank (PP entries; within VPP of each chunk of that rank). Default:
    none."""
    method: Literal["block", "uniform"] = "block"
    """`block` recomputes the first n layers of a stage, each by itself; `uniform` recomputes every layer of
    the stage, in groups of n that keep only their input."""


class Tokenizer(Section):
    """How text becomes token ids."""

    kind: Literal["sentencepiece", "bytes"] = "sentencepiece"
    """`sentencepiece` BPE, or raw UTF-8 `bytes` (ids 0-255, 256 ends a document)."""
    model: InputPath | None = None
    """A sentencepiece model file. Default: trained on data.prepare.input."""
    vocab_size: PositiveInt | None = None
    """Ids of a sentencepiece model that is trained here."""


class Prepare(Section):
    """Raw text from which `train` and `verify` make the token files themselves, once, before any rank
    starts."""

    input: Annotated[list[InputPath], Field(min_length=1)]
    """Text (.txt) or jsonl files, also .gz."""
    json_key: str = "text"
    """The key of a jsonl record that holds the text."""
    documents: Literal["file", "line", "paragraph"] = "file"
    """What one document is in a text file: the file, a line, or what stands between blank lines. A jsonl
    record is one document."""
    append_eod: bool = True
    """Put the end-of-document id behind each document."""


class Data(Section):
    """What the model reads."""

    kind: Literal["pretraining", "mock"] = "pretraining"
    """`pretraining` reads token files; `mock` makes random tokens for benchmarks."""
    path: InputPath | None = None
    """Token files in Megatron's format, without .bin/.idx. Default: made from data.prepare."""
    prepare: Prepare | None = None
    """Raw text to make the token files from."""
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    """The tokenizer; its hash must be that of the token files."""
    split: Annotated[list[NonNegativeFloat], Field(min_length=2, max_length=3)] = [95.0, 5.0]
    """Weights of the training, validation (and test) parts, by documents in file order."""


class Optimizer(Section):
    """Adam with decoupled weight decay, its state sharded over the data-parallel ranks, and the learning-rate
    schedule."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the decay, and after it."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
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


class Training(Section):
    """How long, how much at once, and in which precision."""

    train_iters: PositiveInt
    """Optimizer steps in all."""
    global_batch_size: PositiveInt
    """Sequences a step, over all replicas and microbatches."""
    micro_batch_size: PositiveInt = 1
    """Sequences b that one replica runs at once."""
    seq_length: PositiveInt
    """Tokens s a sequence."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 1234
    """Seeds weights, data order and dropout."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`bf16` keeps fp32 master weights. `auto`: bf16 on a GPU with bf16 units, else fp32."""
    eval_interval: PositiveInt | None = None
    """Evaluate on the validation part every so many iterations, and at the end. Default: never."""
    eval_iters: PositiveInt = 10
    """Global batches an evaluation."""


class Checkpoint(Section):
    """What is saved, and how often."""

    save_interval: PositiveInt | None = None
    """Save every so many iterations. The end of a run is always saved. Default: only the end."""
    keep: PositiveInt | None = None
    """Checkpoints to keep, the newest ones. Default: all."""


class Logging(Section):
    """Where the run folder lies and what is written to it."""

    root: Annotated[str, Field(min_length=1)] = "runs"
    """Run folders are made here, relative to the working directory: `<root>/<name>`."""
    detail_interval: PositiveInt = 10
    """Every so many iterations metrics.jsonl also holds lists with one entry a layer."""


class Launch(Section):
    """How ranks are started."""

    threads_per_rank: PositiveInt | None = None
    """CPU threads a rank that is started here computes with. Default: the machine's cores divided by the
    ranks, at least 1."""


class Resilience(Section):
    """What happens when something breaks."""

    collective_timeout_s: Annotated[int, Field(ge=1, le=365 * 24 * 3600)] = 600
    """A rank that waits longer than this for the others gives up with an error."""


class Experiment(Section):
    """One experiment: what `megatron-moe` commands take as CONFIG."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Names the run folder. Letters, digits, `.`, `_` and `-`."""
    model: Model
    moe: MoE | None = None
    parallel: Parallel = Field(default_factory=Parallel)
    pipeline: Pipeline = Field(default_factory=Pipeline)
    recompute: Recompute = Field(default_factory=Recompute)
    data: Data = Field(default_factory=Data)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    training: Training
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    logging: Logging = Field(default_factory=Logging)
    launch: Launch = Field(default_factory=Launch)
    resilience: Resilience = Field(default_factory=Resilience)
