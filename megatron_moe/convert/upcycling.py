"""A dense model's weights as those of a mixture of experts that computes the same at first.

The experts lie replica by replica: expert r G + g is slice g of copy r, where G is the granularity. All
slices of a copy start with the same row of the router, so that a token's k experts are k / G whole copies of
the dense layer (the virtual groups of He et al. 2024, "Upcycling Large Language Models into Mixture of
Experts").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.config.moe_layers import moe_layers
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.upcycling_rules import Changes, granularity_of, obstacles, scale_of
from megatron_moe.convert.weights import Weight, Weights
from megatron_moe.model.activations import ACTIVATIONS
from megatron_moe.model.initialization import generator_of

_LAYER = re.compile(r"(decoder\.layers\.(\d+)\.|mtp\.layers\.\d+\.transformer_layer\.)(.*)")
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(linear_fc[12])\.(weight|bias)")
_NORM, _NORM_OF_DENSE = "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"


class Upcycled:
    """The weights of the mixture of experts, computed one at a time from the dense ones."""

    def __init__(self, dense: Weights, before: Experiment, after: Experiment, changes: Changes) -> None:
        """`before` and `after`: the dense experiment and the one with experts. InputError where the second
        cannot start as the first."""
        assert after.moe is not None
        if problems := obstacles(before, after, changes):
            raise InputError(*problems)
        self._dense, self._moe, self._changes = dense, after.moe, changes
        self._has_experts = moe_layers(after)
        self._granularity = granularity_of(before, after)
        self._scale = scale_of(after, self._granularity)
        self._gates = 2 if ACTIVATIONS[before.model.activation][1] else 1
        self._hidden_size = after.model.hidden_size
        self._has_router_bias = after.moe.moe_router_bias

    def inventory(self) -> Mapping[str, Weight]:
        return self._inventory

    def read(self, name: str) -> Tensor:
        weight = self._inventory[name]
        match = _LAYER.fullmatch(name)
        if match is None or not self._is_mixture(match):
            return self._dense.read(name)
        start, part = match[1], match[3]
        if part.startswith(_NORM):
            return self._dense.read(start + part.replace(_NORM, _NORM_OF_DENSE))
        if part == "mlp.router.weight":
            return self._router(name).to(weight.dtype)
        if part in ("mlp.router.bias", "mlp.router.expert_bias"):
            return torch.zeros(weight.shape, dtype=weight.dtype)
        expert = _EXPERT.fullmatch(name)
        return self._dense.read(name) if expert is None else self._expert(expert)

    @cached_property
    def _inventory(self) -> dict[str, Weight]:
        found: dict[str, Weight] = {}
        for name, weight in self._dense.inventory().items():
            match = _LAYER.fullmatch(name)
            if match is None or not self._is_mixture(match) or not match[3].startswith("mlp."):
                found[name] = weight
            else:
                found |= self._of_feed_forward(match[1], match[3], weight)
        return found

    def _is_mixture(self, match: re.Match[str]) -> bool:
        """Whether a layer has experts; those that predict further tokens are of the last layer's kind."""
        return self._has_experts[-1 if match[2] is None else int(match[2])]

    def _of_feed_forward(self, start: str, part: str, weight: Weight) -> dict[str, Weight]:
        """What becomes of one weight of a dense feed-forward layer."""
        if part.startswith(_NORM_OF_DENSE):
            return {start + part.replace(_NORM_OF_DENSE, _NORM): weight}
        layer, kind = part.removeprefix("mlp.").split(".")
        shape = list(weight.shape)
        if (layer, kind) != ("linear_fc2", "bias"):
            shape[1 if layer == "linear_fc2" else 0] //= self._granularity
        experts = range(self._moe.num_moe_experts)
        found = {
            f"{start}mlp.experts.{e}.{layer}.{kind}": Weight(tuple(shape), weight.dtype) for e in experts
        }
        if (layer, kind) == ("linear_fc1", "weight"):
            found = self._of_router(start, weight.dtype) | found
        return found

    def _of_router(self, start: str, dtype: torch.dtype) -> dict[str, Weight]:
        count = self._moe.num_moe_experts
        found = {f"{start}mlp.router.weight": Weight((count, self._hidden_size), dtype)}
        if self._has_router_bias:
            found[f"{start}mlp.router.bias"] = Weight((count,), dtype)
        if self._moe.moe_router_enable_expert_bias:
            found[f"{start}mlp.router.expert_bias"] = Weight((count,), torch.float32)
        return found

    def _router(self, name: str) -> Tensor:
        copies = self._moe.num_moe_experts // self._granularity
        rows = torch.empty(copies, self._hidden_size)
        rows.normal_(0.0, self._changes.router_std, generator=generator_of(self._changes.seed, name))
        return rows.repeat_interleave(self._granularity, dim=0)

    def _expert(self, match: re.Match[str]) -> Tensor:
        """One matrix or bias of one expert."""
        start, number, layer, kind = match.groups()
        dense = self._dense.read(f"{start}.{layer}.{kind}")
        part = int(number) % self._granularity
        if layer == "linear_fc1":
            halves = [half.chunk(self._granularity)[part] for half in dense.chunk(self._gates)]
            return torch.cat(
                [self._changed(half, f"{start}.{number}", kind, i) for i, half in enumerate(halves)]
            )
        if kind == "bias":
            return dense * (self._scale / self._granularity)
        columns = dense.chunk(self._granularity, dim=1)[part].T
        return self._changed(columns, f"{start}.{number}", kind, 2).T.contiguous() * self._scale

    def _changed(self, neurons: Tensor, expert: str, kind: str, number: int) -> Tensor:
        """One of an expert's matrices [inner neurons, h], or a bias [inner neurons], with what is drawn in
        it."""
        changes, changed = self._changes, neurons.clone()
        if kind == "bias" or not (changes.noise or changes.reinitialized):
            return changed
        generator = generator_of(changes.seed, f"{expert}.{number}")
        if changes.noise:
            size = neurons.float().square().mean().sqrt() * changes.noise
            changed += size * torch.randn(neurons.shape, generator=generator)
        if changes.reinitialized:
            # The same neurons in all matrices of an expert.
            order = torch.randperm(len(neurons), generator=generator_of(changes.seed, expert))
            anew = order[: round(changes.reinitialized * len(neurons))]
            old = neurons[anew].float()
            drawn = torch.randn(old.shape, generator=generator) * old.std() + old.mean()
            changed[anew] = drawn.to(changed.dtype)
        return changed
