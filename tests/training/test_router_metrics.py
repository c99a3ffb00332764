"""What the router does, seen: against float64 numpy, in every layout, and where its logits break."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import metrics_on_ranks as on_ranks
import numpy as np
import pytest
from distributed import ranks
from experiments import MOE, experiment, layout
from training_runs import TIMES

LAYERS, E, K = 4, 8, 3
MIXED = {**MOE, "num_moe_experts": E, "moe_router_topk": K, "moe_layer_freq": [0, 0, 1, 1]}
MODELS: dict[str, dict[str, Any]] = {
    "dropless": MIXED | {"moe_would_drop_capacity_factor": 1.25},
    "drops": MIXED | {"moe_expert_capacity_factor": 0.75},
    "V-MoE": MIXED | {"moe_expert_capacity_factor": 0.75, "moe_token_drop_policy": "batch_priority"},
}


def made(moe: dict[str, Any], **sections: Any) -> Any:
    return experiment(moe, logging={"detail_interval": 1}, **sections)


def by_numpy(found: list[on_ranks.Seen], factor: float) -> dict[str, Any]:
    """Every metric from what the routers did."""
    of_layers: dict[int, list[on_ranks.Seen]] = defaultdict(list)
    for one in found:
        of_layers[one["layer"]].append(one)
    rows: dict[str, list[float]] = defaultdict(list)
    for _, microbatches in sorted(of_layers.items()):
        load, sums = np.zeros(E), defaultdict(float)
        for one in microbatches:
            valid = one["valid"]
            scores, chosen, kept = one["scores"][valid], one["experts"][valid], one["kept"][valid]
            counts, tokens = np.bincount(chosen.ravel(), minlength=E), int(valid.sum())
            ordered = -np.sort(-scores, axis=1)
            load += counts
            sums["dropped"] += (~kept).sum()
            sums["would drop"] += np.clip(counts - math.ceil(tokens * K / E * factor), 0, None).sum()
            sums["tokens"] += tokens
            sums["entropy"] -= (scores * np.log(scores)).sum()
            for rank in range(3):
                sums[f"top{rank + 1}"] += ordered[:, rank].sum()
            z = np.log(np.exp(one["logits"][valid]).sum(1))
            rows["z"].append((z**2).mean())
            rows["aux"].append(E * (counts / (tokens * K) * scores.mean(0)).sum())
        rows["drop_rate"].append(sums["dropped"] / load.sum())
        rows["would_drop_rate"].append(sums["would drop"] / load.sum())
        rows["load_max_over_mean"].append(load.max() / load.mean())
        rows["dead_experts"].append((load == 0).sum())
        rows["router_entropy"].append(sums["entropy"] / sums["tokens"])
        rows["top1_over_top2"].append(sums["top1"] / sums["top2"])
        rows["top2_over_top3"].append(sums["top2"] / sums["top3"])
    z, aux = np.mean(rows.pop("z")), np.mean(rows.pop("aux"))
    means = {f"moe/{name}": float(np.mean(values)) for name, values in rows.items() if "over_top" not in name}
    lists = {f"moe/per_layer/{name}": [None, None, *map(float, values)] for name, values in rows.items()}
    total = {"moe/z_loss": z, "moe/aux_loss": aux, "moe/dead_experts": sum(rows["dead_experts"])}
    return means | lists | total


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_against_numpy(name: str, padded: bool) -> None:
    """Layers of one microbatch have equally many assignments, so that the mean over layers is that over all
    of them. 8 sequences in microbatches of 2: four microbatches add up."""
    moe = MODELS[name]
    record, found = ranks(1).run(on_ranks.seen, made(moe), Path(), padded)[0]
    assert len(found) == 2 * 4
    expected = by_numpy(found, moe.get("moe_would_drop_capacity_factor", 1.0))
    if "moe_expert_capacity_factor" in moe:
        assert record["moe/drop_rate"] > 0.25
        expected = {key: value for key, value in expected.items() if "would_drop" not in key}
    for key, value in expected.items():
        if isinstance(value, list):
            assert [math.isnan(entry) for entry in record[key]] == [entry is None for entry in value], key
            record[key], value = record[key][2:], value[2:]
        assert record[key] == pytest.approx(value, rel=1e-6), key


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 x CP2, EP4": (4, {"parallel": layout(tp=2, cp=2, expert_model_parallel_size=4)}),
    "EP2 over DP2, first stage dense": (
        4,
        {"parallel": layout(pp=2, dp=2, expert_model_parallel_size=2)},
    ),
}


@pytest.mark.parametrize("layout_name", LAYOUTS)
@pytest.mark.parametrize("name", ["dropless", "V-MoE"])
def test_every_layout_measures_the_same_with_padding(name: str, layout_name: str) -> None:
    world, sections = LAYOUTS[layout_name]
    (expected,) = ranks(1).run(on_ranks.steps, made(MODELS[name]), Path(), 1, True)[0]
    for (record,) in ranks(world).run(on_ranks.steps, made(MODELS[name], **sections), Path(), 1, True):
        assert record.keys() - set(TIMES) == expected.keys() - set(TIMES)
        for key in expected.keys() - set(TIMES):
            assert record[key] == pytest.approx(expected[key], rel=1e-6, nan_ok=True), key


def test_figures_that_there_are_none_of() -> None:
    """Two experts have no third; one has no second either."""
    for experts, missing in ((2, ["top2_over_top3"]), (1, ["top1_over_top2", "top2_over_top3"])):
        moe = MOE | {"num_moe_experts": experts, "moe_router_topk": 1, "moe_router_pre_softmax": True}
        (record,) = ranks(1).run(on_ranks.steps, made(moe), Path(), 1, False)[0]
        for name in ("top1_over_top2", "top2_over_top3"):
            absent = [math.isnan(value) for value in record[f"moe/per_layer/{name}"]]
            assert absent == [name in missing] * LAYERS


def test_a_gate_without_logits_has_no_z_loss() -> None:
    moe = MOE | {"moe_router_gate": "hash", "moe_router_load_balancing_type": "none", "moe_z_loss_coeff": 0.0}
    (record,) = ranks(1).run(on_ranks.steps, made(moe), Path(), 1, False)[0]
    assert math.isnan(record["moe/z_loss"])
    assert record["moe/drop_rate"] == 0 and record["moe/load_max_over_mean"] >= 1


@pytest.mark.second_pair
@pytest.mark.parametrize("pre_softmax", [False, True])
def test_the_balancing_loss_is_megatron_cores(pre_softmax: bool) -> None:
    moe = MOE | {"moe_router_pre_softmax": pre_softmax, "moe_aux_loss_coeff": 0.25}
    recorded, taken, theirs = ranks(1).run(on_ranks.balancing_losses, experiment(moe), Path())[0]
    assert recorded == pytest.approx(theirs, rel=1e-6)
    assert taken == pytest.approx(theirs, rel=1e-6)
    assert 1.0 < recorded < 4.0


@pytest.mark.parametrize(
    ("world", "sections", "layer", "rank", "value"),
    [
        (1, {}, 2, 0, -math.inf),
        (2, {"parallel": layout(tp=2)}, 2, 1, math.nan),
        (2, {"parallel": layout(pp=2)}, 3, 1, math.inf),
        (1, {"recompute": {"layers_per_stage": [4]}}, 1, 0, math.nan),
    ],
    ids=["one", "EDP", "PP2", "recompute"],
)
def test_logits_that_are_not_finite_end_the_run_before_the_update(
    world: int, sections: dict[str, Any], layer: int, rank: int, value: float
) -> None:
    setup = experiment(MOE, **sections)
    for result in ranks(world).run(on_ranks.with_broken_logits, setup, Path(), layer, rank, value):
        assert (
            f"the router of layer {layer} got logits that are NaN or infinite on rank {rank}"
            in result["words"]
        )
        assert "no weight was updated" in result["words"] and "another name" in result["words"]
        assert not result["changed"] and result["iteration"] == 1


@pytest.mark.parametrize("world", [1, 2])
def test_drop_rate_of_evaluation(world: int) -> None:
    """With half the room that is needed at perfect balance at least half is dropped; training is dropless."""
    moe = MOE | {"moe_eval_capacity_factor": 0.5}
    setup = experiment(moe, training={"eval_interval": 2, "eval_iters": 1}, parallel=layout(tp=world))
    for evaluated, trained, rows in ranks(world).run(on_ranks.drops_of_evaluation, setup, Path()):
        assert evaluated.keys() == {"eval/loss", "eval/drop_rate"}
        assert 0.5 <= evaluated["eval/drop_rate"] < 1
        assert trained["moe/drop_rate"] == 0 and rows == [0] * LAYERS
