"""The sections around a run: `checkpoint`, `logging`, `launch` and `resilience`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_moe.config.schema.section import PositiveInt, Section


class Checkpoint(Section):
    """What is saved, and how often."""

    save_interval: PositiveInt | None = None
    """Save every so many iterations. The end of a run is always saved. Default: only the end."""
    keep: PositiveInt | None = None
    """Checkpoints to keep, the newest ones. Default: all."""


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
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, to `tensorboard/` in the run folder. Needs
    `pip install 'megatron-moe[tensorboard]'`."""
    wandb: WandB | None = None
    """Also send the metrics to Weights & Biases. Leave the section out for none."""
    curves: bool = True
    """Draw loss, learning rate and drop rate to `curves.png` in the run folder when the run ends."""


class Launch(Section):
    """How ranks are started."""

    threads_per_rank: PositiveInt | None = None
    """CPU threads a rank that is started here computes with. Default: the machine's cores divided by the
    ranks, at least 1."""


class Resilience(Section):
    """What happens when something breaks."""

    collective_timeout_s: Annotated[int, Field(ge=1, le=365 * 24 * 3600)] = 600
    """A rank that waits longer than this for the others gives up with an error."""
