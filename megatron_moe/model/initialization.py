"""Initial weights, drawn by name, so that they don't depend on the layout.

Megatron-Core draws each rank's weights from that rank's random state, in the order in which it builds them:
another layout, another model. Here every weight has a random state of its own, seeded by (training.seed, its
global name). A rank draws the full matrix and keeps its part, so that any two layouts start from the same
model.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.model.activations import ACTIVATIONS
from megatron_moe.plan.stages import Stage

RESIDUAL = re.compile(r"\.(linear_proj|linear_fc2)(\.weight\d*)?$")
"""Projections back into the residual stream, scaled down by depth (GPT-2, sec. 2.3)."""

EXPERTS = re.compile(r"(.*\.experts\.linear_fc[12])(?:\.weight(\d+))?$")
"""The routed experts' weights: all local experts in one parameter, or with Transformer Engine's blocks one
each."""

SINKS = re.compile(r"\.softmax_offset$")
"""One number a head, drawn like a matrix."""

ADAPTER_OF_EXPERTS = re.compile(r".*\.experts\.lora_fc[12]\.lora_a$")
"""The half of their adapters that is drawn, of all local experts."""

BIAS = re.compile(r"bias\d*$")
"""Biases; Transformer Engine numbers those of its experts."""


@torch.no_grad()
def initialize(chunk: torch.nn.Module, experiment: Experiment, stage: Stage) -> None:
    """Draw every weight of `chunk` in place: normal(0, std); norms 1; biases 0.

    std is `model.init_method_std`, over sqrt(2 num_layers) for projections into the residual stream, and for
    the embeddings `model.megatron_core.embedding_init_method_std` where it is given. Routed experts and
    routers have it times `moe.moe_expert_init_scale` and `moe.moe_router_init_scale`. Of adapters A has the
    variance of the uniform distribution that LoRA's authors draw from, 1 / (3 in), and B is 0.

    Args:
        chunk: a GPTModel whose layers are those of `stage`.
    """
    model = experiment.model
    for name, parameter in chunk.named_parameters():
        if BIAS.search(name):
            parameter.zero_()
            continue
        if parameter.dim() == 1 and not SINKS.search(name):
            parameter.fill_(1.0)
            continue
        if name.endswith(".lora_b"):
            parameter.zero_()
            continue
        name = _global_name(name, stage, not model.untie_embeddings_and_output_weights)
        std = _standard_deviation(name, experiment)
        # Gate and up-projection lie one behind the other, and each is cut.
        blocks = 2 if "linear_fc1" in name and ACTIVATIONS[_activation(name, experiment)].is_gated else 1
        for piece, piece_name in _pieces(name, parameter, experiment):
            full_shape, part = _part_of_this_rank(name, parameter, piece.shape, blocks)
            if name.endswith(".lora_a"):
                std = 1 / math.sqrt(3 * full_shape[-1])
            generator = generator_of(experiment.training.seed, piece_name)
            full = torch.empty(full_shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
            piece.copy_(part(full))


def _standard_deviation(name: str, experiment: Experiment) -> float:
    model, moe = experiment.model, experiment.moe
    std = model.init_method_std / (math.sqrt(2 * model.num_layers) if RESIDUAL.search(name) else 1.0)
    if name.startswith("embedding."):
        return float(model.megatron_core.get("embedding_init_method_std") or std)
    if moe is not None and EXPERTS.match(name):
        return std * moe.moe_expert_init_scale
    if name.endswith(".router.gate.noise_weight"):
        return 0.0  # as Shazeer et al. 2017, appendix A
    if moe is not None and name.endswith(".router.weight"):
        return std * moe.moe_router_init_scale
    return std


def _activation(name: str, experiment: Experiment) -> str:
    if experiment.moe is None or not EXPERTS.match(name):
        return experiment.model.activation
    assert experiment.moe.moe_expert_activation is not None
    return experiment.moe.moe_expert_activation


def _global_name(name: str, stage: Stage, tied: bool) -> str:
    """`decoder.layers.0.x` of this stage -> `decoder.layers.<global number>.x`; a tied output layer is the
    embedding."""
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if name == "output_layer.weight" and tied:
        return "embedding.word_embeddings.weight"
    return f"decoder.layers.{stage.layers[int(match[1])]}.{match[2]}" if match else name


def _pieces(name: str, parameter: Tensor, experiment: Experiment) -> Iterator[tuple[Tensor, str]]:
    """Each separately seeded matrix inside a parameter: the local experts one by one, else the parameter
    itself."""
    experts = EXPERTS.match(name)
    if experts is None and not ADAPTER_OF_EXPERTS.match(name):
        yield parameter, name
        return
    from megatron.core import parallel_state

    assert experiment.moe is not None
    local = experiment.moe.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
    first = local * parallel_state.get_expert_model_parallel_rank()
    if experts is not None and experts[2] is not None:
        yield parameter, f"{experts[1]}.{first + int(experts[2])}"
        return
    for index, piece in enumerate(parameter):
        yield piece, f"{name if experts is None else experts[1]}.{first + index}"


def _part_of_this_rank(
    name: str, parameter: Tensor, shape: torch.Size, blocks: int
) -> tuple[list[int], Callable[[Tensor], Tensor]]:
    """The shape of the full matrix, and the function that cuts this tensor-parallel rank's part out of it."""
    from megatron.core import parallel_state

    if EXPERTS.match(name) or ADAPTER_OF_EXPERTS.match(name):
        # Transformer Engine's experts carry no mark of the cut.
        dim = 0 if "linear_fc1" in name else 1
        rank = parallel_state.get_expert_tensor_parallel_rank()
        size = parallel_state.get_expert_tensor_parallel_world_size()
    elif getattr(parameter, "tensor_model_parallel", False):
        dim = parameter.partition_dim  # type: ignore[attr-defined]
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
    else:
        return list(shape), lambda full: full
    full_shape = list(shape)
    full_shape[dim] *= size

    def cut(full: Tensor) -> Tensor:
        return torch.cat([block.chunk(size, dim=dim)[rank] for block in full.chunk(blocks, dim=dim)], dim=dim)

    return full_shape, cut


def generator_of(seed: int, name: str) -> torch.Generator:
    """The random state of what is drawn under this name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
