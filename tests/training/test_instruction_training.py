"""Finetuning on records: what is learned is what each record alone says, in every layout and packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import instruction_on_ranks as on_ranks
import pytest
import train_on_ranks
import verify_on_ranks
from distributed import ranks
from experiments import MOE, layout
from instruction_cases import RECORDS, instruction_experiment

from megatron_moe.plan import plan

UNBALANCED = {
    **MOE,
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": 0.0,
    "moe_router_dtype": "fp64",
}
"""Losses of routers are functions of a microbatch, which packing changes."""
HELD_OUT = range(len(RECORDS) * 3 // 4, len(RECORDS))
WAYS: dict[str, tuple[dict[str, Any], int, int]] = {
    "packed, a token": ({"packing": True, "weighting": "token"}, 1, 0),
    "packed, a sample": ({"packing": True, "weighting": "sample"}, 1, 0),
    "alone, a token": ({"packing": False, "weighting": "token"}, 4, 36),
    "alone, a sample": ({"packing": False, "weighting": "sample"}, 3, 36),
}


@pytest.mark.second_pair
@pytest.mark.parametrize("positions", ["learned_absolute", "rope"])
@pytest.mark.parametrize(("section", "micro_batch_size", "sequences"), WAYS.values(), ids=WAYS)
def test_a_step_is_that_of_each_record_alone(
    tmp_path: Path, section: dict[str, Any], micro_batch_size: int, sequences: int, positions: str
) -> None:
    training = {"seq_length": 160, "eval_interval": 1, "eval_iters": 1, "micro_batch_size": micro_batch_size}
    sizes = [len(f"### User:\n{q}\n\n### Assistant:\n{a}") for q, a in RECORDS]
    made = instruction_experiment(
        tmp_path,
        moe=UNBALANCED,
        model={"position_embedding_type": positions},
        training=training | {"global_batch_size": sequences or _sequences(sizes[: HELD_OUT.start], 160)},
        split=[75, 25],
        **section,
    )
    ((differences, metrics),) = ranks(1).run(on_ranks.against_records_alone, made, tmp_path / "run", HELD_OUT)
    assert max(differences.values()) < 1e-5, differences
    for name, (found, expected) in metrics.items():
        if name.startswith("eval") and section["packing"]:  # a global batch is not just all of them
            continue
        assert found == pytest.approx(expected, rel=1e-6), name


def _sequences(places: list[int], room: int) -> int:
    """Sequences that the first records are packed into."""
    import numpy as np

    from megatron_moe.data.instruction.packing import packed

    return len(packed(np.array(places), room, 1234))


LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2, packed, a sample": {"parallel": layout(dp=2), "weighting": "sample"},
    "TP2 EP2, packed": {"parallel": layout(tp=2, expert_model_parallel_size=2)},
    "TP2 EP2, alone, capacity": {
        "parallel": layout(tp=2, expert_model_parallel_size=2),
        "moe": {**MOE, "moe_expert_capacity_factor": 1.0},
        "packing": False,
    },
    "PP2, packed": {"parallel": layout(pp=2), "model": {"position_embedding_type": "learned_absolute"}},
    "PP2, alone, a sample": {"parallel": layout(pp=2), "packing": False, "weighting": "sample"},
    "CP2, packed, a sample, recomputed": {
        "parallel": layout(cp=2),
        "weighting": "sample",
        "recompute": {"layers_per_stage": [4]},
    },
    "CP2, alone": {"parallel": layout(cp=2), "packing": False},
    "CP2, packed, further tokens": {"parallel": layout(cp=2), "model": {"mtp_num_layers": 1}},
    "DP2, dense": {"parallel": layout(dp=2), "moe": None},
}


@pytest.mark.second_pair
@pytest.mark.parametrize("sections", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_agree(tmp_path: Path, sections: dict[str, Any]) -> None:
    training = {"seq_length": 128}
    under_layout = instruction_experiment(tmp_path, training=training, **sections)
    alone = layout(dp=1) if sections.get("moe", MOE) is None else layout(dp=1, expert_model_parallel_size=1)
    of_one = instruction_experiment(
        tmp_path, training=training, **sections | {"parallel": alone, "recompute": {}}
    )
    pool = ranks(plan.make(under_layout).layout.world_size)
    pool.run(verify_on_ranks.layout_part, under_layout, 1, tmp_path / "verify")
    (report,) = ranks(1).run(verify_on_ranks.reference_part, of_one, 1, tmp_path / "verify", None)
    assert report.failures == []


def test_neither_prompts_nor_padding_count_for_routers(tmp_path: Path) -> None:
    moe = {**MOE, "moe_expert_capacity_factor": 1.0}
    records = []
    for seq_length in (96, 160):
        made = instruction_experiment(
            tmp_path, moe=moe, packing=False, training={"seq_length": seq_length}, model={"num_layers": 2}
        )
        ((targets, assignments, record),) = ranks(1).run(on_ranks.routed, made, tmp_path / str(seq_length))
        assert assignments == [targets * 2] * 2
        records.append(record)
    names = [name for name in records[0] if name.startswith(("loss", "moe/", "grad_norm", "sample"))]
    assert records[0]["moe/drop_rate"] > 0 and len(names) > 8
    assert {name: records[1][name] for name in names} == pytest.approx(
        {name: records[0][name] for name in names}, rel=1e-5
    )
    assert records[0]["data/padding"] < records[1]["data/padding"]


def test_a_run_goes_on_with_the_same_records_only(tmp_path: Path) -> None:
    def made(name: str, **more: Any) -> Any:
        return instruction_experiment(tmp_path, name=name, training={"seq_length": 128}, **more)

    def losses(run: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    pool, whole, parts = ranks(1), tmp_path / "whole", tmp_path / "parts"
    pool.run(train_on_ranks.train, made("whole"), whole)
    pool.run(train_on_ranks.train, made("parts"), parts, 2)
    moved = (tmp_path / "records.jsonl").rename(tmp_path / "moved.jsonl")
    assert pool.run(train_on_ranks.train, made("parts", train=[str(moved)]), parts) == [2]
    assert losses(parts) == losses(whole)
    other = moved.read_text().replace("It is", "That is")
    moved.write_text(other)
    (said,) = pool.run(train_on_ranks.refused, made("parts", train=[str(moved)]), parts)
    assert said.startswith("data.instruction.train: other records than iter_0000004 was trained on")
