"""The section `model`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_moe.config.schema.section import (
    Fraction,
    LayerCount,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Width,
)


class Yarn(Section):
    """Rotary positions stretched to longer sequences than the model was first trained on (YaRN, Peng et al.
    2023), as DeepSeek-V2 and V3 compute them."""

    rotary_scaling_factor: Annotated[float, Field(ge=1)] = 40.0
    """How many times longer sequences may be than original_max_position_embeddings."""
    original_max_position_embeddings: PositiveInt = 4096
    """Longest sequence before the stretching."""
    beta_fast: PositiveFloat = 32.0
    """Frequencies that turn more often than this within the original length stay as they are."""
    beta_slow: PositiveFloat = 1.0
    """Frequencies that turn less often than this are slowed down by the whole factor."""
    mscale: NonNegativeFloat = 1.0
    """Rotated parts are multiplied by (0.1 mscale ln factor + 1) / (0.1 mscale_all_dim ln factor + 1)."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """The softmax scale is multiplied by (0.1 mscale_all_dim ln factor + 1)^2."""


class MultiLatentAttention(Section):
    """Multi-head latent attention (DeepSeek-V2): keys and values, and if wanted queries, pass through a
    narrow projection with a norm behind it, and positions reach a part of each head of their own."""

    q_lora_rank: Width | None = None
    """Width of the narrow projection of queries. Default: queries are projected at once."""
    kv_lora_rank: Width = 512
    """Width of the narrow projection that keys and values share."""
    qk_head_dim: Width = 128
    """Part of each query and key head without positions."""
    qk_pos_emb_head_dim: Width = 64
    """Part of each query and key head that is rotated; keys share one among all heads."""
    v_head_dim: Width = 128
    """Width of a value head."""
    yarn: Yarn | None = None
    """Stretched rotary positions. Default: plain ones."""


class Model(Section):
    """The transformer."""

    num_layers: LayerCount
    """Transformer layers."""
    hidden_size: Width
    """Width h of the residual stream."""
    num_attention_heads: Width
    """Query heads."""
    num_query_groups: Width | None = None
    """Key and value heads (grouped-query attention). Default: num_attention_heads."""
    kv_channels: Width | None = None
    """Width of one attention head; under multi_latent_attention that of its query heads, qk_head_dim +
    qk_pos_emb_head_dim. Default: hidden_size / num_attention_heads."""
    ffn_hidden_size: Width | None = None
    """Inner width of a dense feed-forward layer. Default: 4 x hidden_size."""
    vocab_size: Width | None = None
    """Token ids the model knows, before padding. Default: the tokenizer's."""
    make_vocab_size_divisible_by: Width = 128
    """The vocabulary is padded to a multiple of this. Unlike in Megatron-LM it does not depend on the
    tensor-parallel size, so that a checkpoint fits every layout."""
    max_position_embeddings: Width | None = None
    """Longest sequence that positions are defined for. Default: training.seq_length."""
    multi_latent_attention: MultiLatentAttention | None = None
    """Attention through narrow projections, instead of num_query_groups and kv_channels. Leave the section
    out for grouped-query attention."""
    mtp_num_layers: NonNegativeInt = 0
    """Multi-token-prediction layers (DeepSeek-V3) behind the last layer, of its kind: each predicts one token
    further."""
    mtp_loss_scaling_factor: PositiveFloat = 0.1
    """Weight of their loss, a mean over them, beside the language-model loss."""
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    """How positions reach the model."""
    rotary_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies (theta)."""
    rotary_percent: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of each head that is rotated."""
    apply_rope_fusion: bool = False
    """Rotate in one kernel. Needs Transformer Engine and a GPU."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Normalisation of every layer's inputs and of the final output."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Added to the variance."""
    activation: Literal["swiglu", "geglu", "gelu", "relu", "squared_relu"] = "swiglu"
    """Feed-forward activation, dense layers and experts alike."""
    untie_embeddings_and_output_weights: bool = True
    """Whether the output layer has a weight of its own."""
    init_method_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream take std / sqrt(2
    num_layers)."""
    hidden_dropout: Fraction = 0.0
    """Dropout on each residual branch."""
    attention_dropout: Fraction = 0.0
    """Dropout on attention probabilities."""
    spec: Literal["native", "transformer_engine"] = "native"
    """Which building blocks. `native` needs neither Transformer Engine nor apex. Recorded in the checkpoint;
    never chosen by what happens to be installed."""
    megatron_core: dict[str, Any] = Field(default_factory=dict)
    """Any further field of Megatron-Core's `TransformerConfig`, checked by name and type against the
    installed version."""
