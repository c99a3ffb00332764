"""Matrix products of inference, without what training needs around them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Linear(torch.nn.Module):
    """Stands where Megatron-Core has a ColumnParallelLinear or RowParallelLinear, with its weights and its
    way of giving back a bias that others add.

    Theirs make ready for gradients, counting on overlap, at each call; for one token that takes longer than
    the product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, returns_bias: bool, group: Any = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.added = None if returns_bias else bias
        self.returned = bias if returns_bias else None
        self.group = group

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[.., in] -> [.., out], and the bias where it is left to others."""
        if self.group is None:
            return F.linear(x, self.weight, self.added), self.returned
        output = F.linear(x, self.weight)
        dist.all_reduce(output, group=self.group)
        return output if self.added is None else output + self.added, self.returned


class FeedForward(torch.nn.Module):
    """A dense layer's with a gate and nothing else around it; over `Linear` layers.

    Stands where Megatron-Core has an MLP.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = mlp.linear_fc1, mlp.linear_fc2
        self.activation = mlp.config.activation_func

    @staticmethod
    def fits(mlp: torch.nn.Module) -> bool:
        """Whether this computes what an MLP does."""
        from megatron.core.transformer.mlp import MLP

        if type(mlp) is not MLP:
            return False
        config: Any = mlp.config
        plain = config.activation_func_clamp_value is None and not config.glu_linear_offset
        return bool(config.gated_linear_unit and plain and not config.add_bias_linear)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """[.., h] -> [.., h], and no bias."""
        gate, up = self.linear_fc1(hidden)[0].chunk(2, dim=-1)
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(self.activation(gate).mul_(up))
        return output


def lighten(model: torch.nn.Module) -> None:
    """Put these into the places of Megatron-Core's in a model that only infers."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_moe.model.latent_attention import DownProjection

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DownProjection):
                setattr(parent, name, Linear(child.weight, None, returns_bias=False))
            # The output layer is left as it is: it may have no weight of its own.
            if name == "output_layer" or not isinstance(child, (ColumnParallelLinear, RowParallelLinear)):
                continue
            sums = isinstance(child, RowParallelLinear) and child.tp_group.size() > 1
            group = child.tp_group if sums else None
            setattr(parent, name, Linear(child.weight, child.bias, child.skip_bias_add, group))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if FeedForward.fits(child):
                setattr(parent, name, FeedForward(child))
