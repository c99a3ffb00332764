"""Keys for fused kernels reach them, and what is trained is the same; unfused code stands in for kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kernels_on_ranks as on_ranks
import pytest
from distributed import ranks
from experiments import MOE, experiment, layout

KEYS: dict[str, tuple[str, set[str]]] = {
    # key -> section, kernels that it runs
    "apply_rope_fusion": ("model", {"fused_apply_rotary_pos_emb"}),
    "gradient_accumulation_fusion": ("training", {"wgrad_gemm_accum_fp32"}),
}


def made(*keys: str, **moe_keys: Any) -> Any:
    sections: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 2},
        "moe": {**MOE, "moe_shared_expert_intermediate_size": 16},
        "training": {"micro_batch_size": 2},
    }
    for key in keys:
        sections[KEYS[key][0]][key] = True
    moe = sections.pop("moe") | moe_keys
    if moe_keys:
        sections["training"]["precision"] = "bf16"
    return experiment(moe, parallel=layout(tp=2), **sections)


@pytest.fixture(scope="module")
def unfused(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    records, calls = ranks(2).run(on_ranks.with_stand_ins, made(), tmp_path_factory.mktemp("unfused"), 3)[0]
    assert calls == {}
    return list(records)


@pytest.mark.second_pair
@pytest.mark.parametrize("key", KEYS)
def test_each_key_reaches_its_kernels(key: str, unfused: list[dict[str, Any]], tmp_path: Path) -> None:
    for records, calls in ranks(2).run(on_ranks.with_stand_ins, made(key), tmp_path, 3):
        assert calls.keys() == KEYS[key][1]
        for name in ("loss", "grad_norm", "moe/aux_loss", "moe/load_max_over_mean"):
            expected = [record[name] for record in unfused]
            assert [record[name] for record in records] == pytest.approx(expected, rel=1e-6), name


@pytest.mark.second_pair
def test_megatron_cores_own_layer_sorts_tokens_in_a_kernel(tmp_path: Path) -> None:
    """Where the schedule takes the layer apart; the layer of our own calls no such kernel."""
    apart = {"overlap_moe_expert_parallel_comm": True}
    plain, _ = ranks(2).run(on_ranks.with_stand_ins, made(**apart), tmp_path / "plain", 2)[0]
    fused = made(**apart, moe_permute_fusion=True)
    for records, calls in ranks(2).run(on_ranks.with_stand_ins, fused, tmp_path / "fused", 2):
        assert {"fused_permute_with_probs", "fused_unpermute"} <= calls.keys()
        assert [record["loss"] for record in records] == [record["loss"] for record in plain]
