"""What a token's journey to its experts and back costs, in rows and bytes, by dispatcher.

Counted is what a rank sends to others for each of its tokens, forward, in one MoE layer; backward sends the
same again. Averages over even routing: every choice of k experts equally likely. R = EP x ETP ranks hold each
expert once, and each rank holds L = e / EP experts or parts of them. A token goes to

    alltoall        k / EP                        copies to each rank
    deduplicated    P = 1 - C(e - L, k) / C(e, k) of the ranks, once (those that hold any of its experts)
    allgather       1                             copy to each rank

and R - 1 of the ranks are others. With ETP 1 that makes k h (R - 1) / R elements there and as many back for
alltoall, and h (R - 1) each way for allgather (the counts of the Skywork-MoE report, appendix B.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import Any, Literal

from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.moe import MoE
from megatron_moe.plan.costs.precision import element_size

Name = Literal["alltoall", "allgather", "deduplicated"]

COUNT_BYTES = 8
"""Of a number of rows that one rank tells another."""


@dataclass(frozen=True)
class Journey:
    """The costs of one dispatcher."""

    dispatcher: str
    rows: float
    """Rows of hidden_size elements sent to other ranks, there and back."""
    elements: float
    """What these hold."""
    bytes: float
    """With gate weights and numbers of experts, which travel beside the tokens on the way there."""
    bytes_between_nodes: float | None
    """Those of `bytes` that leave the node; None where `moe.moe_ranks_per_node` is not set."""
    bytes_a_microbatch: int
    """What a rank sends beside that, however many tokens: how many rows are to be expected, which under
    allgather only a host compares."""


@dataclass(frozen=True)
class Choice:
    """Which dispatcher an experiment takes, and what that and the others cost.

    Attributes:
        element_size: bytes of an element of a token.
        journeys: empty where all experts are on one rank.
    """

    dispatcher: str
    element_size: int
    journeys: tuple[Journey, ...]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Choice:
        """What `asdict` made a record of."""
        journeys = tuple(Journey(**journey) for journey in record["journeys"])
        return cls(record["dispatcher"], record["element_size"], journeys)


@dataclass(frozen=True)
class Ranks:
    """What the journeys depend on of a layout.

    Attributes:
        expert: EP.
        expert_tensor: ETP.
        in_node: consecutive ranks of a node, for an all-to-all in two levels; None: one level.
    """

    expert: int
    expert_tensor: int
    in_node: int | None = None

    @property
    def together(self) -> int:
        """R."""
        return self.expert * self.expert_tensor


def journeys(moe: MoE, hidden_size: int, element_size: int, ranks: Ranks) -> list[Journey]:
    """The costs of each dispatcher, of two that cost the same the simpler one first. Empty where all experts
    are on one rank.

    Args:
        element_size: bytes of an element of a token.
    """
    if ranks.together == 1:
        return []
    names: list[Name] = ["alltoall", "allgather", "deduplicated"]
    if ranks.in_node is not None:
        names.remove("allgather")
    return [_journey(name, moe, hidden_size, element_size, ranks) for name in names]


def taken(moe: MoE, hidden_size: int, element_size: int, ranks: Ranks) -> str:
    """The dispatcher that the settings take: the named one, or under `auto` the one that sends the fewest
    bytes a token."""
    name = moe.moe_token_dispatcher_type
    if name != "auto" or ranks.together == 1:
        return "alltoall" if name == "auto" else name
    return min(journeys(moe, hidden_size, element_size, ranks), key=lambda journey: journey.bytes).dispatcher


def choice(experiment: Experiment) -> Choice:
    """What a filled experiment with experts takes."""
    parallel, moe = experiment.parallel, experiment.moe
    assert moe is not None
    assert parallel.expert_model_parallel_size is not None
    assert parallel.expert_tensor_parallel_size is not None
    ranks = Ranks(
        parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size, moe.moe_ranks_per_node
    )
    sizes = experiment.model.hidden_size, element_size(experiment)
    return Choice(taken(moe, *sizes, ranks), sizes[1], tuple(journeys(moe, *sizes, ranks)))


def _journey(name: Name, moe: MoE, hidden_size: int, element_size: int, ranks: Ranks) -> Journey:
    e, k, together = moe.num_moe_experts, moe.moe_router_topk, ranks.together
    here = e // ranks.expert
    weight_size = 8 if moe.moe_router_dtype == "fp64" else 4
    # Beside a copy for one expert travels its gate weight; beside one for a rank all k, and k numbers.
    beside = weight_size if name == "alltoall" else 2 * k * weight_size
    to_each = {
        "alltoall": k / ranks.expert,
        "allgather": 1.0,
        "deduplicated": 1 - comb(e - here, k) / comb(e, k),
    }
    told = {"alltoall": here, "allgather": 1, "deduplicated": 1}[name]
    counts = told * (together - 1)
    row = 2 * hidden_size * element_size + beside
    rows, between = to_each[name] * (together - 1), None
    if ranks.in_node is not None:
        nodes = together // ranks.in_node
        between = to_each[name] * (together - ranks.in_node)
        # Rows for another place in the node go there first, then those for another node to that node.
        rows = to_each[name] * (together - nodes) + between
        exchanges = 1 + 3 * (moe.moe_overlap_degree if name == "alltoall" else 1)
        counts = told * (together - nodes + together - ranks.in_node)
        counts += exchanges * (ranks.in_node - 1) * nodes
    return Journey(
        dispatcher=name,
        rows=2 * rows,
        elements=2 * rows * hidden_size,
        bytes=rows * row,
        bytes_between_nodes=None if between is None else between * row,
        bytes_a_microbatch=counts * COUNT_BYTES,
    )
