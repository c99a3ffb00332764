"""Which rank sits where: the grid of ranks, its groups, and the experts that each rank holds.

The order is Megatron-Core's "tp-cp-ep-dp-pp". Attention and dense layers see one grid, the experts another
one over the same ranks (R: the expert-data-parallel size):

    rank = tp + TP * (cp + CP * (dp + DP * pp))
    rank = expert_tp + ETP * (ep + EP * (expert_dp + R * pp))

Rules for users live in `config.rules`; what is asserted here is what they guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, get_args

from megatron_moe.config.schema import Experiment

GroupKind = Literal[
    "tp", "pp", "cp", "dp", "dp_cp", "tp_cp", "tp_dp_cp", "ep", "expert_tp", "expert_dp", "tp_ep", "embedding"
]
GROUP_KINDS: tuple[GroupKind, ...] = get_args(GroupKind)

_ATTENTION_AXES: dict[GroupKind, tuple[str, ...]] = {
    "tp": ("tp",),
    "pp": ("pp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "dp_cp": ("dp", "cp"),
    "tp_cp": ("tp", "cp"),
    "tp_dp_cp": ("tp", "dp", "cp"),
}
_EXPERT_AXES: dict[GroupKind, tuple[str, ...]] = {
    "ep": ("ep",),
    "expert_tp": ("expert_tp",),
    "expert_dp": ("expert_dp",),
    "tp_ep": ("expert_tp", "ep"),
}

_SHORT = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "VPP",
    "context_parallel_size": "CP",
    "data_parallel_size": "DP",
    "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
}


class Coordinates(NamedTuple):
    """One rank's position on every axis of both grids."""

    tp: int
    cp: int
    dp: int
    pp: int
    expert_tp: int
    ep: int
    expert_dp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of all parallel axes. The expert-data-parallel size follows from the others."""

    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int
    context_parallel_size: int
    expert_model_parallel_size: int
    expert_tensor_parallel_size: int
    data_parallel_size: int

    def __post_init__(self) -> None:
        expert_ranks = self.expert_model_parallel_size * self.expert_tensor_parallel_size
        assert self._ranks_per_stage % expert_ranks == 0, (
            f"EP x ETP = {expert_ranks} does not divide TP x CP x DP = {self._ranks_per_stage}"
        )

    @classmethod
    def of(cls, experiment: Experiment) -> Layout:
        """The layout of a filled experiment."""
        parallel = experiment.parallel
        assert parallel.expert_model_parallel_size is not None
        assert parallel.expert_tensor_parallel_size is not None
        assert parallel.data_parallel_size is not None
        return cls(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size or 1,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            data_parallel_size=parallel.data_parallel_size,
        )

    @property
    def _ranks_per_stage(self) -> int:
        return self.tensor_model_parallel_size * self.context_parallel_size * self.data_parallel_size

    @property
    def world_size(self) -> int:
        """Ranks in all: TP x CP x DP x PP."""
        return self._ranks_per_stage * self.pipeline_model_parallel_size

    @property
    def expert_data_parallel_size(self) -> int:
        """Replicas of each expert within one pipeline stage: TP x CP x DP / (EP x ETP)."""
        return self._ranks_per_stage // (self.expert_model_parallel_size * self.expert_tensor_parallel_size)

    @property
    def num_stages(self) -> int:
        """Pipeline stages that a token passes: PP x VPP."""
        return self.pipeline_model_parallel_size * self.virtual_pipeline_model_parallel_size

    @property
    def axes(self) -> str:
        """The axes with more than one rank or stage: `TP 2, EP 2`; empty for one rank."""
        return ", ".join(f"{_SHORT[key]} {size}" for key, size in asdict(self).items() if size > 1)

    @property
    def _attention_grid(self) -> dict[str, int]:
        """Axes and sizes, the fastest varying axis first."""
        return {
            "tp": self.tensor_model_parallel_size,
            "cp": self.context_parallel_size,
            "dp": self.data_parallel_size,
            "pp": self.pipeline_model_parallel_size,
        }

    @property
    def _expert_grid(self) -> dict[str, int]:
        return {
            "expert_tp": self.expert_tensor_parallel_size,
            "ep": self.expert_model_parallel_size,
            "expert_dp": self.expert_data_parallel_size,
            "pp": self.pipeline_model_parallel_size,
        }

    @property
    def expert_span(self) -> dict[str, int]:
        """TP, CP and DP ranks that the ranks which together hold each expert once lie on, at most."""
        together = self.expert_model_parallel_size * self.expert_tensor_parallel_size
        # They are neighbours, and after so many ranks the pattern begins again.
        period = math.lcm(together, self.tensor_model_parallel_size * self.context_parallel_size)
        places = [self.coordinates(rank) for rank in range(period)]
        groups = [places[first : first + together] for first in range(0, period, together)]
        axes = {"TP": "tp", "CP": "cp", "DP": "dp"}
        return {
            name: max(len({getattr(place, axis) for place in group}) for group in groups)
            for name, axis in axes.items()
        }

    @property
    def experts_cross_replicas(self) -> bool:
        """Whether tokens travel between data-parallel replicas to reach their experts."""
        return self.expert_span["DP"] > 1

    def groups(self, kind: GroupKind) -> list[list[int]]:
        """All groups of one kind, members and groups in Megatron-Core's order.

        `tp_ep` spans the experts' tensor and model parallel ranks; `embedding` is the first and the last
        stage of each pipeline, so that ranks between them are in no group.
        """
        if kind == "embedding":
            return [sorted({ranks[0], ranks[-1]}) for ranks in self.groups("pp")]
        if kind in _ATTENTION_AXES:
            return _orthogonal_groups(self._attention_grid, _ATTENTION_AXES[kind])
        return _orthogonal_groups(self._expert_grid, _EXPERT_AXES[kind])

    def coordinates(self, rank: int) -> Coordinates:
        """The position of a rank in [0, world_size)."""
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        return Coordinates(**{**_position(rank, self._attention_grid), **_position(rank, self._expert_grid)})

    def experts_of(self, rank: int, num_experts: int) -> range:
        """The experts of each MoE layer that a rank holds, a part of each if ETP > 1. EP must divide them."""
        count, rest = divmod(num_experts, self.expert_model_parallel_size)
        assert rest == 0, f"{num_experts} experts over EP = {self.expert_model_parallel_size}"
        first = self.coordinates(rank).ep * count
        return range(first, first + count)


def _position(rank: int, grid: dict[str, int]) -> dict[str, int]:
    position = {}
    for axis, size in grid.items():
        rank, position[axis] = divmod(rank, size)
    return position


def _orthogonal_groups(grid: dict[str, int], together: Collection[str]) -> list[list[int]]:
    """One group for each position on the axes outside `together`; its members run over the axes inside."""
    members, starts = [0], [0]
    stride = 1
    for axis, size in grid.items():
        steps = range(0, size * stride, stride)
        if axis in together:
            members = [step + rank for step in steps for rank in members]
        else:
            starts = [step + rank for step in steps for rank in starts]
        stride *= size
    return [[start + rank for rank in members] for start in starts]
