"""What may change between a save and the run that goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from experiment_files import DENSE, MOE, loaded

from megatron_moe.config.dump import to_yaml
from megatron_moe.config.resume import differences
from megatron_moe.config.yaml_tree import parse

TP = "parallel.tensor_model_parallel_size=2"


def compare(
    folder: Path, before: list[str], after: list[str], text: str = MOE
) -> tuple[list[Any], list[Any]]:
    saved = parse(to_yaml(loaded(folder, text, *before).experiment), "resolved.yaml").values
    current = loaded(folder, text, *after).experiment
    by_mapping = differences(saved, current)
    assert by_mapping == differences(loaded(folder, text, *before).experiment, current)
    return by_mapping


def test_the_same_experiment_does_not_differ(tmp_path: Path) -> None:
    overrides = ["model.megatron_core={qk_l2_norm: true}", TP]
    assert compare(tmp_path, overrides, overrides) == ([], [])
    assert compare(tmp_path, [], [], DENSE) == ([], [])


@pytest.mark.parametrize(
    "override",
    [
        "training.train_iters=20",
        "training.micro_batch_size=2",
        "training.eval_interval=3",
        "moe.moe_eval_capacity_factor=2.0",
        "checkpoint.save_interval=3",
        "logging.root=elsewhere",
        "launch.threads_per_rank=1",
        "resilience.collective_timeout_s=5",
        TP,
        "parallel.pipeline_model_parallel_size=2",
        "recompute.layers_per_stage=[2]",
        "recompute.modules=[moe_act]",
        "parallel.overlap_grad_reduce=true",
        "parallel.data_parallel_size=2",
        "moe.moe_token_dispatcher_type=allgather",
        "training.gradient_accumulation_fusion=true",
    ],
)
def test_allowed(tmp_path: Path, override: str) -> None:
    allowed, refused = compare(tmp_path, [], [override])
    assert refused == []
    assert override.partition("=")[0] in [key for key, _, _ in allowed]


def test_experts_come_and_go_in_one_line(tmp_path: Path) -> None:
    dense = ["moe=null"]
    assert compare(tmp_path, [], dense) == ([], [("moe", "a section", None)])
    assert compare(tmp_path, dense, []) == ([], [("moe", None, "a section")])


@pytest.mark.parametrize("key", ["moe_ranks_per_node=2", "moe_pad_expert_input_to_capacity=true"])
def test_what_another_layout_may_ask_to_leave_out(tmp_path: Path, key: str) -> None:
    spread = ["parallel.expert_model_parallel_size=4", "moe.moe_expert_capacity_factor=1.0"]
    allowed, refused = compare(tmp_path, [*spread, f"moe.{key}"], spread)
    assert refused == [] and len(allowed) == 1


@pytest.mark.parametrize(
    "override",
    [
        "training.seed=2",
        "training.global_batch_size=16",
        "training.rampup_batch_size=[2, 2, 10]",
        "optimizer.expert_lr=1e-3",
        "training.seq_length=32",
        "training.precision=bf16",
        "training.calculate_per_token_loss=true",
        "parallel.grad_reduce_in_fp32=false",
        "model.num_layers=8",
        "model.hidden_dropout=0.1",
        "model.megatron_core.qk_l2_norm=true",
        "model.make_vocab_size_divisible_by=64",
        "moe.moe_aux_loss_coeff=0.5",
        "moe.num_moe_experts=4",
        "optimizer.lr=1e-3",
        "optimizer.lr_decay_iters=99",
        "optimizer.weight_decay=0",
        "data.split=[9, 1]",
        "moe=null",
    ],
)
def test_refused(tmp_path: Path, override: str) -> None:
    key = override.partition("=")[0]
    for before, after in (([], [override]), ([override], [])):
        _, refused = compare(tmp_path, before, after)
        assert any(name == key or name.startswith(f"{key}.") for name, _, _ in refused)


def test_old_and_new_values_are_named(tmp_path: Path) -> None:
    assert compare(tmp_path, [], ["training.seed=2"]) == ([], [("training.seed", 1234, 2)])


def test_a_schedule_over_the_whole_run_follows_its_length(tmp_path: Path) -> None:
    longer = "training.train_iters=100"
    allowed, refused = compare(
        tmp_path, ["optimizer.lr_warmup_fraction=0.1"], ["optimizer.lr_warmup_fraction=0.1", longer]
    )
    assert refused == []
    assert [key for key, _, _ in allowed] == [
        "optimizer.lr_warmup_iters",
        "optimizer.lr_decay_iters",
        "training.train_iters",
    ]
    _, refused = compare(tmp_path, ["optimizer.lr_decay_iters=5"], ["optimizer.lr_decay_iters=100", longer])
    assert [key for key, _, _ in refused] == ["optimizer.lr_decay_iters"]


def test_the_final_decay_moves_with_the_end_of_the_run(tmp_path: Path) -> None:
    style, longer = "optimizer.lr_decay_style=WSD", "training.train_iters=100"
    allowed, refused = compare(tmp_path, [style], [style, longer])
    assert refused == []
    assert ("optimizer.lr_wsd_decay_iters", 1, 10) in allowed
    _, refused = compare(tmp_path, [style, "optimizer.lr_decay_iters=9"], [style, longer])
    assert [key for key, _, _ in refused] == ["optimizer.lr_wsd_decay_iters", "optimizer.lr_decay_iters"]


def test_files_may_move_but_not_change_their_reading(tmp_path: Path) -> None:
    text = DENSE.replace("kind: mock", "prepare: {input: [a.txt]}")
    allowed, refused = compare(tmp_path, [], ["data.prepare.input=[/b.txt]"], text)
    assert ([key for key, _, _ in allowed], refused) == (["data.prepare.input"], [])
    _, refused = compare(tmp_path, [], ["data.prepare.documents=line"], text)
    assert [key for key, _, _ in refused] == ["data.prepare.documents"]


def test_a_key_that_is_newer_than_the_checkpoint_counts_as_its_default(tmp_path: Path) -> None:
    saved = parse(to_yaml(loaded(tmp_path, MOE).experiment), "resolved.yaml").values
    del saved["optimizer"]["adam_beta1"], saved["launch"]
    assert differences(saved, loaded(tmp_path, MOE).experiment) == ([], [])
    saved["optimizer"]["gone"] = 3
    _, refused = differences(saved, loaded(tmp_path, MOE, "optimizer.adam_beta1=0.5").experiment)
    assert refused == [("optimizer.adam_beta1", 0.9, 0.5), ("optimizer.gone", 3, None)]


@pytest.mark.parametrize(
    "followed",
    [
        ["moe.moe_aux_loss_coeff.xi=0.2"],
        ["moe.moe_z_loss_coeff.xi=0.2"],
        [
            "moe.moe_router_load_balancing_type=[aux_loss, seq_aux_loss]",
            "moe.moe_aux_loss_coeff=[0.1, {xi: 0.2}]",
        ],
    ],
)
def test_a_would_be_drop_rate_that_drives_coefficients_may_not_change(
    tmp_path: Path, followed: list[str]
) -> None:
    change = ("moe.moe_would_drop_capacity_factor", 1.0, 1.5)
    later = f"{change[0]}={change[2]}"
    assert compare(tmp_path, [], [later]) == ([change], [])
    assert compare(tmp_path, followed, [*followed, later]) == ([], [change])


def test_a_key_that_follows_another_one_is_not_named_beside_it(tmp_path: Path) -> None:
    loss = "moe.moe_router_load_balancing_type=device_aux_loss"
    groups = [loss, "moe.moe_router_num_groups=4", "moe.moe_router_group_topk=2"]
    fewer = [loss, "moe.moe_router_num_groups=2", "moe.moe_router_group_topk=2"]
    assert compare(tmp_path, groups, fewer) == ([], [("moe.moe_router_num_groups", 4, 2)])
    own = "moe.moe_num_device_groups=4"
    assert compare(tmp_path, [*groups, own], [*fewer, own]) == ([], [("moe.moe_router_num_groups", 4, 2)])
    _, refused = compare(tmp_path, groups, [*groups, "moe.moe_num_device_groups=2"])
    assert refused == [("moe.moe_num_device_groups", 4, 2)]
