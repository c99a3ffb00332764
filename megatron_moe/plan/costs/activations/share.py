"""What of a microbatch a rank computes."""

from __future__ import annotations

from typing import NamedTuple

from megatron_moe.config.schema import Experiment
from megatron_moe.plan.costs.precision import element_size, on_host
from megatron_moe.plan.layout import Layout


class Part(NamedTuple):
    """Bytes of a part of a layer."""

    kept: float
    """From the forward to the backward pass."""
    working: float
    """Beside that, while its forward or its backward pass runs."""


class Share(NamedTuple):
    """Tokens, elements and where they are computed."""

    batch: int
    """b."""
    length: float
    """Positions of each sequence that this rank's matrices see: s / CP."""
    tensor: int
    """TP."""
    context: int
    """CP."""
    is_sequence_parallel: bool
    element: int
    """Bytes of an activation."""
    on_host: bool
    modules: tuple[str, ...]
    """`recompute.modules`."""

    @classmethod
    def of(cls, experiment: Experiment, layout: Layout) -> Share:
        training, tensor = experiment.training, layout.tensor_model_parallel_size
        return cls(
            batch=training.micro_batch_size,
            length=training.seq_length / layout.context_parallel_size,
            tensor=tensor,
            context=layout.context_parallel_size,
            is_sequence_parallel=bool(experiment.parallel.sequence_parallel) and tensor > 1,
            element=element_size(experiment),
            on_host=on_host(experiment),
            modules=tuple(experiment.recompute.modules or ()),
        )

    def dropped(self, width: float, probability: float) -> float:
        """Bytes that tell what dropout left of rows between the matrices: on a host its factors."""
        return self.mine * width * (self.element if self.on_host else 1) if probability else 0.0

    @property
    def whole(self) -> float:
        """T: tokens that this rank's matrices see."""
        return self.batch * self.length

    @property
    def mine(self) -> float:
        """t: tokens between them."""
        return self.whole / self.tensor if self.is_sequence_parallel else self.whole
