"""Run as a script: what Megatron-Core itself builds at every rank position, on torch's fake process group.

Reads from stdin a JSON list of cases: `{"layout": the fields of Layout}`, with a model also `"config"` and
`"model"`, keyword arguments of `TransformerConfig` and `GPTModel`. Writes a JSON list with one entry a case,
a list over ranks of `{"groups": {kind: ranks or null}, "chunks": [{"layers": from 0, "parameters": count}]}`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.transformer import MLATransformerConfig, TransformerConfig, multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from torch.testing._internal.distributed.fake_pg import FakeStore

GETTERS: dict[str, Callable[[], Any]] = {
    "tp": parallel_state.get_tensor_model_parallel_group,
    "pp": parallel_state.get_pipeline_model_parallel_group,
    "cp": parallel_state.get_context_parallel_group,
    "dp": parallel_state.get_data_parallel_group,
    "dp_cp": lambda: parallel_state.get_data_parallel_group(with_context_parallel=True),
    "tp_cp": parallel_state.get_tensor_and_context_parallel_group,
    "tp_dp_cp": lambda: parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
    "ep": parallel_state.get_expert_model_parallel_group,
    "expert_tp": parallel_state.get_expert_tensor_parallel_group,
    "expert_dp": parallel_state.get_expert_data_parallel_group,
    "tp_ep": parallel_state.get_expert_tensor_and_model_parallel_group,
    "embedding": lambda: parallel_state.get_embedding_group(check_initialized=False),
}


# Tied embeddings are moved to a GPU for a reduction, which the fake process group leaves out anyway.
torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor
# Latent attention makes the frequencies of its positions on a GPU, and asks whether its parts are of classes
# that it has with Transformer Engine only.
torch.cuda.current_device = lambda: "cpu"
multi_latent_attention.TELinear = type("TELinear", (), {})


def chunk_at(case: dict[str, Any], pipeline_rank: int, chunk: int) -> dict[str, Any]:
    """One model chunk of stock Megatron-Core: which layers it has and how many parameters."""
    sizes = dict(case["layout"])
    del sizes["data_parallel_size"]
    pipeline_size, virtual_size = (
        sizes["pipeline_model_parallel_size"],
        sizes["virtual_pipeline_model_parallel_size"],
    )
    sizes["virtual_pipeline_model_parallel_size"] = virtual_size if virtual_size > 1 else None
    kind = MLATransformerConfig if "kv_lora_rank" in case["config"] else TransformerConfig
    config = kind(
        **sizes,
        **{"add_bias_linear": False} | case["config"],
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        pipeline_dtype=torch.float32,
    )
    virtual_rank = chunk if virtual_size > 1 else None
    layers = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=virtual_rank)
    if config.multi_latent_attention:
        # Its attention without Transformer Engine does not take heads of other widths, and has no weights.
        for layer in layers.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = IdentityOp
    further = None
    if config.mtp_num_layers:
        further = get_gpt_mtp_block_spec(config, layers, use_transformer_engine=False, vp_stage=virtual_rank)
    model = GPTModel(
        config=config,
        transformer_layer_spec=layers,
        mtp_block_spec=further,
        pre_process=pipeline_rank == 0 and chunk == 0,
        post_process=pipeline_rank == pipeline_size - 1 and chunk == virtual_size - 1,
        vp_stage=virtual_rank,
        **case["model"],
    )
    return {
        "layers": [layer.layer_number - 1 for layer in model.decoder.layers],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def at_rank(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    sizes = dict(case["layout"])
    data_parallel_size = sizes.pop("data_parallel_size")
    virtual_size = sizes.pop("virtual_pipeline_model_parallel_size")
    world_size = (
        sizes["tensor_model_parallel_size"]
        * sizes["pipeline_model_parallel_size"]
        * sizes["context_parallel_size"]
        * data_parallel_size
    )
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(
        **sizes,
        virtual_pipeline_model_parallel_size=virtual_size if virtual_size > 1 else None,
        order="tp-cp-ep-dp-pp",
        create_gloo_process_groups=False,
    )
    try:
        groups = {kind: getter() for kind, getter in GETTERS.items()}
        members = {
            kind: None if group is None else torch.distributed.get_process_group_ranks(group)
            for kind, group in groups.items()
        }
        chunks = []
        if "model" in case:
            pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
            chunks = [chunk_at(case, pipeline_rank, chunk) for chunk in range(virtual_size)]
        return {"groups": members, "chunks": chunks}
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def every_rank(case: dict[str, Any]) -> list[dict[str, Any]]:
    sizes = case["layout"]
    ranks = (
        sizes["tensor_model_parallel_size"]
        * sizes["pipeline_model_parallel_size"]
        * sizes["context_parallel_size"]
        * sizes["data_parallel_size"]
    )
    return [at_rank(rank, case) for rank in range(ranks)]


if __name__ == "__main__":
    json.dump([every_rank(case) for case in json.load(sys.stdin)], sys.stdout)
