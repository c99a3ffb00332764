"""Multi-token prediction: its loss and gradients against the formulas, its metrics, its data."""

from __future__ import annotations

import metrics_on_ranks
import multi_token_on_ranks as on_ranks
import pytest
import torch
from deepseek_cases import LATENT
from distributed import ranks
from experiments import MOE, experiment, layout

from megatron_moe.data.further_tokens import with_further_tokens

TWO = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.6}
BIASED = {
    **MOE,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "seq_aux_loss",
}


def batch(length: int) -> dict[str, torch.Tensor]:
    """Of two sequences, one of which ends early."""
    generator = torch.Generator().manual_seed(7)
    names = ("tokens", "labels", "position_ids")
    found = {name: torch.randint(0, 250, (2, length), generator=generator) for name in names}
    mask = torch.ones(2, length)
    mask[1, length - 3 :] = 0
    return {**found, "loss_mask": mask}


@pytest.mark.second_pair
def test_loss_and_gradients_are_those_of_the_formulas() -> None:
    ((trained, written),) = ranks(1).run(
        on_ranks.trained_and_written_out, experiment(moe=None, model=TWO), batch(10)
    )
    assert trained[0] == pytest.approx(written[0], rel=1e-6)
    torch.testing.assert_close(trained[1], written[1], rtol=1e-6, atol=0)
    assert trained[2].keys() == written[2].keys()
    assert sum(name.startswith("mtp.layers.1.") for name in trained[2]) > 8
    for name, gradient in trained[2].items():
        difference = (gradient - written[2][name]).norm() / written[2][name].norm()
        assert difference < 1e-5, name


def test_documents_that_are_kept_apart_predict_nothing_of_each_other() -> None:
    ((packed, alone),) = ranks(1).run(
        on_ranks.packed_and_alone, experiment(moe=None, model=TWO), [5, 1, 2, 9]
    )
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)
    assert packed[3] < packed[1]


def test_metrics_are_the_same_in_every_layout(tmp_path) -> None:
    def records(name: str, parallel: dict, **sections) -> list[dict]:
        made = experiment(
            moe=BIASED, model=TWO, parallel=parallel, logging={"detail_interval": 1}, **sections
        )
        size = 1 if name == "alone" else 2
        return ranks(size).run(metrics_on_ranks.steps, made, tmp_path / name, 2, True)[0]

    alone = records("alone", layout(dp=1, expert_model_parallel_size=1))
    assert alone[0]["mtp/loss"] == pytest.approx(sum(alone[0]["mtp/per_depth/loss"]) / 2)
    assert len(alone[0]["mtp/per_depth/loss"]) == 2
    assert len(alone[0]["moe/per_layer/load_max_over_mean"]) == 6, "those of the further layers, too"
    cases = {"EDP": layout(tp=2), "PP2": layout(pp=2), "CP2": layout(cp=2), "DP2": layout(dp=2)}
    for name, parallel in cases.items():
        for mine, theirs in zip(records(name, parallel), alone, strict=True):
            for key in theirs.keys() - {"step_time_s", "tokens_per_second", "model_tflops_per_device"}:
                if key.startswith(("moe/", "mtp/", "loss", "grad_norm")):
                    assert mine[key] == pytest.approx(theirs[key], rel=1e-4), (name, key)


def test_the_loss_in_the_metrics_is_that_of_the_next_token(tmp_path) -> None:
    def first(name: str, **model) -> dict:
        made = experiment(model=model)
        return ranks(1).run(metrics_on_ranks.steps, made, tmp_path / name, 1, False)[0][0]

    with_further, without = first("with", mtp_num_layers=1), first("without")
    assert with_further["loss"] == pytest.approx(without["loss"], rel=1e-7)
    assert with_further["grad_norm"] > without["grad_norm"]
    assert "mtp/per_depth/loss" not in with_further and "mtp/loss" not in without


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": layout(tp=2, pp=2), "pipeline": {"layers_per_stage": [3, 1]}},
        {"parallel": layout(pp=4), "pipeline": {"layers_per_stage": "Ett|tt|mm|L"}},
        {"parallel": layout(pp=2, vpp=2, dp=2), "moe": {**MOE, "moe_layer_freq": [1, 1, 0, 0]}},
    ],
    ids=["TP2 PP2", "a stage of their own", "PP2 VPP2"],
)
def test_the_plan_counts_the_weights_that_are_built(sections) -> None:
    """But for the final norm, which is counted with the loss, and then stands behind the last layer."""
    made = experiment(**{"moe": MOE, "model": {**LATENT, **TWO}} | sections)
    final_norm = 0 if made.pipeline.layers_per_stage[-1] else made.model.hidden_size
    for counts in ranks(4).run(on_ranks.built_and_planned, made):
        assert all(abs(built - planned) in (0, final_norm) for built, planned in counts), counts


@pytest.mark.parametrize("apart", [False, True])
def test_further_tokens_of_padded_documents(apart: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    length, count = 12, 3
    given = {name: torch.randint(1, 90, (2, length), generator=generator) for name in ("tokens", "labels")}
    given["loss_mask"] = torch.randint(0, 2, (2, length), generator=generator).float()
    given["padding_mask"] = torch.rand(2, length, generator=generator) < 0.2
    if apart:
        given["document_starts"] = torch.rand(2, length, generator=generator) < 0.25
    found = with_further_tokens(given, count)
    for row in range(2):
        for place in range(length):
            for depth in range(1, count + 1):
                here = (row, place, depth - 1)
                there = place + depth < length
                if apart and there:
                    there = not given["document_starts"][row, place + 1 : place + depth + 1].any()
                if not there:
                    assert found["further_padding"][here] and not found["further_mask"][here]
                    continue
                for name in ("tokens", "labels"):
                    assert found[f"further_{name}"][here] == given[name][row, place + depth]
                assert found["further_mask"][here] == given["loss_mask"][row, place + depth]
                padding = given["padding_mask"][row, place] or given["padding_mask"][row, place + depth]
                assert bool(found["further_padding"][here]) == bool(padding)
