"""What `profile` measures of pieces of a model."""

from __future__ import annotations

import statistics
from pathlib import Path

import profile_on_ranks as on_ranks
import pytest
from distributed import ranks
from experiments import experiment, layout

from megatron_moe.config.defaults import fill
from megatron_moe.launch import profile_experiment
from megatron_moe.plan.profile import Piece

SEQUENCE, HIDDEN, BATCH = 32, 32, 2
BOUNDARY = SEQUENCE * HIDDEN * BATCH * 4
RANDOM_STATES = 3 * 5056
"""At most; each that a recomputed layer keeps is of the size of the processor's."""
MOE = {"num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_first_k_dense_layers": 1}


def small(made, world_size: int, folder: Path, on_host: bool = True):
    return fill(profile_experiment.measured(made, world_size, on_host, folder))


def pieces(made, world_size: int, folder: Path) -> dict[str, Piece]:
    """The same on every rank."""
    found = ranks(world_size).run(on_ranks.measured, small(made, world_size, folder), folder)
    assert all(rank["pieces"] == found[0]["pieces"] for rank in found)
    return {kind: Piece(**piece) for kind, piece in found[0]["pieces"].items()}


@pytest.mark.second_pair
def test_every_kind_of_piece_is_measured(tmp_path):
    found = pieces(experiment(MOE, parallel=layout(pp=2)), 1, tmp_path)
    assert set(found) == {"embedding", "dense", "moe", "head"}
    for kind, piece in found.items():
        assert 0 < piece.forward_s < 1 and 0 < piece.backward_s < 1
        assert 0 <= piece.weight_gradient_s < piece.backward_s
        assert piece.exposed_s == piece.hidden_s == 0
        assert piece.working_bytes > 0
        if kind in ("dense", "moe"):
            # Its input, and nothing else but what random states take.
            assert BOUNDARY <= piece.kept_if_recomputed_bytes <= BOUNDARY + RANDOM_STATES
            assert piece.kept_bytes > 4 * BOUNDARY
        else:
            assert piece.recompute_s == 0
            assert piece.kept_bytes == piece.kept_if_recomputed_bytes
    logits = SEQUENCE * BATCH * 256 * 4
    assert found["head"].kept_bytes >= logits


def test_kept_bytes_are_those_that_autograd_saves(tmp_path):
    made = experiment(MOE)
    (saved,) = ranks(1).run(on_ranks.saved_by_layers, small(made, 1, tmp_path), tmp_path)
    found = pieces(made, 1, tmp_path)
    # What a function of our own keeps without telling autograd is measured, and not seen here.
    assert found["dense"].kept_bytes == pytest.approx(saved[0], rel=0.02)
    assert found["moe"].kept_bytes == pytest.approx(statistics.fmean(saved[1:]), rel=0.15)


@pytest.mark.second_pair
def test_ranks_of_a_stage_wait_for_experts(tmp_path):
    found = pieces(experiment(MOE, parallel=layout(tp=2)), 2, tmp_path)
    assert 0 < found["moe"].exposed_s < found["moe"].forward_s + found["moe"].backward_s
    assert found["dense"].exposed_s == 0
    # Sequence parallelism splits what goes from layer to layer.
    kept = found["dense"].kept_if_recomputed_bytes
    assert BOUNDARY / 2 <= kept <= BOUNDARY / 2 + RANDOM_STATES


def test_recomputed_modules_keep_less(tmp_path):
    whole = pieces(experiment(), 1, tmp_path)
    selective = {"granularity": "selective", "modules": ["moe"]}
    parts = pieces(experiment(recompute=selective), 1, tmp_path)
    assert parts["moe"].kept_bytes < 0.7 * whole["moe"].kept_bytes
    assert parts["moe"].kept_if_recomputed_bytes == whole["moe"].kept_if_recomputed_bytes


@pytest.mark.parametrize(
    ("on_host", "kinds"), [(True, [0, 0, 0, 1, 1, 1, 1]), (False, [0, 0, 1, 1])], ids=["host", "GPU"]
)
def test_small_experiments_have_few_layers_of_each_kind(on_host, kinds, tmp_path):
    made = experiment(
        {**MOE, "moe_first_k_dense_layers": 3},
        model={"num_layers": 8},
        parallel=layout(tp=2, pp=4, vpp=2),
        training={"global_batch_size": 64},
        recompute={"layers_per_stage": [1, 0, 1, 0]},
    )
    pieces_of = small(made, 8, tmp_path, on_host)
    assert pieces_of.model.num_layers == len(kinds)
    assert pieces_of.moe is not None and pieces_of.moe.moe_layer_freq == kinds
    assert pieces_of.recompute.layers_per_stage == [0]
    parallel = pieces_of.parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (2, 1)
    # In the place of the other stages: as many ranks compute at once.
    assert parallel.data_parallel_size == 4
