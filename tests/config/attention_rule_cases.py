"""Cases of the rules about multi-latent attention, for test_rules.py."""

from __future__ import annotations

from experiment_files import DENSE

LATENT = "model.multi_latent_attention"
GIVEN = f"{LATENT}={{q_lora_rank: 32}}"
TP, SP = "parallel.tensor_model_parallel_size", "parallel.sequence_parallel"
WINDOW, SKIP = "model.sliding_window", "model.window_attn_skip_freq"

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
        [GIVEN, "model.qk_norm=head"],
        ["model.qk_norm=null"],
        "model.qk_norm",
        "its narrow projections have norms always",
    ),
    (
        "keys_of_latent_attention",
        DENSE,
        [GIVEN, "model.qkv_bias=true"],
        ["model.qkv_bias=false"],
        "model.qkv_bias",
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
    (
        "windows_of_layers",
        DENSE,
        [f"{SKIP}=2"],
        [f"{WINDOW}=5"],
        SKIP,
        f"has no effect without {WINDOW}",
    ),
    (
        "windows_of_layers",
        DENSE,
        [f"{WINDOW}=5", f"{SKIP}=[0, 1]"],
        [f"{SKIP}=[0, 1, 0, 1]"],
        SKIP,
        "has 2 entries and not one for each of the model.num_layers",
    ),
    (
        "windows_of_layers",
        DENSE,
        [f"{WINDOW}=5", f"{SKIP}=1"],
        [f"{SKIP}=2"],
        SKIP,
        f"gives no layer {WINDOW}",
    ),
    (
        "windows_of_layers",
        DENSE,
        [f"{WINDOW}=5", f"{SKIP}=2", "model.mtp_num_layers=1"],
        [f"{SKIP}=null"],
        SKIP,
        "does not say whether the layers of model.mtp_num_layers",
    ),
    (
        "norm_of_all_heads",
        DENSE,
        ["model.qk_norm=all_heads", "model.normalization=LayerNorm"],
        ["model.normalization=RMSNorm"],
        "model.qk_norm",
        "is an RMSNorm",
    ),
    (
        "norm_of_all_heads",
        DENSE,
        ["model.qk_norm=all_heads", "model.num_query_groups=2", f"{TP}=4"],
        [f"{TP}=2"],
        "model.qk_norm",
        "all_heads needs whole heads of keys on each rank",
    ),
    (
        "attention_of_transformer_engine",
        DENSE,
        ["model.clip_qkv=8.0", "model.spec=transformer_engine"],
        ["model.spec=native"],
        "model.clip_qkv",
        "is not in the attention of model.spec",
    ),
    (
        "attention_of_transformer_engine",
        DENSE,
        ["model.attention_sinks=true", "model.spec=transformer_engine", "parallel.context_parallel_size=2"],
        ["model.spec=native"],
        "model.attention_sinks",
        "does not go with parallel.context_parallel_size",
    ),
]
