"""What the planner foretells of a run: memory and time of each pipeline rank, speed, and what limits it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes on each GPU of one pipeline rank, by part, at the peak."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """Kept for the backward pass, of all microbatches in flight."""
    working: float
    """What the piece that needs most needs while it runs."""
    reserved: float
    """`launch.cluster.reserved_gib`."""
    limit: float | None
    """`launch.cluster.memory_gib`; None where it is not known."""

    @property
    def total(self) -> float:
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.working, self.reserved)
        return sum(parts)

    @property
    def headroom(self) -> float | None:
        """Bytes left; negative where it does not fit."""
        return None if self.limit is None else self.limit - self.total


@dataclass(frozen=True)
class RankForecast:
    """One pipeline rank, over all its model chunks."""

    pipeline_rank: int
    in_flight: int
    """Microbatches, of all chunks together, whose activations are kept at once, at most."""
    memory: MemoryForecast
    forward_s: float
    """Of one microbatch through all chunks of the rank."""
    backward_s: float
    """The same, recomputation included."""
    idle_s: float
    """Of an iteration's pipeline, in which the rank waits."""


@dataclass(frozen=True)
class Forecast:
    """One iteration, and the run.

    Attributes:
        pipeline_s: from the first forward to the last backward pass.
        bubble: part of the pipeline's time that ranks wait, the mean over ranks.
        transfer_s: sends between stages on the critical path of one microbatch there and back.
        exposed_all_to_all_s, hidden_all_to_all_s: of an iteration, on the rank with the most.
        gradient_s, optimizer_s: of an iteration, behind the pipeline: what is not hidden of the reduction of
            gradients and the gathering of weights; the update.
        iteration_s: all of it.
        model_flops_per_token: by `costs.FORMULA`.
        tokens_per_second_per_gpu: of the whole iteration.
        tflops_per_gpu: model TFLOP/s.
        mfu: of `launch.cluster.peak_tflops`; None where it is not known.
        days: for all iterations.
        limits: what limits speed or memory, a sentence each.
        source: where times come from.
    """

    ranks: tuple[RankForecast, ...]
    pipeline_s: float
    bubble: float
    transfer_s: float
    exposed_all_to_all_s: float
    hidden_all_to_all_s: float
    gradient_s: float
    optimizer_s: float
    iteration_s: float
    model_flops_per_token: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    mfu: float | None
    days: float
    limits: tuple[str, ...]
    source: str
