"""The layer specs of this rank: which building block stands where."""

from __future__ import annotations

from typing import Any, Literal

from megatron_moe.config.schema import Experiment
from megatron_moe.config.schema.model import Model
from megatron_moe.engine.versions import accept_as_linear, moe_submodules
from megatron_moe.model import lora, uneven_heads
from megatron_moe.model.attention import CoreAttention
from megatron_moe.model.attention_parts import biased, clipped
from megatron_moe.model.norms import Norm, NormOfKeys, NormOfQueries
from megatron_moe.plan.costs.weights import kind_of_mtp_layers
from megatron_moe.plan.journeys import choice
from megatron_moe.plan.stages import Stage


def block_spec(experiment: Experiment, config: Any, stage: Stage) -> Any:
    """Megatron-Core's block spec with one layer spec for each layer of `stage`, dense or MoE."""
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    norm: Any = Norm
    if experiment.model.spec == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    dense, moe = _layer_spec(experiment, config, "dense"), None
    if experiment.moe is not None:
        moe = _layer_spec(experiment, config, "moe")
    return TransformerBlockSubmodules(
        layer_specs=[moe if layer in stage.moe_layers else dense for layer in stage.layers], layer_norm=norm
    )


def prediction_spec(experiment: Experiment, config: Any, stage: Stage) -> Any:
    """Megatron-Core's spec of the multi-token-prediction layers of `stage`; None where it has none."""
    if not stage.num_mtp_layers:
        return None
    from megatron_moe.model.multi_token import Parts, block_spec

    layer = _layer_spec(experiment, config, kind_of_mtp_layers(experiment))
    if experiment.model.spec == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

        parts = Parts(TENorm, TEColumnParallelLinear, layer)
    else:
        from megatron.core.tensor_parallel import ColumnParallelLinear

        parts = Parts(Norm, ColumnParallelLinear, layer)
    return block_spec(parts, stage.num_mtp_layers)


def _layer_spec(experiment: Experiment, config: Any, kind: Literal["dense", "moe"]) -> Any:
    native = experiment.model.spec == "native"
    make = native_layer_spec if native else transformer_engine_layer_spec
    spec = make(config, num_experts=config.num_moe_experts if kind == "moe" else None)
    attention = spec.submodules.self_attention
    _adapt_attention(attention, experiment.model)
    if uneven_heads.are_uneven(experiment):
        attention.module = uneven_heads.uneven(attention.module)
    lora.put_into(spec, experiment, has_experts=kind == "moe")
    if kind == "moe":
        _use_our_moe_layer(spec, experiment, config)
    return spec


def _adapt_attention(attention: Any, model: Model) -> None:
    """Put into the spec of attention what Megatron-Core's config has no field for."""
    parts = attention.submodules
    # `add_bias_linear` says it of all linear layers.
    if model.attention_output_bias != model.mlp_bias:
        parts.linear_proj = biased(parts.linear_proj, model.attention_output_bias)
    if model.qkv_bias != model.mlp_bias and model.multi_latent_attention is None:
        parts.linear_qkv = biased(parts.linear_qkv, model.qkv_bias)
    if model.qk_norm == "all_heads":
        parts.q_layernorm, parts.k_layernorm = NormOfQueries, NormOfKeys
    if model.clip_qkv is not None:
        attention.module = clipped(attention.module, model.clip_qkv)


def native_layer_spec(config: Any, num_experts: int | None) -> Any:
    """A transformer layer that needs neither Transformer Engine nor apex; MoE unless `num_experts` is
    None."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(
        num_experts=num_experts,
        normalization=config.normalization,
        qk_layernorm=config.qk_layernorm,
        qk_l2_norm=config.qk_l2_norm,
        multi_latent_attention=config.multi_latent_attention,
    )
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    attention = parts.self_attention.submodules
    attention.core_attention = CoreAttention
    # In the checkpoint norms are named as Transformer Engine's spec names them, fused into the linear layer
    # behind them.
    if config.multi_latent_attention:
        names = _make_latent(parts.self_attention, has_query_norm=config.q_lora_rank is not None)
    else:
        names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        if config.qk_layernorm and not config.qk_l2_norm:
            attention.q_layernorm = attention.k_layernorm = Norm
    if num_experts is None:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    parts.sharded_state_dict_keys_map = names
    return spec


def _make_latent(attention: Any, has_query_norm: bool) -> dict[str, str]:
    """Put our parts into the spec of multi-latent attention; the names of its norms in a checkpoint."""
    from megatron_moe.model.latent_attention import DownProjection, LatentAttention

    accept_as_linear(DownProjection)
    attention.module = LatentAttention
    parts = attention.submodules
    parts.linear_q_down_proj = parts.linear_kv_down_proj = DownProjection
    parts.q_layernorm, parts.kv_layernorm = (Norm if has_query_norm else None), Norm
    return {
        f"self_attention.{part}_layernorm.": f"self_attention.linear_{part}_up_proj.layer_norm_"
        for part in ("q", "kv")
    }


def transformer_engine_layer_spec(config: Any, num_experts: int | None) -> Any:
    """A transformer layer of Transformer Engine's blocks, experts as its grouped products; MoE unless
    `num_experts` is None."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts,
        moe_grouped_gemm=num_experts is not None,
        qk_layernorm=config.qk_layernorm,
        qk_l2_norm=config.qk_l2_norm,
        multi_latent_attention=config.multi_latent_attention,
    )


def _use_our_moe_layer(layer_spec: Any, experiment: Experiment, config: Any) -> None:
    from megatron_moe.model.moe.megatron import experts_class, layer_class, router_class

    assert experiment.moe is not None
    parts, seed = layer_spec.submodules, experiment.training.seed
    submodules = moe_submodules(parts.mlp)
    lora.put_into_shared_experts(submodules, experiment)
    if experiment.model.spec == "native":
        submodules.experts = experts_class(experiment.moe, experiment.training.lora)
    if experiment.moe.moe_token_dispatcher_type == "flex" or experiment.moe.overlap_moe_expert_parallel_comm:
        # The library's kernels are called by Megatron-Core's own layer, and its schedule takes that apart.
        submodules.router = router_class(experiment.moe, seed)
    else:
        settings = experiment.moe.model_copy(
            update={"moe_token_dispatcher_type": choice(experiment).dispatcher}
        )
        parts.mlp = layer_class(settings, seed, submodules)
