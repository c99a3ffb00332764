"""Every layout starts from the same model, drawn as the docstring says."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import initialization_on_ranks
import pytest
import torch
from distributed import ranks
from experiments import MOE, experiment, layout

from megatron_moe.model.initialization import initialize
from megatron_moe.plan import plan as plans

SHARED = MOE | {
    "moe_shared_expert_intermediate_size": 40,
    "moe_shared_expert_gate": True,
    "moe_layer_freq": 2,
}
TIED = {"model": {"untie_embeddings_and_output_weights": False}}
BIASED: dict[str, Any] = {
    "model": {
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "qkv_bias": True,
        "qk_norm": "head",
    },
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "EDP": (layout(tp=2), {}),
    "PP2": (layout(pp=2), {}),
    "PP2 uneven": (layout(pp=2), {"pipeline": {"layers_per_stage": [1, 3]}}),
    "VPP2": (layout(pp=2, vpp=2), {}),
    "EP2": (layout(dp=2, expert_model_parallel_size=2), {}),
    "ETP2": (layout(tp=2, expert_model_parallel_size=1, expert_tensor_parallel_size=2), {}),
    "ETP2 gelu": (
        layout(tp=2, expert_model_parallel_size=1, expert_tensor_parallel_size=2),
        {"model": {"activation": "gelu"}},
    ),
    "TP2 shared": (layout(tp=2), {"moe": SHARED}),
    "EDP, other experts than dense layers": (
        layout(tp=2),
        {"moe": MOE | {"moe_expert_activation": "relu", "moe_first_k_dense_layers": 1}},
    ),
    "ETP2, gated experts beside gelu": (
        layout(tp=2, expert_model_parallel_size=1, expert_tensor_parallel_size=2),
        {"model": {"activation": "gelu"}, "moe": MOE | {"moe_expert_activation": "swiglu"}},
    ),
    "TP2 biases": (layout(tp=2), BIASED),
    "ETP2 biases": (
        layout(tp=2, expert_model_parallel_size=1, expert_tensor_parallel_size=2),
        {"model": {"mlp_bias": True, "qkv_bias": True, "attention_output_bias": True}},
    ),
    "TP2, norms of all heads": (
        layout(tp=2),
        {"model": {"qk_norm": "all_heads", "attention_output_bias": True}},
    ),
    "TP2, sinks, router biases": (
        layout(tp=2),
        {
            "model": {"attention_sinks": True, "activation": "clamped_swiglu", "mlp_bias": True},
            "moe": MOE | {"moe_router_bias": True, "moe_layer_freq": 2},
        },
    ),
    "TP2 one key head": (layout(tp=2), {"model": {"num_query_groups": 1, "kv_channels": 12}}),
    "PP2 embedding alone": (layout(pp=2), {"pipeline": {"layers_per_stage": "E|t*4,L"}}),
    "TP2 dense": (layout(tp=2), {"moe": None}),
    "PP2 tied": (layout(pp=2), TIED),
    "TP2 tied": (layout(tp=2), TIED),
}


def ours(**sections: Any) -> dict[str, torch.Tensor]:
    return ranks(1).run(initialization_on_ranks.weights, experiment(**sections))[0]


@pytest.mark.second_pair
@pytest.mark.parametrize("name", CASES)
def test_every_layout_starts_from_the_same_weights_and_holds_what_was_planned(
    name: str, tmp_path: Path
) -> None:
    parallel, sections = CASES[name]
    setup = experiment(parallel=parallel, **sections)
    plan = plans.make(setup)
    for rank, counts in enumerate(ranks(2).run(initialization_on_ranks.save, setup, str(tmp_path))):
        stages = plan.stages_on(rank)
        assert counts == [plan.stage_costs[stage.index].parameters_per_rank for stage in stages]
    sections = {key: value for key, value in sections.items() if key != "pipeline"}
    one = experiment(**sections)
    assert ranks(1).run(initialization_on_ranks.differences, one, str(tmp_path)) == [[]]


def test_tied_embeddings_are_equal_on_both_stages() -> None:
    first, last = ranks(2).run(
        initialization_on_ranks.embeddings_of_stages, experiment(parallel=layout(pp=2), **TIED)
    )
    assert torch.equal(first, last)


def test_spread_of_each_kind() -> None:
    wide = {"hidden_size": 128, "num_layers": 2, "ffn_hidden_size": 256, "init_method_std": 0.05}
    found = ours(model=wide, moe=MOE | {"moe_layer_freq": [0, 1]})
    into_residual = 0.05 / math.sqrt(2 * 2)
    checked = 0
    for name, weight in found.items():
        if weight.dim() == 1:
            assert weight.eq(1).all(), name
            continue
        std = into_residual if "linear_proj" in name or "linear_fc2" in name else 0.05
        if weight.numel() >= 4096:
            assert float(weight.std()) == pytest.approx(std, rel=0.05), name
            assert abs(float(weight.mean())) < std / 10, name
            checked += 1
    assert checked >= 9


def test_scales_of_experts_and_routers() -> None:
    plain = ours(moe=SHARED)
    scaled = ours(moe=SHARED | {"moe_expert_init_scale": 3.0, "moe_router_init_scale": 0.1})
    factors = {".experts.linear_fc": 3.0, ".router.weight": 0.1}
    seen = set()
    for name, weight in plain.items():
        part = next((part for part in factors if part in name), None)
        torch.testing.assert_close(scaled[name], weight * factors.get(part or "", 1.0), msg=name)
        seen.add(part)
    assert seen == {*factors, None}


def test_norms_are_one_and_biases_zero() -> None:
    vectors = {name: weight for name, weight in ours(**BIASED).items() if weight.dim() == 1}
    biases = {name for name in vectors if name.endswith("bias")}
    assert len(biases) >= 4 * 4 and len(vectors) > len(biases)
    for name, weight in vectors.items():
        assert weight.eq(0.0 if name in biases else 1.0).all(), name


def test_embeddings_of_another_spread() -> None:
    plain, other = ours(), ours(model={"megatron_core": {"embedding_init_method_std": 0.5}})
    name = "embedding.word_embeddings.weight"
    torch.testing.assert_close(other[name], plain[name] * 5)
    assert torch.equal(other["output_layer.weight"], plain["output_layer.weight"])


def test_no_two_weights_are_alike() -> None:
    """Each has a random state of its own, each expert too."""
    found = ours(moe=MOE | {"moe_ffn_hidden_size": 16})
    matrices = [row for w in found.values() if w.dim() > 1 for row in (w if w.dim() == 3 else [w])]
    beginnings = [tuple(matrix.flatten()[:8].tolist()) for matrix in matrices]
    assert len(set(beginnings)) == len(beginnings)


def test_another_seed_draws_another_model() -> None:
    first, second = ours(), ours(training={"seed": 5})
    assert not torch.equal(first["output_layer.weight"], second["output_layer.weight"])


def test_experts_of_transformer_engine_start_as_the_native_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its grouped linear layers hold one parameter an expert, numbered on this rank, without marks of tensor
    parallelism."""
    from megatron.core import parallel_state

    for kind in ("expert_model", "expert_tensor"):
        monkeypatch.setattr(parallel_state, f"get_{kind}_parallel_rank", lambda: 1)
        monkeypatch.setattr(parallel_state, f"get_{kind}_parallel_world_size", lambda: 2)
    setup, stage = experiment(), SimpleNamespace(layers=(2,))
    native, engine = torch.nn.Module(), torch.nn.Module()
    sizes = {"linear_fc1": (2 * 48 // 2, 32), "linear_fc2": (32, 48 // 2)}
    for name, shape in sizes.items():
        parts = torch.nn.Module()
        engine.add_module(name, parts)
        for local in range(2):
            parts.register_parameter(f"weight{local}", torch.nn.Parameter(torch.empty(shape)))
        native.register_parameter(name, torch.nn.Parameter(torch.empty(2, *shape)))
    for model in (native, engine):
        layer = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": model})})
        decoder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
        initialize(torch.nn.ModuleDict({"decoder": decoder}), setup, stage)  # type: ignore[arg-type]
    for name in sizes:
        stacked = torch.stack(list(getattr(engine, name).parameters()))
        assert torch.equal(stacked, getattr(native, name))
