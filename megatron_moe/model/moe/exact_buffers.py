"""A module whose buffers keep their precision when its weights are cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

_M = TypeVar("_M", bound="ExactBuffers")


class ExactBuffers(torch.nn.Module):
    """Buffers of its own stay as exact as they were registered under `.bfloat16()` and the like, which
    mixed-precision wrappers call: the small steps that iterations add to them would be lost in bf16."""

    def _apply(self: _M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _M:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            changed = self._buffers[name]
            if buffer is not None and changed is not None and changed.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(changed.device)
        return self
