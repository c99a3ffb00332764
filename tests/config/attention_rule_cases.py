"""Cases of the rules about multi-latent attention, for test_rules.py."""

from __future__ import annotations

from experiment_files import DENSE

LATENT = "model.multi_latent_attention"
GIVEN = f"{LATENT}={{q_lora_rank: 32}}"
TP, SP = "parallel.tensor_model_parallel_size", "parallel.sequence_parallel"
FIELDS = "model.megatron_core"

ATTENTION_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "keys_of_latent_attention",
        DENSE,
        [GIVEN, "model.kv_channels=64"],
        ["model.kv_channels=null"],
        "model.kv_channels",
        f"64 is not 192, {LATENT}.qk_head_dim plus qk_pos_emb_head_dim",
    ),
    (
        "keys_of_latent_attention",
        DENSE,
        [GIVEN, "model.num_query_groups=2"],
        ["model.num_query_groups=null"],
        "model.num_query_groups",
        "2 is not model.num_attention_heads",
    ),
    (
        "keys_of_latent_attention",
        DENSE,
        [GIVEN, "model.position_embedding_type=learned_absolute"],
        ["model.position_embedding_type=rope"],
        "model.position_embedding_type",
        "whose heads have a rotated part; set it to rope",
    ),
    (
        "keys_of_latent_attention",
        DENSE,
        [GIVEN, "model.rotary_percent=0.5"],
        ["model.rotary_percent=1.0"],
        "model.rotary_percent",
        "qk_pos_emb_head_dim channels are rotated",
    ),
    (
        "keys_of_latent_attention",
        DENSE,
        [GIVEN, f"{FIELDS}.qk_layernorm=true"],
        [],
        f"{FIELDS}.qk_layernorm",
        "its narrow projections have norms always",
    ),
    (
        "keys_of_latent_attention",
        DENSE,
        [GIVEN, f"{FIELDS}.add_bias_linear=true"],
        [],
        f"{FIELDS}.add_bias_linear",
        "its projections have no biases",
    ),
    (
        "latent_attention_can_be_built",
        DENSE,
        [GIVEN, f"{TP}=2", f"{SP}=false"],
        [f"{SP}=true"],
        SP,
        "would learn from a part of the heads only; set it to true",
    ),
    (
        "latent_attention_can_be_built",
        DENSE,
        [f"{LATENT}={{kv_lora_rank: 32}}", "model.spec=transformer_engine"],
        [f"{LATENT}.q_lora_rank=32"],
        "model.spec",
        f"needs {LATENT}.q_lora_rank",
    ),
    (
        "latent_attention_can_be_built",
        DENSE,
        [GIVEN, "model.spec=transformer_engine", "model.apply_rope_fusion=true"],
        [f"{LATENT}.yarn={{rotary_scaling_factor: 4}}"],
        "model.apply_rope_fusion",
        f"needs {LATENT}.yarn",
    ),
    (
        "rope_needs_even_width",
        DENSE,
        [GIVEN, f"{LATENT}.qk_pos_emb_head_dim=7"],
        [f"{LATENT}.qk_pos_emb_head_dim=6"],
        f"{LATENT}.qk_pos_emb_head_dim",
        "7 is rotated in pairs, and odd; use 6 or 8",
    ),
]
