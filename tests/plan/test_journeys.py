"""What a token's way to its experts costs, against the published counts and against counting by hand."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
from plan_experiments import filled

from megatron_moe.config.schema.moe import MoE
from megatron_moe.plan import plan
from megatron_moe.plan.journeys import Journey, Ranks, journeys, taken
from megatron_moe.plan.show import command

HIDDEN = 64


def moe(experts: int, k: int, dispatcher: str = "alltoall", **more: object) -> MoE:
    return MoE.model_validate(
        {
            "num_moe_experts": experts,
            "moe_router_topk": k,
            "moe_token_dispatcher_type": dispatcher,
            **more,
        }
    )


def costs(experts: int, k: int, ranks: Ranks) -> dict[str, Journey]:
    return {one.dispatcher: one for one in journeys(moe(experts, k), HIDDEN, 2, ranks)}


@pytest.mark.parametrize(("k", "n"), [(1, 2), (2, 4), (8, 4), (2, 2)])
def test_elements_are_those_of_the_skywork_report(k: int, n: int) -> None:
    """t tokens of a replica over n ranks: 2 k t h (n - 1) / n^2 against 2 t h (n - 1) / n, ratio k / n."""
    t, found = 1000, costs(16, k, Ranks(n, 1))
    assert found["alltoall"].elements * t / n == pytest.approx(2 * k * t * HIDDEN * (n - 1) / n**2)
    assert found["allgather"].elements * t / n == pytest.approx(2 * t * HIDDEN * (n - 1) / n)
    assert found["alltoall"].elements / found["allgather"].elements == pytest.approx(k / n)


@pytest.mark.parametrize("ranks", [Ranks(4, 1), Ranks(2, 2), Ranks(4, 1, 2), Ranks(2, 2, 2), Ranks(4, 2, 4)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_rows_by_following_every_choice_of_experts(ranks: Ranks, k: int) -> None:
    """One token of rank 0 for every choice."""
    e, node = 8, ranks.in_node or ranks.together
    here = e // ranks.expert
    choices = list(itertools.combinations(range(e), k))
    copies, once = 0, 0
    for start in range(ranks.together):
        for choice in choices:
            goals = [
                expert // here * ranks.expert_tensor + part
                for expert in choice
                for part in range(ranks.expert_tensor)
            ]
            copies += sum(steps(start, goal, node) for goal in goals)
            once += sum(steps(start, goal, node) for goal in set(goals))
    found, count = costs(e, k, ranks), len(choices) * ranks.together
    assert found["alltoall"].rows == pytest.approx(2 * copies / count)
    assert found["deduplicated"].rows == pytest.approx(2 * once / count)


def steps(start: int, goal: int, node: int) -> int:
    """How often a row is sent: to the goal's place in its own node, then to the goal's node."""
    between = start // node * node + goal % node
    return (start != between) + (between != goal)


def test_traffic_of_the_deduplicated_does_not_grow_beyond_the_ranks() -> None:
    for k in range(1, 65):
        found = costs(64, k, Ranks(4, 1))
        assert found["deduplicated"].elements <= min(
            found["alltoall"].elements, found["allgather"].elements
        ) * (1 + 1e-12)
    assert (
        costs(64, 64, Ranks(4, 1))["deduplicated"].elements == costs(64, 1, Ranks(4, 1))["allgather"].elements
    )


@pytest.mark.parametrize(
    ("experts", "k", "ranks", "name"),
    [
        (16, 1, Ranks(4, 1), "alltoall"),
        (64, 8, Ranks(8, 1), "deduplicated"),
        (8, 8, Ranks(4, 1), "allgather"),
        (8, 8, Ranks(4, 1, 2), "deduplicated"),
        (8, 2, Ranks(1, 1), "alltoall"),
    ],
    ids=["one expert", "many", "all", "all, two levels", "one rank"],
)
def test_auto_takes_the_cheapest(experts: int, k: int, ranks: Ranks, name: str) -> None:
    assert taken(moe(experts, k, "auto"), 4096, 2, ranks) == name


def test_a_named_dispatcher_is_taken_whatever_it_costs() -> None:
    assert taken(moe(64, 8, "allgather"), 4096, 2, Ranks(8, 1)) == "allgather"


def parallel(tp: int = 1, cp: int = 1, dp: int = 1, ep: int = 1, etp: int = 1) -> dict[str, object]:
    return {
        "tensor_model_parallel_size": tp,
        "context_parallel_size": cp,
        "data_parallel_size": dp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }


@pytest.mark.parametrize(
    ("axes", "text", "leaves"),
    [
        (parallel(tp=2, dp=2, ep=2), "EP 2 lies over TP 2 (Expert Data Parallelism): no token leaves", False),
        (parallel(cp=2, ep=2), "EP 2 lies over CP 2: no token leaves", False),
        (parallel(tp=2, dp=2, ep=4), "EP 4 lies over TP 2 x DP 2: tokens travel between", True),
        (parallel(tp=2, cp=2, dp=2, ep=4, etp=2), "ETP x EP 8 lies over TP 2 x CP 2 x DP 2: tokens", True),
        (parallel(tp=3, dp=2, ep=2), "EP 2 lies over TP 2 x DP 2: tokens travel between", True),
        (parallel(tp=2, ep=1), "Every rank holds all experts: no token travels.", False),
    ],
    ids=["EDP", "over CP", "over DP", "over all", "across the border", "no EP"],
)
def test_the_plan_says_where_experts_lie(
    capsys: pytest.CaptureFixture[str], axes: dict[str, object], text: str, leaves: bool
) -> None:
    experiment = filled(parallel=axes, moe={"num_moe_experts": 8})
    command.run(SimpleNamespace(experiment=experiment), gpus=None, as_json=False)
    assert text in " ".join(capsys.readouterr().out.split())
    assert json.loads(plan.make(experiment).to_json())["tokens_leave_replica"] is leaves


@pytest.mark.parametrize(("preset", "element_size"), [("h100", 2), ("this-machine", 4)])
def test_the_plan_shows_the_taken_dispatcher_beside_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, preset: str, element_size: int
) -> None:
    monkeypatch.setattr("megatron_moe.config.clusters.this_machine.gpus", lambda: ())
    experiment = filled(
        parallel=parallel(tp=4, ep=4),
        moe={"moe_router_topk": 4, "moe_token_dispatcher_type": "auto"},
        launch={"cluster": {"preset": preset}},
    )
    command.run(SimpleNamespace(experiment=experiment), gpus=None, as_json=False)
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.split()}
    assert rows["deduplicated"][-1] == "taken" and rows["alltoall"][-1] != "taken"
    record = json.loads(plan.make(experiment).to_json())["dispatch"]
    by_name = {journey["dispatcher"]: journey for journey in record["journeys"]}
    assert record["dispatcher"] == "deduplicated"
    # 4 experts a token, 3 of 4 ranks are others, 64 elements, there and back.
    assert by_name["alltoall"]["elements"] == 4 * 3 / 4 * 64 * 2
    assert by_name["alltoall"]["bytes"] == element_size * by_name["alltoall"]["elements"] + 4 * 3 / 4 * 4


def test_a_plan_read_again_is_the_same() -> None:
    made = plan.make(filled(parallel=parallel(tp=2, ep=2)))
    assert plan.Plan.from_json(made.to_json()) == made
