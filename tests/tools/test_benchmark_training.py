"""The benchmark measures two models that compute the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_training import train_in_turns
from distributed import REPOSITORY

TINY = """
extends: [{quickstart}]
model: {{num_layers: 2, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2}}
moe: {{num_moe_experts: 4, moe_router_topk: 2, moe_ffn_hidden_size: 48}}
training: {{global_batch_size: 4, micro_batch_size: 2, seq_length: 16, eval_iters: 1}}
"""


@pytest.mark.slow
@pytest.mark.second_pair
@pytest.mark.parametrize("layout", ["one process", "EDP, two ranks"])
def test_trains_three_loops_on_the_same_losses(tmp_path: Path, layout: str) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.format(quickstart=REPOSITORY / "configs" / "quickstart.yaml"))
    measured = train_in_turns(config, layout, repetitions=2, steps=1)
    assert measured["losses"]["ours"] == pytest.approx(measured["losses"]["plain"], rel=1e-5)
    assert {name: len(seconds) for name, seconds in measured["seconds"].items()} == {
        "plain": 2,
        "bare": 2,
        "ours": 2,
    }
