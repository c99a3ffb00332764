"""Cases of test_rules.py about rotary positions that are stretched."""

from __future__ import annotations

from experiment_files import DENSE

SCALING = "model.rotary_scaling"
YARN = f"{SCALING}={{kind: yarn, factor: 4, original_max_position_embeddings: 8}}"
LLAMA = f"{SCALING}={{kind: llama3, factor: 4, original_max_position_embeddings: 8}}"

POSITION_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "keys_of_rotary_scaling",
        DENSE,
        [f"{SCALING}={{kind: linear, factor: 2, beta_fast: 16}}"],
        [f"{SCALING}.beta_fast=32"],
        f"{SCALING}.beta_fast",
        f"has no effect under {SCALING}.kind",
    ),
    (
        "keys_of_rotary_scaling",
        DENSE,
        [f"{SCALING}={{kind: llama3, factor: 2}}"],
        [f"{SCALING}.original_max_position_embeddings=8"],
        f"{SCALING}.original_max_position_embeddings",
        f"is missing, and {SCALING}.kind",
    ),
    (
        "rotary_scaling_can_be_computed",
        DENSE,
        [LLAMA, "model.position_embedding_type=none"],
        [f"{SCALING}=null"],
        SCALING,
        "has no effect on positions other than rope",
    ),
    (
        "rotary_scaling_can_be_computed",
        DENSE,
        [LLAMA, f"{SCALING}.low_freq_factor=4"],
        [f"{SCALING}.low_freq_factor=1"],
        f"{SCALING}.high_freq_factor",
        f"is not more than {SCALING}.low_freq_factor (4.0, override)",
    ),
    (
        "rotary_scaling_can_be_computed",
        DENSE,
        [YARN, "model.rotary_percent=0.5"],
        ["model.rotary_percent=1.0"],
        f"{SCALING}.kind",
        "does not sharpen scores of which only a part is rotated",
    ),
    (
        "rotary_scaling_can_be_computed",
        DENSE,
        [YARN, "model.rotary_base=1.0"],
        ["model.rotary_base=10000"],
        "model.rotary_base",
        "is not more than 1",
    ),
]
