"""How long pieces take, where it can be known: on machines that lose nothing, and by what changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from plan_experiments import filled

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.parameters import padded_vocab_size, scores_per_token
from megatron_moe.plan.costs.weights import on_a_rank, weights_of
from megatron_moe.plan.layout import Layout
from megatron_moe.plan.times import timing
from megatron_moe.plan.times.cluster import Cluster
from megatron_moe.plan.units import Kind, Times

PEAK = 1e15
IDEAL: dict[str, Any] = {
    "preset": "h100",
    "peak_tflops": PEAK / 1e12,
    "peak_fp32_tflops": PEAK / 1e12,
    "achievable_fraction": 1.0,
    "attention_fraction": 1.0,
    "matrix_padding": 0,
    "memory_bandwidth_gb_s": 1e9,
    "kernel_us": 0.0,
    "host_us": 0.0,
    "intra_node_gb_s": 1e9,
    "inter_node_gb_s": 1e9,
    "intra_node_latency_us": 0.0,
    "inter_node_latency_us": 0.0,
}
"""Nothing but operations takes time."""
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 24,
}
MODEL: dict[str, Any] = {"hidden_size": 1024, "num_attention_heads": 16, "num_query_groups": 4}
MODEL |= {"kv_channels": 64, "ffn_hidden_size": 4096, "vocab_size": 32000, "max_position_embeddings": 2048}
MOE: dict[str, Any] = {"num_moe_experts": 8, "moe_ffn_hidden_size": 2048}
SPREAD = {"tensor_model_parallel_size": 4, "expert_model_parallel_size": 4, "sequence_parallel": True}
SPREAD_OVER_NODES = SPREAD | {"expert_model_parallel_size": 16, "data_parallel_size": 4}


def experiment(**sections: dict[str, Any] | None) -> Experiment:
    """A model large enough for times to differ, on H100, routed evenly."""
    of_launch: dict[str, Any] = {"expert_imbalance": 1.0, "cluster": {"preset": "h100", "host_us": 0.0}}
    defaults: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "moe": MOE,
        "training": {"seq_length": 2048, "precision": "bf16"},
        "launch": of_launch,
    }
    for section, keys in sections.items():
        defaults[section] = keys if keys is None else {**(defaults.get(section) or {}), **keys}  # type: ignore[assignment]
    return filled(**defaults)


def times(kind: Kind, **sections: dict[str, Any] | None) -> Times:
    one = experiment(**sections)
    return timing.times(one, Layout.of(one), Cluster.of(one), kind)


@pytest.mark.parametrize("kind", ["dense", "moe", "mtp", "head"])
@pytest.mark.parametrize("sections", [{}, {"model": {"multi_latent_attention": LATENT}}], ids=["gqa", "mla"])
@pytest.mark.parametrize("parallel", [{}, SPREAD], ids=["one rank", "TP 4, EP 4"])
def test_an_ideal_machine_takes_its_operations(
    kind: Kind, sections: dict[str, Any], parallel: dict[str, Any]
) -> None:
    """Those that the table of weights and the count of scores make: forward two for each weight that a token
    multiplies and half of the square of scores, backward twice and three times these."""
    model = {**sections.get("model", {}), "mtp_num_layers": 1}
    if "multi_latent_attention" in model:
        model |= {"num_query_groups": None, "kv_channels": None}
    shared = {"moe_shared_expert_intermediate_size": 512}
    one = experiment(model=model, moe=shared, parallel=parallel, launch={"cluster": IDEAL})
    layout, training = Layout.of(one), one.training
    tokens = training.micro_batch_size * training.seq_length
    kinds: list[Kind] = ["mtp", "head"] if kind == "mtp" else [kind]
    weights = [w for each in kinds for w in weights_of(one, each, padded_vocab_size(one))]
    products = 2.0 * tokens * sum(w.multiplied for w in weights) / layout.tensor_model_parallel_size
    scores = 0.0
    if kind != "head":
        scores = tokens * scores_per_token(one) / 2 / layout.tensor_model_parallel_size
    found = timing.times(one, layout, Cluster.of(one), kind)
    assert found.forward_s * PEAK == pytest.approx(products + scores, rel=1e-3)
    assert found.backward_s * PEAK == pytest.approx(2 * products + 3 * scores, rel=1e-3)
    assert found.weight_gradient_s * PEAK == pytest.approx(products, rel=1e-3)


def test_small_products_are_slower_than_their_operations() -> None:
    """As many rows and weights in 64 experts as in 8: the same operations in smaller products."""
    few = times("moe", moe={"num_moe_experts": 8, "moe_router_topk": 2})
    many = times("moe", moe={"num_moe_experts": 64, "moe_router_topk": 16, "moe_ffn_hidden_size": 256})
    assert many.forward_s > 1.2 * few.forward_s


def test_a_layer_takes_what_the_host_takes_to_launch_it() -> None:
    """Few tokens are no faster than fewer."""
    launch = {"cluster": {"preset": "h100", "host_us": 100.0}}
    short, shorter = (
        times("moe", launch=launch, training={"seq_length": length}, model={"max_position_embeddings": 2048})
        for length in (64, 32)
    )
    assert short.forward_s == shorter.forward_s and short.backward_s == shorter.backward_s
    assert short.backward_s > short.forward_s > times("moe", training={"seq_length": 64}).forward_s


def test_the_fullest_rank_is_waited_for() -> None:
    """Half as much again for its experts, 2 x 3 matrices of 1,024 x 2,048 for two choices of each of 512
    tokens, and for the way to them; not for the rest of the layer."""
    cluster = IDEAL | {"intra_node_gb_s": 100.0}
    even, uneven = (
        times("moe", parallel=SPREAD, launch={"expert_imbalance": load, "cluster": cluster})
        for load in (1.0, 1.5)
    )
    experts_s = 2 * 3 * 1024 * 2048 * 2 * 512 / PEAK
    more_s = 0.5 * (experts_s + even.exposed_s / 2)
    assert uneven.forward_s - even.forward_s == pytest.approx(more_s, rel=1e-3)
    assert uneven.exposed_s == pytest.approx(1.5 * even.exposed_s)


def test_what_is_dropped_neither_travels_nor_computes() -> None:
    even, capped = (
        times("moe", parallel=SPREAD, moe=moe, launch={"expert_imbalance": load})
        for moe, load in (({}, 1.0), ({"moe_expert_capacity_factor": 1.0}, 1.5))
    )
    assert capped.exposed_s == pytest.approx(even.exposed_s)
    assert capped.forward_s == pytest.approx(even.forward_s)


def test_experts_on_other_nodes_are_far() -> None:
    near, far = (times("moe", moe={"num_moe_experts": 16}, parallel=p) for p in (SPREAD, SPREAD_OVER_NODES))
    assert far.exposed_s > 3 * near.exposed_s


@pytest.mark.parametrize(
    "moe",
    [
        {"moe_overlap_degree": 4},
        {"overlap_moe_expert_parallel_comm": True},
        {"moe_shared_expert_overlap": True},
    ],
    ids=["parts", "two microbatches", "shared experts"],
)
def test_overlap_hides_a_part_of_the_way(moe: dict[str, Any]) -> None:
    shared = {"num_moe_experts": 16, "moe_shared_expert_intermediate_size": 4096}
    plain = times("moe", moe=shared, parallel=SPREAD_OVER_NODES)
    hidden = times("moe", moe=shared | moe, parallel=SPREAD_OVER_NODES)
    assert plain.hidden_s == 0
    assert 0 < hidden.exposed_s < plain.exposed_s
    assert hidden.exposed_s + hidden.hidden_s == pytest.approx(plain.exposed_s)
    saved = plain.forward_s + plain.backward_s - hidden.forward_s - hidden.backward_s
    assert saved == pytest.approx(hidden.hidden_s)


def test_one_copy_a_node_spares_the_links_between_them() -> None:
    """DeepEP's way against a copy for each expert, 8 of 64 experts on 16 ranks of two nodes."""
    moe = {"num_moe_experts": 64, "moe_router_topk": 8}
    copies = times("moe", moe=moe, parallel=SPREAD_OVER_NODES)
    flex = {"moe_token_dispatcher_type": "flex"}
    by_nodes = times("moe", moe=moe | flex, parallel=SPREAD_OVER_NODES)
    assert by_nodes.exposed_s < copies.exposed_s / 3
    groups = {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
    limited = times("moe", moe=moe | flex | groups, parallel=SPREAD_OVER_NODES)
    assert limited.exposed_s < 0.95 * by_nodes.exposed_s, "every second token stays"


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("dense", ["layernorm"]),
        ("dense", ["core_attn"]),
        ("dense", ["mlp"]),
        ("moe", ["moe_act"]),
        ("moe", ["moe"]),
    ],
)
def test_what_is_computed_again_is_less_than_the_layer(kind: Kind, modules: list[str]) -> None:
    parallel = {"recompute": {"modules": modules, "granularity": "selective"}}
    plain, again = times(kind, moe={"moe_layer_freq": 2}), times(kind, moe={"moe_layer_freq": 2}, **parallel)
    assert again.forward_s == plain.forward_s
    assert 0 < again.backward_s - plain.backward_s < plain.forward_s
    assert plain.recompute_s == plain.forward_s, "the whole layer runs forward again"


def test_context_ranks_gather_keys_and_values() -> None:
    """Half of the tokens, and half of the scores, but more than half of the time."""
    whole, half = times("dense"), times("dense", parallel={"context_parallel_size": 2})
    assert whole.forward_s / 2 < half.forward_s < whole.forward_s


def test_what_is_sent_to_the_next_stage() -> None:
    """2,048 tokens of 1,024 elements in bf16, a quarter of them from each tensor-parallel rank."""
    for parallel, size in (({}, 2048 * 1024 * 2), (SPREAD, 2048 * 1024 * 2 / 4)):
        pipeline = {"pipeline_model_parallel_size": 2, **parallel}
        one = experiment(
            parallel=pipeline, pipeline={"layers_per_stage": [2, 2]}, recompute={"layers_per_stage": [0, 0]}
        )
        seconds, sent = timing.transfer(one, Layout.of(one), Cluster.of(one))
        assert sent == size
        assert seconds > 0
    one = experiment()
    assert timing.transfer(one, Layout.of(one), Cluster.of(one)) == (0.0, 0.0)


def test_gradients_and_weights_travel_between_replicas() -> None:
    """One dense layer on 8 replicas of a node: gradients in fp32 reduced and weights in bf16 gathered, 7/8 of
    each over the links; nothing on one."""
    one = experiment(
        parallel={"data_parallel_size": 8}, launch={"cluster": IDEAL | {"intra_node_gb_s": 100.0}}
    )
    layout, cluster = Layout.of(one), Cluster.of(one)
    count = sum(on_a_rank(w, layout) for w in weights_of(one, "dense", padded_vocab_size(one)))
    seconds, _ = timing.after_pieces(one, layout, cluster, {"dense": 1})
    assert seconds == pytest.approx(count * (4 + 2) * 7 / 8 / cluster.node_rate, rel=1e-3)
    alone = experiment()
    assert timing.after_pieces(alone, Layout.of(alone), Cluster.of(alone), {"dense": 1})[0] == 0


def test_replicas_of_experts_are_fewer() -> None:
    """With EP over all replicas nothing of the experts' gradients is left to reduce."""
    spread = {"data_parallel_size": 8, "expert_model_parallel_size": 8}
    together = {"data_parallel_size": 8}
    reduce_s = []
    for parallel in (spread, together):
        one = experiment(parallel=parallel)
        layout, cluster = Layout.of(one), Cluster.of(one)
        with_experts = timing.after_pieces(one, layout, cluster, {"moe": 1})[0]
        reduce_s.append(with_experts)
    assert reduce_s[0] < reduce_s[1] / 3


def test_the_backward_pass_hides_gradients() -> None:
    overlapped = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    found = []
    for parallel in ({"data_parallel_size": 8}, {"data_parallel_size": 8, **overlapped}):
        one = experiment(parallel=parallel)
        layout, cluster = Layout.of(one), Cluster.of(one)
        assert cluster.overlap_fraction < 1
        found.append(
            timing.after_pieces(one, layout, cluster, {"dense": 1}, forward_s=1.0, backward_s=1.0)[0]
        )
    assert found[1] == pytest.approx(found[0] * (1 - cluster.overlap_fraction))


def test_an_optimizer_in_the_hosts_memory_is_slower() -> None:
    here, there = (experiment(optimizer={"optimizer_cpu_offload": offload}) for offload in (False, True))
    cluster = Cluster.of(here)
    update_s = [timing.after_pieces(one, Layout.of(one), cluster, {"dense": 4})[1] for one in (here, there)]
    assert update_s[1] > 10 * update_s[0]


def test_slower_machines_take_longer() -> None:
    """Each figure of the cluster counts."""
    one = experiment(parallel=SPREAD_OVER_NODES, moe={"num_moe_experts": 16})
    layout, cluster = Layout.of(one), Cluster.of(one)

    def seconds(of: Cluster) -> float:
        layer = timing.times(one, layout, of, "moe")
        return layer.forward_s + layer.backward_s + sum(timing.after_pieces(one, layout, of, {"moe": 1}))

    base = seconds(cluster)
    for name in ("matrix_flops", "fp32_flops", "attention_flops", "memory_rate", "node_rate", "network_rate"):
        assert seconds(replace(cluster, **{name: getattr(cluster, name) / 2})) > base, name
    for name in ("matrix_padding", "kernel_s", "node_latency_s", "network_latency_s"):
        assert seconds(replace(cluster, **{name: getattr(cluster, name) * 2})) > base, name
