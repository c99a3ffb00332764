"""Where in the run the tokens stand that a layer sees, so that what its adapters drop depends on nothing
else.

Megatron-Core hands marks of the tokens through all layers, and recomputes whole layers with them (see
`model.moe.marks`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_moe.model.moe.marks import positions_of

if TYPE_CHECKING:
    from megatron_moe.model.lora import Adapter


class Places:
    """Of one microbatch's tokens in one layer.

    Args:
        marks: [b, s], of this tensor-parallel rank's part of the sequence or of all of it.
        length: s of the layer's input, a part under sequence parallelism.
        group: TP under sequence parallelism, else None.
    """

    def __init__(self, marks: Tensor, length: int, group: Any) -> None:
        places = positions_of(marks).transpose(0, 1).contiguous()
        self._length, self._whole = length, places
        if group is None or group.size() == 1:
            self._part = places
        elif len(places) == length:
            self._part = places
            parts = [torch.empty_like(places) for _ in range(group.size())]
            torch.distributed.all_gather(parts, places, group=group)
            self._whole = torch.cat(parts)
        else:
            self._part = places.chunk(group.size())[group.rank()]

    def of_length(self, length: int) -> Tensor:
        """[s, b] of the input of a linear layer, which sees this rank's part of the sequence or all of it."""
        return self._part if length == self._length else self._whole


def follow(layer: torch.nn.Module, adapters: list[Adapter], group: Any) -> None:
    """Tell a transformer layer's adapters before each pass which tokens come."""

    def look(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not layer.training:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        places = Places(kwargs["padding_mask"], hidden.size(0), group)
        for adapter in adapters:
            adapter.places = places

    layer.register_forward_pre_hook(look, with_kwargs=True)
