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


class RotaryScaling(Section):
    """Rotary positions of a model that was stretched to longer sequences, as `transformers` computes them
    from `rope_scaling`. Multi-latent attention has its own section, `yarn`."""

    kind: Literal["linear", "llama3", "yarn"]
    """`linear`: all frequencies over factor. `llama3`: the slow ones over factor, the fast ones as they are,
    in between a mixture (Llama 3.1). `yarn`: likewise, and scores are sharpened (Peng et al. 2023;
    gpt-oss)."""
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """How many times longer sequences may be."""
    original_max_position_embeddings: PositiveInt | None = None
    """Longest sequence before the stretching. For `llama3` and `yarn`."""
    low_freq_factor: PositiveFloat = 1.0
    """For `llama3`: what turns less often than this within the original length is slowed down by the whole
    factor."""
    high_freq_factor: PositiveFloat = 4.0
    """For `llama3`: what turns more often than this within the original length stays as it is."""
    beta_fast: PositiveFloat = 32.0
    """For `yarn`: what turns more often than this within the original length stays as it is."""
    beta_slow: PositiveFloat = 1.0
    """For `yarn`: what turns less often than this within the original length is slowed down by the whole
    factor."""
    truncate: bool = True
    """For `yarn`: round the channels where the mixture begins and ends to whole ones (gpt-oss: false)."""
    attention_factor: PositiveFloat | None = None
    """For `yarn`: rotated queries and keys are both multiplied by this. Default: 0.1 ln(factor) + 1."""


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
    rotary_scaling: RotaryScaling | None = None
    """Stretched rotary positions. Leave the section out for plain ones."""
    apply_rope_fusion: bool = False
    """Rotate in one kernel. Needs Transformer Engine and a GPU."""
    sliding_window: PositiveInt | None = None
    """Tokens that each token sees: itself and those before it (Mistral: 4096). Default: all before it."""
    window_attn_skip_freq: PositiveInt | list[Annotated[int, Field(ge=0, le=1)]] | None = None
    """Which layers have sliding_window. n: all but every n-th (gpt-oss: 2, the first, third, ..). A list of 0
    and 1, one entry a layer: 1 has it (Qwen2: from max_window_layers on). Default: all layers."""
    attention_sinks: bool = False
    """Each head has a learnt logit in the softmax that attends to nothing (gpt-oss)."""
    qk_norm: Literal["head", "all_heads"] | None = None
    """Norm of queries and of keys before they are rotated: of each head by itself, with the same weights for
    all heads (Qwen3), or of all heads together (OLMoE). Default: none."""
    clip_qkv: PositiveFloat | None = None
    """Queries, keys and values are clamped to this, behind the norm and before the rotation (OLMoE). Default:
    no limit."""
    qkv_bias: bool = False
    """Biases of the projections of queries, keys and values (Qwen2)."""
    attention_output_bias: bool = False
    """Bias of the projection behind attention (gpt-oss; with qkv_bias what Llama's attention_bias means)."""
    mlp_bias: bool = False
    """Biases of feed-forward layers, dense ones and routed experts alike (gpt-oss). Not of shared experts."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Normalisation of every layer's inputs and of the final output."""
    layernorm_epsilon: PositiveFloat = 1e-5
    """Added to the variance."""
    activation: Literal["swiglu", "geglu", "clamped_swiglu", "gelu", "relu", "squared_relu"] = "swiglu"
    """Feed-forward activation, dense layers and experts alike. `clamped_swiglu` is gpt-oss's: (up + 1) *
    gate * sigmoid(1.702 gate), with the gate at most 7 and up within 7 of 0."""
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
