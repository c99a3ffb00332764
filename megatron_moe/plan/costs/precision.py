"""What a run computes on and in, as far as bytes depend on it."""

from __future__ import annotations

from megatron_moe.config.clusters import this_machine
from megatron_moe.config.schema import Experiment


def on_host(experiment: Experiment) -> bool:
    """Whether it is planned for a machine without GPU."""
    return experiment.launch.cluster.preset == "this-machine" and not this_machine.gpus()


def element_size(experiment: Experiment) -> int:
    """Bytes of a weight or an activation. Precision `auto` is bf16 on a GPU, else fp32."""
    precision = experiment.training.precision
    in_fp32 = precision == "fp32" or (precision == "auto" and on_host(experiment))
    return 4 if in_fp32 else 2
