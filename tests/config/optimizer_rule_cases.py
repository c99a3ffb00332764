"""Experiments that break the rules about learning rates and the growing batch; see test_rules."""

from __future__ import annotations

from experiment_files import DENSE, MOE

RATE, T, P = "optimizer.", "training.", "parallel."
WSD, ROOT = f"{RATE}lr_decay_style=WSD", f"{RATE}lr_decay_style=inverse-square-root"

OPTIMIZER_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "warmup_said_once",
        DENSE,
        [f"{RATE}lr_warmup_iters=3", f"{RATE}lr_warmup_fraction=0.1"],
        [f"{RATE}lr_warmup_fraction=null"],
        f"{RATE}lr_warmup_iters",
        "which means 1 iterations; keep one of the two",
    ),
    (
        "warmup_within_decay",
        DENSE,
        [f"{RATE}lr_warmup_iters=11"],
        [f"{RATE}lr_warmup_iters=10"],
        f"{RATE}lr_warmup_iters",
        "use at most 10",
    ),
    (
        "inverse_root_needs_warmup",
        DENSE,
        [ROOT],
        [f"{RATE}lr_warmup_iters=1"],
        f"{RATE}lr_warmup_iters",
        "leaves no decay: under",
    ),
    (
        "inverse_root_needs_warmup",
        DENSE,
        [ROOT, f"{T}train_iters=1"],
        [f"{RATE}lr_decay_style=cosine"],
        f"{RATE}lr_decay_style",
        "needs a warm-up and at least 2 iterations",
    ),
    (
        "wsd_keys_need_wsd",
        DENSE,
        [f"{RATE}lr_wsd_decay_iters=3"],
        [WSD],
        f"{RATE}lr_wsd_decay_iters",
        f'3 has no effect under {RATE}lr_decay_style ("cosine", default)',
    ),
    (
        "wsd_keys_need_wsd",
        DENSE,
        [f"{RATE}lr_wsd_decay_style=linear"],
        [f"{RATE}lr_wsd_decay_style=exponential"],
        f"{RATE}lr_wsd_decay_style",
        f"set {RATE}lr_decay_style to WSD, or leave it out",
    ),
    (
        "wsd_decay_after_warmup",
        DENSE,
        [WSD, f"{RATE}lr_wsd_decay_iters=8", f"{RATE}lr_warmup_iters=3"],
        [f"{RATE}lr_wsd_decay_iters=7"],
        f"{RATE}lr_wsd_decay_iters",
        "8 is more than the 7 iterations",
    ),
    ("min_lr_below_lr", DENSE, [f"{RATE}min_lr=1"], [f"{RATE}lr=1"], f"{RATE}min_lr", "use at most 0.0003"),
    (
        "min_lr_below_lr",
        DENSE,
        [f"{RATE}decoupled_min_lr=1e-3", f"{RATE}decoupled_lr=1e-4"],
        [f"{RATE}decoupled_min_lr=1e-4"],
        f"{RATE}decoupled_min_lr",
        f"is more than {RATE}decoupled_lr (0.0001, override); use at most 0.0001",
    ),
    (
        "min_lr_below_lr",
        MOE,
        [f"{RATE}min_lr=1e-4", f"{RATE}expert_lr=1e-5"],
        [f"{RATE}expert_min_lr=1e-5"],
        f"{RATE}min_lr",
        f"is more than {RATE}expert_lr (1e-05, override); set {RATE}expert_min_lr to at most 1e-05",
    ),
    (
        "expert_rates_need_experts",
        DENSE,
        [f"{RATE}expert_lr=1e-4"],
        [f"{RATE}expert_lr=null"],
        f"{RATE}expert_lr",
        "is for experts, and there is no section moe",
    ),
    (
        "ramp_reaches_batch",
        DENSE,
        [f"{T}rampup_batch_size=[8, 2, 100]"],
        [f"{T}rampup_batch_size=null"],
        f"{T}rampup_batch_size",
        f"starts with 8, which is not below {T}global_batch_size (8, experiment.yaml:4)",
    ),
    (
        "ramp_reaches_batch",
        DENSE,
        [f"{T}rampup_batch_size=[3, 2, 100]"],
        [f"{T}rampup_batch_size=[4, 2, 100]"],
        f"{T}rampup_batch_size",
        "by increments of 2 from 3; start with 4 or 2",
    ),
    (
        "ramp_over_replicas",
        DENSE,
        [f"{T}rampup_batch_size=[2, 3, 100]", f"{P}data_parallel_size=2"],
        [f"{T}rampup_batch_size=[2, 2, 100]"],
        f"{T}rampup_batch_size",
        "has an increment that is not divisible by",
    ),
    (
        "ramp_over_replicas",
        DENSE,
        [
            f"{T}rampup_batch_size=[4, 2, 100]",
            f"{P}pipeline_model_parallel_size=2",
            f"{P}virtual_pipeline_model_parallel_size=2",
            f"{T}micro_batch_size=2",
        ],
        [f"{T}micro_batch_size=1"],
        f"{T}rampup_batch_size",
        "4; use an increment of 4",
    ),
]
"""Rule, experiment, overrides that break it, and that repair it; key that is blamed, words of the message."""
