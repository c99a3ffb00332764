"""What the keys of an experiment need of the machine it runs on: packages, GPUs, their compute capability.

`validate` and `plan` must work on a login node for an experiment that runs elsewhere: this is a table only,
which `launch.preflight` holds against the machine before ranks start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_moe.config.schema import Experiment


@dataclass(frozen=True)
class Package:
    """A package that no extra of ours installs.

    Attributes:
        module: what Megatron-Core imports.
        source: how to get it.
        version: the first one that has what is needed.
    """

    module: str
    source: str
    version: tuple[int, ...] = ()


@dataclass(frozen=True)
class Need:
    """What one key needs, beside a GPU, which all of them do.

    Attributes:
        otherwise: what to do without it.
        capability: the lowest compute capability of a GPU that computes it.
    """

    key: str
    otherwise: str = "leave it out"
    package: Package | None = None
    capability: tuple[int, int] | None = None


APEX = Package("fused_weight_gradient_mlp_cuda", "build NVIDIA's apex with --cpp_ext and --cuda_ext")
"""Megatron-Core's output layer needs it also beside Transformer Engine's own fusion (0.16.1 and 0.19.2)."""
DEEP_EP = {
    "deepep": Package("deep_ep", "build it from github.com/deepseek-ai/DeepEP"),
    "hybridep": Package("deep_ep", "build it from the branch hybrid-ep of github.com/deepseek-ai/DeepEP"),
}
FP8_RECIPES: dict[str, tuple[tuple[int, ...], tuple[int, int]]] = {
    "delayed": ((1, 11), (8, 9)),
    "tensorwise": ((2, 2), (8, 9)),
    "blockwise": ((2, 3), (9, 0)),
    "mxfp8": ((2, 1), (10, 0)),
}
"""training.fp8_recipe -> first version of Transformer Engine, lowest compute capability."""


def transformer_engine(*version: int) -> Package:
    """Transformer Engine, from a version on."""
    command = "pip install --no-build-isolation 'transformer-engine[pytorch]'"
    return Package("transformer_engine", command, version)


def needs_of(e: Experiment) -> Iterator[Need]:
    """What this experiment needs, one entry for each key that does."""
    o, t, moe = e.optimizer, e.training, e.moe
    if e.model.spec == "transformer_engine":
        yield Need("model.spec", "set it to native", transformer_engine())
    if e.model.apply_rope_fusion:
        yield Need("model.apply_rope_fusion", package=transformer_engine(1, 4))
    if moe is not None and moe.moe_permute_fusion:
        yield Need("moe.moe_permute_fusion", package=transformer_engine(2, 1))
    if moe is not None and moe.moe_token_dispatcher_type == "flex":
        backend = DEEP_EP[moe.moe_flex_dispatcher_backend]
        yield Need("moe.moe_token_dispatcher_type", "use alltoall", backend)
    if e.recompute.cpu_offloading_num_layers:
        yield Need("recompute.cpu_offloading_num_layers", package=transformer_engine())
    if o.use_precision_aware_optimizer:
        yield Need("optimizer.use_precision_aware_optimizer", package=transformer_engine(2, 1))
    if o.optimizer_cpu_offload:
        # Where it cannot compute in bf16, precision `auto` is fp32, which the offloaded optimizer refuses.
        yield Need("optimizer.optimizer_cpu_offload", capability=(8, 0))
    if t.fp8 is not None:
        version, capability = FP8_RECIPES[t.fp8_recipe]
        yield Need("training.fp8", package=transformer_engine(*version), capability=capability)
    if t.gradient_accumulation_fusion:
        yield Need("training.gradient_accumulation_fusion", package=APEX)
