"""Every dispatcher computes what one process with all experts computes."""

from __future__ import annotations

from typing import Any

import dispatch_on_ranks as on_ranks
import pytest
import torch
from dispatch_on_ranks import Case
from distributed import RankError, ranks
from experiments import MOE, experiment, layout

from megatron_moe.config.schema.moe import MoE
from megatron_moe.plan.journeys import Ranks, journeys


def settings(dispatcher: str, experts: int = 4, k: int = 2, **more: Any) -> MoE:
    return MoE(num_moe_experts=experts, moe_router_topk=k, moe_token_dispatcher_type=dispatcher, **more)


NAMES = {"alltoall": "AllToAll", "allgather": "AllGather", "deduplicated": "Deduplicated"}
EVERY = pytest.mark.parametrize("dispatcher", NAMES)


def check(case: Case, name: str, meanwhile: bool = False) -> list[dict[str, Any]]:
    """Compare all ranks with one process; what each sent."""
    expected = on_ranks.alone(case, meanwhile)
    found = ranks(case.ep * case.etp).run(on_ranks.dispatched, case, meanwhile)
    for (taken, output, (tokens, weights, *_), _), (whole, (of_tokens, of_weights, *_)) in zip(
        found, expected, strict=True
    ):
        assert taken == name
        torch.testing.assert_close(output, whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tokens, of_tokens, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weights, of_weights, rtol=1e-12, atol=1e-12)
    counted = expected[:1] if case.replicated else expected
    for which in (2, 3):
        by_ranks = sum(gradients[which] for _, _, gradients, _ in found)
        by_one = sum(gradients[which] for _, gradients in counted)
        torch.testing.assert_close(by_ranks, by_one, rtol=1e-12, atol=1e-12)
    return [sent for *_, sent in found]


FOLDS = {"EP2": (2, 1), "ETP2": (1, 2), "EP4": (4, 1), "ETP2 x EP2": (2, 2)}


@EVERY
@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("kind", ["random", "drops", "one_rank"])
def test_a_dispatcher_computes_what_one_process_computes(dispatcher: str, fold: str, kind: str) -> None:
    ep, etp = FOLDS[fold]
    case = Case(settings(dispatcher, 8, 3), ep, etp, (10,) * (ep * etp), kind)
    check(case, NAMES[dispatcher], meanwhile=kind == "random")


@pytest.mark.parametrize("dispatcher", ["alltoall", "deduplicated"])
@pytest.mark.parametrize("tokens", [(5, 0), (0, 0), (0, 7)])
def test_a_rank_without_tokens(dispatcher: str, tokens: tuple[int, ...]) -> None:
    check(Case(settings(dispatcher), 2, 1, tokens), NAMES[dispatcher])


def test_no_rank_has_a_token() -> None:
    check(Case(settings("allgather"), 2, 1, (0, 0)), "AllGather")


@pytest.mark.parametrize("dispatcher", ["alltoall", "deduplicated"])
@pytest.mark.parametrize("fold", ["EP4", "ETP2 x EP2"])
@pytest.mark.parametrize(("kind", "tokens"), [("random", (7, 3, 0, 9)), ("drops", (5,) * 4)])
def test_two_levels(dispatcher: str, fold: str, kind: str, tokens: tuple[int, ...]) -> None:
    """Two nodes of two ranks."""
    moe = settings(dispatcher, 8, 3, moe_ranks_per_node=2)
    check(Case(moe, *FOLDS[fold], tokens, kind), NAMES[dispatcher], meanwhile=True)


@pytest.mark.parametrize("fold", ["EP2", "ETP2"])
def test_replicated_tokens_stay_where_they_are(fold: str) -> None:
    """Tensor parallelism without sequence parallelism."""
    case = Case(settings("alltoall"), *FOLDS[fold], (6, 6), "drops", replicated=True)
    rows = 6 * on_ranks.HIDDEN * 8
    for sent in check(case, "Replicated"):
        assert sent["forward"] == rows, "one all-reduce"


COUNTED = {
    "EP2": (Ranks(2, 1), 4, 2),
    "EP4": (Ranks(4, 1), 8, 3),
    "ETP2 x EP2": (Ranks(2, 2), 4, 2),
    "EP4, two nodes": (Ranks(4, 1, in_node=2), 4, 2),
    "ETP2 x EP2, two nodes": (Ranks(2, 2, in_node=2), 4, 3),
}


@pytest.mark.parametrize("which", COUNTED)
def test_the_bytes_that_are_sent_are_those_of_the_plan(which: str) -> None:
    """Even routing: each rank's tokens make every choice of experts once."""
    layout, experts, k = COUNTED[which]
    moe = settings("alltoall", experts, k, moe_router_dtype="fp64", moe_ranks_per_node=layout.in_node)
    tokens = len(torch.combinations(torch.arange(experts), k))
    for journey in journeys(moe, on_ranks.HIDDEN, 8, layout):
        named = moe.model_copy(update={"moe_token_dispatcher_type": journey.dispatcher})
        case = Case(named, layout.expert, layout.expert_tensor, (tokens,) * layout.together, "even")
        for sent in check(case, NAMES[journey.dispatcher]):
            assert sent["forward"] == pytest.approx(journey.bytes * tokens + journey.bytes_a_microbatch)
            assert sent["all"] == pytest.approx(2 * journey.bytes * tokens + journey.bytes_a_microbatch)


@pytest.mark.parametrize(
    ("experts", "k", "name"),
    [(4, 1, "AllToAll"), (8, 2, "Deduplicated"), (4, 4, "AllGather")],
    ids=["few experts a token", "some", "all"],
)
def test_auto_takes_what_sends_the_fewest_bytes(experts: int, k: int, name: str) -> None:
    check(Case(settings("auto", experts, k), 2, 1, (6, 6)), name)


@pytest.mark.parametrize("dispatcher", NAMES)
def test_under_edp_no_token_leaves_its_replica(dispatcher: str) -> None:
    """Two replicas of two tensor-parallel ranks: whatever is sent is sent inside one of them."""
    moe = {**MOE, "moe_token_dispatcher_type": dispatcher, "moe_expert_capacity_factor": 1.0}
    edp = experiment(moe, parallel=layout(tp=2, dp=2), model={"num_layers": 1})
    for rank, (sent, replicas, tokens) in enumerate(ranks(4).run(on_ranks.replica_traffic, edp)):
        mine = next(replica for replica in replicas if rank in replica)
        assert set().union(*sent) == mine
        assert sum(sent.values()) > tokens * 32 * 4 * 2, "a row there, and its gradient back"


def test_experts_spread_over_replicas_take_tokens_out_of_them() -> None:
    """What the test above would see."""
    spread = experiment(parallel=layout(tp=2, dp=2, expert_model_parallel_size=4), model={"num_layers": 1})
    for sent, replicas, _ in ranks(4).run(on_ranks.replica_traffic, spread):
        assert sent[0, 1, 2, 3] > 0
        assert {0, 1, 2, 3} not in replicas


@pytest.mark.second_pair
@pytest.mark.parametrize(
    "fold",
    [layout(tp=2), layout(tp=2, expert_model_parallel_size=1, expert_tensor_parallel_size=2)],
    ids=["EDP", "ETP2"],
)
def test_a_model_on_replicated_tokens_dispatches_none(fold: dict[str, Any]) -> None:
    """Inference: 7 places, which no two ranks could share evenly, without sequence parallelism."""
    moe = {**MOE, "moe_shared_expert_intermediate_size": 16}
    one = {"tensor_model_parallel_size": 1, "expert_model_parallel_size": 1, "expert_tensor_parallel_size": 1}
    alone = experiment(moe, parallel=fold | one, model={"num_layers": 1})
    ((_, expected),) = ranks(1).run(on_ranks.evaluated, alone)
    spread = experiment(moe, parallel=fold | {"sequence_parallel": False}, model={"num_layers": 1})
    for name, output in ranks(2).run(on_ranks.evaluated, spread):
        assert name == "Replicated"
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_unequal_ranks_are_told_that_allgather_needs_equal_ones() -> None:
    with pytest.raises(
        RankError,
        match=r"InputError: .*equally many tokens on all ranks, and they have \[5, 3\]; use alltoall",
    ):
        ranks(2).run(on_ranks.dispatched, Case(settings("allgather"), 2, 1, (5, 3)))
