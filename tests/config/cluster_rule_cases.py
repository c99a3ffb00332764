"""Experiments that break the rules about the machines that are planned with; see test_rules."""

from __future__ import annotations

from experiment_files import DENSE

CLUSTER = "launch.cluster."
TE = ["model.spec=transformer_engine", "training.precision=bf16"]

CLUSTER_CASES: list[tuple[str, str, list[str], list[str], str, str]] = [
    (
        "memory_is_left",
        DENSE,
        [f"{CLUSTER}memory_gib=2", f"{CLUSTER}preset=a100"],
        [f"{CLUSTER}reserved_gib=1"],
        f"{CLUSTER}memory_gib",
        "use more than 3, or set launch.cluster.reserved_gib lower",
    ),
    (
        "units_for_fp8",
        DENSE,
        [f"{CLUSTER}preset=a800", "training.fp8=hybrid", *TE],
        [f"{CLUSTER}preset=h800"],
        "training.fp8",
        'the GPUs of launch.cluster.preset ("a800", override) do not have',
    ),
]
