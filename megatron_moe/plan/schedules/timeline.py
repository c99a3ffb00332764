"""What a simulated schedule does, when."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.plan.schedules.orders import Kind


@dataclass(frozen=True)
class Extent:
    """One iteration of a pipeline as a whole.

    Attributes:
        makespan_s: from the start of the first pass to the end of the last.
        idle_s: of each rank, within the makespan.
        peak_in_flight: of each rank, the most passes forward through one of its stages whose activations wait
            at once for their last backward pass.
        peak_kept_bytes: of each rank, the most that these activations take up at once.
        transfer_s: of each rank, how long it sends to other ranks, under its computation or not.
    """

    makespan_s: float
    idle_s: tuple[float, ...]
    peak_in_flight: tuple[int, ...]
    peak_kept_bytes: tuple[float, ...]
    transfer_s: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """The part of the makespan that a rank is idle, on average over ranks."""
        if not self.makespan_s:
            return 0.0
        return sum(self.idle_s) / (len(self.idle_s) * self.makespan_s)


@dataclass(frozen=True)
class LeftOut:
    """The part of a long iteration that has no passes in a timeline, because it repeats those before it.

    Attributes:
        start_s: passes that start before have their place before it, the others behind it.
        seconds: how much later these start.
        microbatches: by how many more they are numbered.
    """

    start_s: float
    seconds: float
    microbatches: int


@dataclass(frozen=True)
class Timeline(Extent):
    """One iteration of a pipeline pass by pass. Passes stand in columns of equal length, rank by rank, on
    each rank in the order in which it runs them.

    Attributes:
        pipeline_ranks, stages, microbatches, kinds: of each pass.
        starts_s, ends_s: of each pass, from the start of the first one.
        left_out: None where all passes are there.
    """

    pipeline_ranks: list[int]
    stages: list[int]
    microbatches: list[int]
    kinds: list[Kind]
    starts_s: list[float]
    ends_s: list[float]
    left_out: LeftOut | None = None
