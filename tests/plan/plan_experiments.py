"""Filled experiments, as the loader hands them to the plan."""

from __future__ import annotations

from typing import Any

from megatron_moe.config.defaults import fill
from megatron_moe.config.schema import Experiment


def filled(**sections: dict[str, Any] | None) -> Experiment:
    """A small MoE experiment on one rank, every derived value set; `sections` extend or replace its keys."""
    document: dict[str, Any] = {
        "name": "small",
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "kv_channels": 16,
            "ffn_hidden_size": 96,
            "vocab_size": 250,
            "max_position_embeddings": 32,
        },
        "moe": {"num_moe_experts": 8, "moe_ffn_hidden_size": 48},
        "parallel": {
            "virtual_pipeline_model_parallel_size": 1,
            "expert_model_parallel_size": 1,
            "expert_tensor_parallel_size": 1,
            "data_parallel_size": 1,
            "sequence_parallel": False,
        },
        "pipeline": {"layers_per_stage": [4]},
        "recompute": {"layers_per_stage": [0]},
        "training": {"train_iters": 10, "global_batch_size": 8, "seq_length": 32},
    }
    for section, keys in sections.items():
        document[section] = None if keys is None else {**(document.get(section) or {}), **keys}
    return fill(Experiment.model_validate(document))
