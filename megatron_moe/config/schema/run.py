"""The sections around a run: `checkpoint`, `logging`, `launch` and `resilience`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_moe.config.schema.section import (
    Amount,
    InputPath,
    PositiveInt,
    RankCount,
    Rate,
    Section,
    Share,
)


class Checkpoint(Section):
    """What is saved, and how often."""

    save_interval: PositiveInt | None = None
    """Save every so many iterations. The end of a run is always saved. Default: only the end."""
    keep: PositiveInt | None = None
    """Checkpoints to keep, the newest ones. Default: all."""
    initialize_from: InputPath | None = None
    """Where the first weights come from: an imported folder, a checkpoint, a run folder (its newest
    checkpoint) or a Hugging Face folder. Optimizer and data begin anew. A run that has checkpoints of its own
    goes on from those. Default: weights are drawn."""


class WandB(Section):
    """A Weights & Biases run; a resumed run goes on under the same id, which lies in the run folder. The
    environment variable WANDB_MODE (online, offline or disabled) comes before `mode`."""

    project: Annotated[str, Field(min_length=1)]
    """Project of the run; the run is called like the experiment."""
    entity: Annotated[str, Field(min_length=1)] | None = None
    """User or team that owns the project. Default: the account's."""
    mode: Literal["online", "offline"] = "online"
    """`offline` keeps everything in the run folder, for `wandb sync`. `online` needs `wandb login` once;
    where it cannot send, training goes on without it."""


class Logging(Section):
    """Where the run folder lies and what is written to it."""

    root: Annotated[str, Field(min_length=1)] = "runs"
    """Run folders are made here, relative to the working directory: `<root>/<name>`."""
    detail_interval: PositiveInt = 10
    """Every so many iterations metrics.jsonl also holds lists with one entry a layer, and the log says how
    much of the experts' communication was hidden."""
    expert_similarity: bool = False
    """With these lists, also how alike the experts of each layer are: the mean cosine between the weights of
    two of them. What upcycled experts have in common falls as they specialise."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, to `tensorboard/` in the run folder. Needs
    `pip install 'megatron-moe[tensorboard]'`."""
    wandb: WandB | None = None
    """Also send the metrics to Weights & Biases. Leave the section out for none."""
    timeline_iter: PositiveInt | None = None
    """Iteration whose timeline every rank measures, written to `timeline.json` in the run folder in Chrome's
    trace format, as `plan --trace` writes the planned one. Default: none."""
    curves: bool = True
    """Draw loss, learning rate and drop rate to `curves.png` in the run folder when the run ends."""


class Cluster(Section):
    """The machines, as the planner sees them. What is left out comes from the preset."""

    preset: Literal["this-machine", "a100", "a800", "h100", "h800", "h200", "b200", "rtx4090"] = (
        "this-machine"
    )
    """Machines whose figures are known (`config/clusters/`), a node with 8 GPUs of one kind each;
    `this-machine`: this node, its GPUs by name (an unknown one is planned as an A100), or without GPU its
    processor and memory, shared by the ranks."""
    gpus_per_node: RankCount | None = None
    """Ranks of a node, which the fast links join. Default: the preset's; on a machine without GPU all
    ranks."""
    memory_gib: Rate | None = None
    """Memory of a GPU, in GiB; on a machine without, of a rank: its share of the memory that there is.
    Default: the preset's, none where the machine does not tell."""
    reserved_gib: Amount | None = None
    """What of it is not to be planned with, in GiB: context, communication buffers, fragmentation. Default:
    the preset's; on a machine without GPU what a process takes by itself, or 0 beside memory_gib."""
    peak_tflops: Rate | None = None
    """Dense peak of the matrix units in the precision of training, in TFLOP/s. Default: the preset's in
    training.precision (`auto`: bf16 on a GPU, else fp32) and training.fp8."""
    peak_fp32_tflops: Rate | None = None
    """Peak in float32, in which routers compute whatever training.precision is. Default: the preset's."""
    achievable_fraction: Share | None = None
    """Part of the peak that large matrix products reach. Default: the preset's."""
    attention_fraction: Share | None = None
    """Part of the peak in 16 bits (under FP8 half of peak_tflops) that attention scores reach. Default: the
    preset's."""
    matrix_padding: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """Each of the three sizes of a matrix product costs as if it were so many larger: what small products
    lose. Default: the preset's."""
    memory_bandwidth_gb_s: Rate | None = None
    """Of a GPU's memory, in GB/s. Default: the preset's."""
    memory_fraction: Share | None = None
    """Part of it that norms, activations and the like reach. Default: the preset's."""
    kernel_us: Amount | None = None
    """What a kernel takes beside its work, in microseconds. Default: the preset's."""
    host_us: Amount | None = None
    """What the host takes to launch an operation, in microseconds: a layer takes at least that for all of its
    own. Default: the preset's."""
    intra_node_gb_s: Rate | None = None
    """From a GPU to the others of its node, one direction, in GB/s. Default: the preset's."""
    intra_node_latency_us: Amount | None = None
    """Of a message within a node, in microseconds. Default: the preset's."""
    inter_node_gb_s: Rate | None = None
    """From a GPU to other nodes, one direction, in GB/s: the node's links divided by its GPUs. Default: the
    preset's."""
    inter_node_latency_us: Amount | None = None
    """Of a message between nodes, in microseconds. Default: the preset's."""
    network_fraction: Share | None = None
    """Part of the links' bandwidth that collectives reach. Default: the preset's."""
    all_to_all_fraction: Share | None = None
    """Part of it that the experts' all-to-all reaches. Default: the preset's."""
    overlap_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """Part of the time of communication under computation that is saved; the rest it takes from computation.
    Default: the preset's."""


class Launch(Section):
    """How ranks are started, and on what."""

    cluster: Cluster = Field(default_factory=Cluster)
    profile: InputPath | None = None
    """Times and activation bytes that `megatron-moe profile` measured, for the planner. Default:
    `profile.json` in the run folder, if it is there and holds for the layout."""
    expert_imbalance: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.1
    """Load of the fullest expert rank over the mean that the planner counts with, where nothing is dropped.
    1: even."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads a rank that is started here computes with. Default: the machine's cores divided by the
    ranks, at least 1."""


class Resilience(Section):
    """What happens when something breaks."""

    collective_timeout_s: Annotated[int, Field(ge=1, le=365 * 24 * 3600)] = 600
    """A rank that waits longer than this for the others gives up with an error."""
