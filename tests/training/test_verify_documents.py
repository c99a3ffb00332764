"""Layouts compute the same where documents are kept apart, their first tokens are left out of the loss, and
sources are blended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import verify_on_ranks as on_ranks
from deepseek_cases import LATENT, TWO
from distributed import ranks
from experiments import experiment, layout

from megatron_moe.plan import plan

LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"parallel": layout(tp=2)},
    "TP2, attention recomputed": {"parallel": layout(tp=2), "recompute": {"modules": ["core_attn"]}},
    "PP2, a layer of each recomputed": {"parallel": layout(pp=2), "recompute": {"layers_per_stage": [1, 1]}},
    "CP2, all recomputed": {"parallel": layout(cp=2), "recompute": {"layers_per_stage": [4]}},
    "DP2 EP2": {"parallel": layout(dp=2, expert_model_parallel_size=2)},
    "CP2, latent attention, further tokens": {
        "parallel": layout(cp=2),
        "model": {**LATENT, **TWO, "position_embedding_type": "rope"},
    },
}


@pytest.mark.second_pair
@pytest.mark.parametrize("sections", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_agree(tmp_path: Path, sections: dict[str, Any]) -> None:
    sources = {}
    for name, documents in (("lines", "line"), ("paragraphs", "paragraph")):
        text = tmp_path / f"{name}.txt"
        text.write_text("".join(f"{name}: {n * n} is {n} times {n}\n\n" for n in range(200)))
        sources[name] = {"prepare": {"input": [str(text)], "documents": documents}}
    data = {
        "blend": sources,
        "tokenizer": {"kind": "bytes"},
        "eod_mask_loss": True,
        "reset_position_ids": True,
        "reset_attention_mask": True,
    }
    common: dict[str, Any] = {
        "data": data,
        "model": {"vocab_size": 300, "position_embedding_type": "learned_absolute"}
        | sections.get("model", {}),
        "logging": {"root": str(tmp_path / "runs")},
    }
    under_layout = experiment(**{**sections, **common})
    alone = experiment(parallel=layout(dp=1, expert_model_parallel_size=1), **common)
    pool = ranks(plan.make(under_layout).layout.world_size)
    pool.run(on_ranks.layout_part, under_layout, 1, tmp_path / "verify")
    (report,) = ranks(1).run(on_ranks.reference_part, alone, 1, tmp_path / "verify", None)
    assert report.failures == []
