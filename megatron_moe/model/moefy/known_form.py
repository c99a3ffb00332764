"""Feed-forward layers of a known form, as the weights of experts that are computed together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.model.activations import ACTIVATIONS
from megatron_moe.model.moefy.feed_forward import FeedForward, matrix_of


@dataclass(frozen=True)
class KnownForm:
    """fc2(act(fc1 x)), as `moe.experts.Experts` computes it.

    Attributes:
        activation: a name of `ACTIVATIONS`.
        fc1: [g * f, h], the gate's rows first. fc2: [h, f].
        biases: [g * f] and [h]; None: there are none.
        trained: whether fc1 and fc2 with their biases are.
    """

    activation: str
    fc1: Tensor
    fc2: Tensor
    biases: tuple[Tensor, Tensor] | None
    trained: tuple[bool, bool]

    @property
    def width(self) -> int:
        """f."""
        return self.fc2.size(1)


@torch.no_grad()
def known_form(layer: FeedForward) -> KnownForm | None:
    """The layer's weights where it computes what experts do, by a trial on random input; else None."""
    if len(layer.matrices) < 2 or not layer.is_plain or not callable(layer.activation):
        return None
    *inner, last = layer.matrices
    parts = [matrix_of(linear) for linear in inner]
    fc2 = matrix_of(last)
    if fc2 is None or any(part is None or part.size(1) != fc2.size(0) for part in parts):
        return None
    fc1 = torch.cat([part for part in parts if part is not None])
    gated = fc1.size(0) == 2 * fc2.size(1)
    if not gated and fc1.size(0) != fc2.size(1):
        return None
    biases = [bias for linear in layer.matrices if isinstance(bias := getattr(linear, "bias", None), Tensor)]
    trained = [_trained(linears) for linears in (inner, [last])]
    activation = _name_of(layer.activation, gated, fc1)
    if activation is None or len(biases) not in (0, len(layer.matrices)) or None in trained:
        return None
    both = (torch.cat(biases[:-1]), biases[-1]) if biases else None
    form = KnownForm(activation, fc1, fc2, both, (bool(trained[0]), bool(trained[1])))
    return form if _agrees(form, layer) else None


def _trained(linears: list[torch.nn.Module]) -> bool | None:
    """Whether their parameters are trained; None: some are."""
    kinds = {parameter.requires_grad for linear in linears for parameter in linear.parameters()}
    return kinds.pop() if len(kinds) == 1 else None


def _name_of(activation: Callable[[Tensor], Any], gated: bool, like: Tensor) -> str | None:
    """The activation's name, by its values."""
    x = torch.linspace(-6, 6, 97, device=like.device)
    try:
        values = activation(x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    for name, known in ACTIVATIONS.items():
        # A layer that is told by its activation's values has no limits around them.
        if (
            known.is_gated == gated
            and known.limit is None
            and isinstance(values, Tensor)
            and torch.allclose(values, known.function(x), atol=1e-6)
        ):
            return name
    return None


def _agrees(form: KnownForm, layer: FeedForward) -> bool:
    """Whether the layer gives for random tokens what its form says."""
    if form.fc1.is_meta:
        return False
    x = torch.randn(4, form.fc1.size(1), generator=torch.Generator().manual_seed(0)).to(form.fc1)
    modes = [(module, module.training) for module in layer.dense.modules()]
    layer.dense.eval()
    try:
        dense: Any = layer.dense(x)
    finally:
        for module, mode in modes:
            module.training = mode
    if layer.of_megatron:
        dense = dense[0] if dense[1] is None else dense[0] + dense[1]
    if not isinstance(dense, Tensor) or dense.shape != x.shape:
        return False
    first, second = (None, None) if form.biases is None else form.biases
    inner = F.linear(x, form.fc1, first)
    expected = F.linear(ACTIVATIONS[form.activation].apply(inner), form.fc2, second)
    tolerance = 1e-5 if form.fc1.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((dense - expected).norm() <= tolerance * expected.norm())
