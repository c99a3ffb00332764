"""Weights made of other weights."""

from __future__ import annotations

import pytest
import torch
from weights_in_memory import InMemory

from megatron_moe.config.errors import InputError
from megatron_moe.convert.merging import Averaged, Cast, DenseOf, Renamed

MIXTURE = {
    "decoder.layers.0.pre_mlp_layernorm.weight": torch.tensor([2.0, 3.0]),
    "decoder.layers.0.mlp.router.weight": torch.ones(2, 2),
    "decoder.layers.0.mlp.router.expert_bias": torch.zeros(2),
    "decoder.layers.0.mlp.experts.0.linear_fc1.weight": torch.full((4, 2), 1.0),
    "decoder.layers.0.mlp.experts.1.linear_fc1.weight": torch.full((4, 2), 4.0),
    "decoder.final_layernorm.weight": torch.ones(2),
}


def test_an_average_weighs_each_model_by_its_share() -> None:
    models = [InMemory({"a": torch.full((2, 3), value)}) for value in (1.0, 5.0)]
    averaged = Averaged(models, [0.25, 0.75], ["one", "two"])
    assert torch.equal(averaged.read("a"), torch.full((2, 3), 4.0))


def test_models_that_differ_are_not_averaged_and_it_is_said_where() -> None:
    first = InMemory({"a": torch.ones(2), "b": torch.ones(2)})
    other = InMemory({"a": torch.ones(3), "c": torch.ones(2)})
    with pytest.raises(InputError) as caught:
        Averaged([first, other], [0.5, 0.5], ["one", "two"])
    assert str(caught.value) == "two: cannot be averaged with one: lacks b; has besides c; other shapes of a"


def test_a_cast_leaves_biases_that_balance_experts_in_float32() -> None:
    cast = Cast(InMemory(MIXTURE), torch.bfloat16)
    dtypes = {name: cast.read(name).dtype for name in cast.inventory()}
    assert dtypes == {name: weight.dtype for name, weight in cast.inventory().items()}
    assert [name for name, dtype in dtypes.items() if dtype != torch.bfloat16] == [
        "decoder.layers.0.mlp.router.expert_bias"
    ]


def test_a_cast_beyond_the_range_of_fp16_is_refused() -> None:
    large = InMemory({"a": torch.tensor([1.0, 7e4])})
    assert Cast(large, torch.bfloat16).read("a").isfinite().all()
    with pytest.raises(InputError, match="a: has numbers beyond 65504"):
        Cast(large, torch.float16).read("a")


def test_renaming_moves_every_weight_once() -> None:
    renamed = Renamed(InMemory(MIXTURE), [(r"^decoder\.", "encoder.")])
    assert [*renamed.inventory()] == [name.replace("decoder", "encoder") for name in MIXTURE]
    assert torch.equal(renamed.read("encoder.final_layernorm.weight"), torch.ones(2))


@pytest.mark.parametrize(
    ("rename", "problem"),
    [(("nothing", "x"), "matches no weight"), ((r"experts\.\d", "experts.0"), "would both be called")],
    ids=["unused", "ambiguous"],
)
def test_a_rename_that_matches_nothing_or_two_is_refused(rename: tuple[str, str], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Renamed(InMemory(MIXTURE), [rename])


@pytest.mark.parametrize(("expert", "value"), [(0, 1.0), (1, 4.0), (None, 2.5)])
def test_one_expert_or_their_mean_becomes_the_dense_layer(expert: int | None, value: float) -> None:
    dense = DenseOf(InMemory(MIXTURE), expert)
    assert {*dense.inventory()} == {
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.final_layernorm.weight",
    }
    assert torch.equal(dense.read("decoder.layers.0.mlp.linear_fc1.weight"), torch.full((4, 2), value))
    norm = dense.read("decoder.layers.0.mlp.linear_fc1.layer_norm_weight")
    assert torch.equal(norm, MIXTURE["decoder.layers.0.pre_mlp_layernorm.weight"])
