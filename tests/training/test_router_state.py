"""What routers carry from one iteration to the next: adaptive coefficients, expert biases, the load of the
previous batch. The same in every layout, saved, and moved by updates only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import router_state_on_ranks as on_ranks
import torch
import train_on_ranks
from distributed import ranks
from experiments import MOE, experiment, layout
from layout_cases import verify
from loss_cases import ADAPTIVE, CARRIED, losses
from training_runs import assert_same, checkpoint, copy_until, records, tensors

EDP, PP2 = layout(tp=2), layout(pp=2)
DETAILED = {"detail_interval": 1}
COEFFICIENTS = "moe/per_layer/aux_loss_coeff"


def made(moe: dict[str, Any], **sections: Any):
    return experiment(moe, logging=DETAILED, **sections)


FOLLOWED = {
    "forced drops": ("drop_rate", {"moe_expert_capacity_factor": 0.5}),
    "dropless": ("would_drop_rate", {"moe_would_drop_capacity_factor": 0.8}),
}


@pytest.mark.second_pair
@pytest.mark.parametrize(
    ("name", "parallel"),
    [("forced drops", layout()), ("dropless", EDP), ("forced drops", PP2)],
    ids=["forced drops, one process", "dropless, EDP", "forced drops, PP2"],
)
def test_coefficients_follow_the_drop_rate_of_their_layer(name: str, parallel: dict[str, Any]) -> None:
    """Skywork-MoE, eqs. 7 to 9: alpha <- beta alpha + (1 - beta) min(xi d, maximum), by hand."""
    rate, moe = FOLLOWED[name]
    # Drop rates are between 0 and 1: some reach the maximum, some do not.
    adaptive = {"initial": 0.3, "xi": 0.5, "maximum": 0.26, "beta": 0.75}
    section = {
        **MOE,
        "moe_layer_freq": [1, 0, 1, 1],
        "moe_aux_loss_coeff": adaptive,
        "moe_z_loss_coeff": {**adaptive, "beta": 0.0},
        **moe,
    }
    setup = made(section, parallel=parallel)
    world = parallel["tensor_model_parallel_size"] * parallel["pipeline_model_parallel_size"]
    for written, states in ranks(world).run(on_ranks.steps, setup, Path(), 3):
        alphas = dict.fromkeys((0, 2, 3), 0.3)
        for step, record in enumerate(written):
            used = record[COEFFICIENTS]
            assert [used[layer] for layer in alphas] == pytest.approx(list(alphas.values()), rel=1e-14)
            held = {
                key: float(state) for key, state in states[step].items() if key.endswith("aux_loss.alpha")
            }
            for key, value in held.items():
                assert value == used[int(key.partition(".")[0]) - 1], "each rank has what the file says"
            targets = {}
            for layer, alpha in alphas.items():
                drop_rate = record[f"moe/per_layer/{rate}"][layer]
                assert 0 < drop_rate < 1
                targets[layer] = min(0.5 * drop_rate, 0.26)
                alphas[layer] = 0.75 * alpha + 0.25 * targets[layer]
            if step + 1 < len(written):
                z_used = written[step + 1]["moe/per_layer/z_loss_coeff"]
                assert [z_used[layer] for layer in targets] == pytest.approx(
                    list(targets.values()), rel=1e-14
                )
        assert len(set(alphas.values())) == 3, "every layer has its own"


@pytest.mark.second_pair
def test_biases_and_loads_of_the_previous_batch_by_hand() -> None:
    """DeepSeek-V3: an expert's bias moves by the rate, up where it got less than the mean of the targets."""
    loads, states = ranks(1).run(on_ranks.loads, made(CARRIED), Path(), 3)[0]
    for layer in (1, 2, 3, 4):
        bias = torch.zeros(4)
        fractions = torch.full((4,), 0.25, dtype=torch.float64)
        for step in range(3):
            before = states[step]
            assert torch.equal(before[f"{layer}.expert_bias"], bias)
            assert torch.equal(before[f"{layer}.balancing.previous_fractions"], fractions)
            load = loads[step][layer].double()
            # Two choices of each target.
            assert 0 < int(load.sum()) < 8 * 32 * 2
            bias = bias + 0.05 * (load.mean() - load).sign().float()
            fractions = load / load.sum()
        assert torch.equal(states[3][f"{layer}.expert_bias"], bias)
    assert any(bool(states[3][f"{layer}.expert_bias"].any()) for layer in (1, 2, 3, 4))


LAYOUTS = {
    "EDP, padding": (EDP, True),
    "PP2 VPP2, padding": (layout(pp=2, vpp=2), True),
    "CP2": (layout(cp=2), False),
    "DP2, drops": (layout(dp=2), False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_later_steps_agree_with_one_process(tmp_path: Path, name: str) -> None:
    """With what the checkpoint holds of the routers, which `verify` compares as it does weights."""
    parallel, padded = LAYOUTS[name]
    moe = {**CARRIED, "moe_expert_capacity_factor": 1.0} if "drops" in name else CARRIED
    assert verify(tmp_path, parallel, steps=3, padded=padded, moe=moe).failures == []


def test_a_loss_over_the_global_batch_does_not_move_with_its_cut() -> None:
    """Samples have padding, so that microbatches have different numbers of tokens."""
    # The z-loss is a mean over each microbatch's own tokens.
    moe = losses("global_aux_loss", "seq_aux_loss", coefficient=1.0, moe_z_loss_coeff=0.0)

    def cut(micro_batch_size: int, replicas: int) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        # Else the language model's loss would be a mean over each microbatch's targets.
        training = {"micro_batch_size": micro_batch_size, "calculate_per_token_loss": True}
        setup = made(moe, parallel=layout(dp=replicas), training=training)
        found, states = ranks(replicas).run(on_ranks.steps, setup, Path(), 3, True)[0]
        return found, states[-1]

    whole, state = cut(8, 1)
    assert not any(bool((value == 0.25).all()) for value in state.values()), "loads are uneven"
    for sizes in ((1, 1), (2, 2)):
        found, carried = cut(*sizes)
        for a, b in zip(found, whole, strict=True):
            for key in ("loss", "moe/loss/global_aux_loss", "moe/loss/seq_aux_loss"):
                assert a[key] == pytest.approx(b[key], rel=1e-6), key
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert all(torch.equal(carried[name], value) for name, value in state.items())


@pytest.mark.second_pair
def test_only_updates_move_it() -> None:
    setup = made(CARRIED, parallel=EDP, training={"eval_interval": 1, "eval_iters": 1})
    for found in ranks(2).run(on_ranks.undisturbed, setup, Path()):
        assert found == {"evaluation": True, "no losses": True, "skipped": True, "step": False}


TRAINING = {"train_iters": 4, "global_batch_size": 4}


@pytest.mark.second_pair
def test_a_resumed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    """In bf16: what routers carry is not cast with the weights."""
    setup = made(
        {**CARRIED, "moe_expert_capacity_factor": 1.0},
        parallel=EDP,
        training={**TRAINING, "precision": "bf16"},
        checkpoint={"save_interval": 2},
    )
    whole = tmp_path / "whole"
    ranks(2).run(train_on_ranks.train, setup, whole)
    broken = copy_until(whole, tmp_path / "broken", 2)
    assert ranks(2).run(train_on_ranks.train, setup, broken) == [2, 2]
    assert records(broken) == records(whole)
    saved = tensors(checkpoint(whole, 4))
    assert_same(tensors(checkpoint(broken, 4)), saved)
    carried = {
        name: value.dtype for name, value in saved.items() if ".balancing." in name or "expert_bias" in name
    }
    assert len(carried) == 4 * 4, "four of each layer"
    for name, dtype in carried.items():
        assert dtype == (torch.float32 if name.endswith("expert_bias") else torch.float64)
    coefficients = [record[COEFFICIENTS] for record in records(whole)]
    assert len({tuple(layers) for layers in coefficients}) == 4, "they move in every step"


def test_a_run_goes_on_in_other_layouts(tmp_path: Path) -> None:
    moe = {**CARRIED, "moe_aux_loss_coeff": [{**ADAPTIVE, "beta": 0.9}, 0.1]}

    def setup(parallel: dict[str, Any]):
        return made(moe, parallel=parallel, training={**TRAINING, "train_iters": 6})

    ranks(1).run(train_on_ranks.train, setup(layout()), tmp_path / "one")
    run = tmp_path / "moving"
    assert ranks(2).run(train_on_ranks.train, setup(EDP), run, 2) == [0, 0]
    assert ranks(1).run(train_on_ranks.train, setup(layout()), run, 4) == [2]
    assert ranks(2).run(train_on_ranks.train, setup(PP2), run) == [4, 4]
    for a, b in zip(records(run), records(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        # Counted, from step to step: nothing is lost on the way.
        assert a[COEFFICIENTS] == pytest.approx(b[COEFFICIENTS], rel=1e-3)
        assert a["moe/per_layer/z_loss_coeff"] == b["moe/per_layer/z_loss_coeff"]
