"""Small experiments for tests, as the loader would give them."""

from __future__ import annotations

from typing import Any

from megatron_moe.config.defaults import fill
from megatron_moe.config.schema import Experiment

MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 250,
    "init_method_std": 0.1,
}
MOE: dict[str, Any] = {"num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_z_loss_coeff": 0.001}
TRAINING: dict[str, Any] = {"train_iters": 4, "global_batch_size": 8, "micro_batch_size": 2, "seq_length": 32}


def experiment(moe: dict[str, Any] | None = MOE, **sections: Any) -> Experiment:
    """A tiny MoE GPT on mock data; each section given is merged over the default one. `moe=None`: dense."""
    merged: dict[str, Any] = {
        "name": "tiny",
        "model": {**MODEL, **sections.pop("model", {})},
        "moe": moe,
        "data": {"kind": "mock"},
        "optimizer": {"lr": 1e-2},
        "training": {**TRAINING, **sections.pop("training", {})},
        # A picture takes half a second of every run that is trained to its end.
        "logging": {"curves": False, **sections.pop("logging", {})},
        **sections,
    }
    return fill(Experiment.model_validate(merged))


def layout(
    tp: int = 1, pp: int = 1, vpp: int | None = None, cp: int = 1, dp: int | None = None, **more: Any
) -> dict[str, Any]:
    """A `parallel` section."""
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "context_parallel_size": cp,
        "data_parallel_size": dp,
        **more,
    }
