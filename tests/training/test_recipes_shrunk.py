"""Models of shipped recipes, made tiny: they train, and compute in EDP what one process computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import train_on_ranks as on_ranks
import yaml
from distributed import ranks
from experiments import experiment, layout
from layout_cases import verify
from training_runs import records

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64}
MODEL |= {"vocab_size": 250, "num_query_groups": None}
MOE = {"num_moe_experts": 16, "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 32}


def shrunk(name: str) -> dict[str, Any]:
    """The sections `model` and `moe` of a recipe, in few layers and small widths."""
    recipe = yaml.safe_load((CONFIGS / name).read_text())
    latent = {width: size // 16 for width, size in recipe["model"]["multi_latent_attention"].items()}
    model = recipe["model"] | MODEL | {"multi_latent_attention": latent, "layernorm_epsilon": 1e-6}
    moe = {**recipe["moe"], **MOE, "moe_first_k_dense_layers": 1}
    if moe.pop("moe_flex_dispatcher_backend", None):
        # The one of ours that sends as few copies: DeepEP needs GPUs.
        moe["moe_token_dispatcher_type"] = "deduplicated"
    return {"model": model, "moe": moe}


@pytest.mark.parametrize("name", ["deepseek_v2.yaml", "deepseek_v3.yaml"])
def test_it_trains_and_computes_in_edp_what_one_process_computes(name: str, tmp_path: Path) -> None:
    sections = shrunk(name)
    training = {"train_iters": 4, "global_batch_size": 4}
    made = experiment(parallel=layout(tp=2), training=training, **sections)
    ranks(2).run(on_ranks.train, made, tmp_path / "run")
    written = records(tmp_path / "run")
    assert [record["iteration"] for record in written] == [1, 2, 3, 4]
    assert all("skipped" not in record and 5 < record["loss"] < 6 for record in written)
    assert verify(tmp_path / "verify", layout(tp=2), **sections).failures == []
