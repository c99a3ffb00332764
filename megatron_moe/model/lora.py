"""Low-rank adapters beside Megatron-Core's linear layers (Hu et al. 2021), in every layout.

A matrix that TP cuts by rows has a B that is cut likewise, and an A that each rank has whole; one that is cut
by columns has an A that is cut, and a B that is whole. What is gathered or summed over the ranks is what A
makes, which is narrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.schema import Experiment
from megatron_moe.engine.versions import accept_as_linear, moe_submodules
from megatron_moe.model.lora_places import Places
from megatron_moe.model.moe.draws import key, uniform

_BY_ROWS = ("linear_qkv", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "linear_fc1")
_WHOLE = ("linear_q_down_proj", "linear_kv_down_proj")
_BY_COLUMNS = ("linear_proj", "linear_fc2")
"""The names of linear layers in Megatron-Core's specs, by how TP cuts their matrices."""


class Settings(NamedTuple):
    """Of the adapters of a run; `seed` is for what dropout draws."""

    rank: int
    scale: float
    dropout: float
    seed: int

    @classmethod
    def of(cls, experiment: Experiment) -> Settings:
        lora = experiment.training.lora
        assert lora is not None and lora.alpha is not None
        return cls(lora.rank, lora.alpha / lora.rank, lora.dropout, experiment.training.seed)


def put_into(spec: Any, experiment: Experiment, has_experts: bool) -> None:
    """Let a layer spec build linear layers with adapters where `training.lora.targets` says so; routed
    experts have theirs from `model.moe.megatron`."""
    lora = experiment.training.lora
    if lora is None:
        return
    settings, parts = Settings.of(experiment), spec.submodules
    if "attention" in lora.targets:
        _replace(parts.self_attention.submodules, settings)
    if not has_experts and "mlp" in lora.targets:
        _replace(moe_submodules(parts.mlp), settings)


def put_into_shared_experts(submodules: Any, experiment: Experiment) -> None:
    """The same for the shared experts of MoESubmodules."""
    lora = experiment.training.lora
    if lora is not None and "shared_experts" in lora.targets:
        _replace(moe_submodules(submodules.shared_experts), Settings.of(experiment))


def _replace(parts: Any, settings: Settings) -> None:
    for name in (*_BY_ROWS, *_BY_COLUMNS):
        if getattr(parts, name, None) is not None:
            make = by_rows if name in _BY_ROWS else by_columns
            setattr(parts, name, make(getattr(parts, name), settings))
    for name in _WHOLE:
        if getattr(parts, name, None) is not None:
            kind = whole(getattr(parts, name), settings)
            setattr(parts, name, kind)
            accept_as_linear(kind)


class Adapter(torch.nn.Module):
    """What all linear layers with adapters share; stands before the class of the layer itself.

    Parameters:
        lora_a: [rank, in], lora_b: [out, rank], of this rank.
    """

    settings: Settings
    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    weight: torch.nn.Parameter
    config: Any
    tp_group: Any
    places: Places | None = None
    """Of the tokens that the layer is about to see, where dropout goes by them."""
    purpose = ""
    """Tells its draws from those of other linear layers: its layer's number and its name."""
    first_input = 0
    """Of the whole matrix's columns, that of this rank's part."""

    def _add(self, rank: int) -> None:
        outputs, inputs = self.weight.shape
        self.lora_a = torch.nn.Parameter(self.weight.new_empty(rank, inputs))
        self.lora_b = torch.nn.Parameter(self.weight.new_empty(outputs, rank))

    def _narrow(self, x: Tensor) -> Tensor:
        """A x, of what dropout leaves of x [s, b, in]."""
        if self.training and self.settings.dropout:
            assert self.places is not None, "dropout goes by the places of tokens"
            rows = self.places.of_length(x.size(0)).reshape(-1)
            drawer = key(self.settings.seed, self.purpose)
            numbers = uniform(drawer, rows, x.size(-1), self.first_input)
            survives = (numbers >= self.settings.dropout).view_as(x)
            x = x * (survives.to(x.dtype) / (1 - self.settings.dropout))
        return F.linear(x, self.lora_a)

    def _wide(self, narrow: Tensor) -> Tensor:
        return F.linear(narrow, self.lora_b) * self.settings.scale


def adapters_in(module: torch.nn.Module) -> Iterator[tuple[str, Adapter]]:
    """All linear layers with adapters, by name; not routed experts."""
    for name, part in module.named_modules():
        if isinstance(part, Adapter):
            yield name, part


@cache
def by_rows(linear: type[torch.nn.Module], settings_: Settings) -> type[torch.nn.Module]:
    """ColumnParallelLinear, or a class of it, with an adapter."""
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        set_tensor_model_parallel_attributes,
    )
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    class Column(Adapter, linear):  # type: ignore[misc, valid-type]
        settings = settings_

        def __init__(self, *args: Any, tp_comm_buffer_name: str | None = None, **kwargs: Any) -> None:
            super().__init__(*args, tp_comm_buffer_name=tp_comm_buffer_name, **kwargs)
            self._add(settings_.rank)
            # Gate and up-projection lie one behind the other.
            self.has_halves = self.config.gated_linear_unit and tp_comm_buffer_name == "fc1"
            stride = 2 if self.has_halves else 1
            set_tensor_model_parallel_attributes(self.lora_b, True, 0, stride)
            # Each rank sees other tokens: gradients are summed.
            self.lora_a.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

        def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(input_, *args, **kwargs)
            narrow = self._narrow(input_)
            if self.sequence_parallel:
                narrow = gather_from_sequence_parallel_region(
                    narrow, tensor_parallel_output_grad=True, group=self.tp_group
                )
            else:
                narrow = copy_to_tensor_model_parallel_region(narrow, group=self.tp_group)
            return output + self._wide(narrow), bias

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
        ) -> dict[str, Any]:
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            state |= _shards(self, prefix, sharded_offsets, metadata, {"lora_b": 0})
            if self.has_halves:
                name = f"{prefix}lora_b"
                state[name] = apply_swiglu_sharded_factory(state[name], sharded_offsets)
            return state

    return _named(Column, linear)


@cache
def by_columns(linear: type[torch.nn.Module], settings_: Settings) -> type[torch.nn.Module]:
    """RowParallelLinear, or a class of it, with an adapter."""
    from megatron.core.tensor_parallel import (
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
        set_tensor_model_parallel_attributes,
    )

    class Row(Adapter, linear):  # type: ignore[misc, valid-type]
        settings = settings_

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._add(settings_.rank)
            self.first_input = self.tp_group.rank() * self.weight.size(1)
            set_tensor_model_parallel_attributes(self.lora_a, True, 1, 1)
            self.lora_b.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

        def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(input_)
            narrow = self._narrow(input_)
            reduce = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            return output + self._wide(reduce(narrow, group=self.tp_group)), bias

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
        ) -> dict[str, Any]:
            state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            return state | _shards(self, prefix, sharded_offsets, metadata, {"lora_a": 1})

    return _named(Row, linear)


@cache
def whole(linear: type[torch.nn.Module], settings_: Settings) -> type[torch.nn.Module]:
    """`latent_attention.DownProjection`, which no rank has a part of only, with an adapter."""

    class Whole(Adapter, linear):  # type: ignore[misc, valid-type]
        settings = settings_

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._add(settings_.rank)
            for parameter in (self.lora_a, self.lora_b):
                parameter.sequence_parallel = self.weight.sequence_parallel  # type: ignore[attr-defined]

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(hidden_states)
            return output + self._wide(self._narrow(hidden_states)), bias

    return _named(Whole, linear)


def _shards(linear: Any, prefix: str, offsets: Any, metadata: Any, axes: dict[str, int]) -> dict[str, Any]:
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        {"lora_a": linear.lora_a, "lora_b": linear.lora_b},
        prefix,
        axes,
        offsets,
        tp_group=linear.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    return state


def _named(made: type[torch.nn.Module], after: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Megatron-Core asks some of its classes for their names."""
    made.__name__, made.__qualname__ = after.__name__, after.__qualname__
    return made
