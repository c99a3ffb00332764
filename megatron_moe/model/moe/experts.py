"""The routed experts of one rank: on a host in one loop over them, else as grouped products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.engine.recompute import DiscardedOutput
from megatron_moe.model.activations import ACTIVATIONS
from megatron_moe.model.moe.adapters import ExpertAdapter, adapted
from megatron_moe.model.moe.expert_loop import expert_loop
from megatron_moe.model.moe.grouped_linear import ExpertBias, grouped_bias, grouped_linear
from megatron_moe.model.moe.groups import MoEGroups, rank, size
from megatron_moe.model.moe.permutation import Permutation, to_experts, to_tokens
from megatron_moe.model.moe.weight_gradient import split
from megatron_moe.model.moe.weight_row import weight_row


@dataclass(frozen=True)
class ExpertSettings:
    """What an expert is made of.

    Attributes:
        hidden_size: h.
        ffn_hidden_size: inner width of one expert, before it is split over the expert-tensor-parallel ranks.
        activation: a name of `activations.ACTIVATIONS`.
        dropout: probability, behind the activation.
        has_bias: both linear layers have biases.
        recompute_activation: keep no activation for the backward pass, but compute it again.
        lora_rank: of adapters beside both linear layers; 0: there are none.
        lora_scale: what they add is multiplied by it.
        dtype: of the weights.
        device: of the weights; None: torch's default.
    """

    hidden_size: int
    ffn_hidden_size: int
    activation: str = "swiglu"
    dropout: float = 0.0
    has_bias: bool = False
    recompute_activation: bool = False
    lora_rank: int = 0
    lora_scale: float = 1.0
    dtype: torch.dtype = torch.float32
    device: torch.device | int | None = None


class Weights(NamedTuple):
    """Of some experts, see `Experts`."""

    fc1: Tensor
    fc2: Tensor
    bias_fc1: Tensor | None
    bias_fc2: Tensor | None
    a_fc1: Tensor | None = None
    b_fc1: Tensor | None = None
    a_fc2: Tensor | None = None
    b_fc2: Tensor | None = None


class Experts(torch.nn.Module):
    """Feed-forward experts: p * fc2_e(act(fc1_e x)) for each token x with gate weight p.

    Knows no Megatron-Core but for its checkpoints: these hold the weights, here two parameters for all local
    experts, under the same keys and in the same global shape as those of its SequentialMLP, which runs a
    module an expert: [.., experts, out, in] with the gate's rows before the up-projection's, and biases
    [.., experts, out].

    Args:
        num_local_experts: experts e of this rank.
        settings: of each.
        groups: `expert`, `expert_tensor`, `expert_data`.

    Parameters:
        linear_fc1: [e, g * f, h], f inner width of this expert-tensor-parallel rank, g = 2 where the
        activation is gated, else 1. linear_fc2: [e, h, f]. With `has_bias` also bias_fc1.bias: [e, g * f],
        and bias_fc2.bias: [e, h / ETP]. The expert-tensor-parallel ranks' outputs are added up, so that each
        adds its part of the channels, and each channel's bias is added once. lora_fc1 and lora_fc2 hold
        adapters, where there are any. All are uninitialised.
    """

    def __init__(
        self, num_local_experts: int, settings: ExpertSettings, groups: MoEGroups | None = None
    ) -> None:
        super().__init__()
        self.settings, self.groups = settings, groups or MoEGroups()
        self.num_local_experts = num_local_experts
        self.activation = ACTIVATIONS[settings.activation]
        self.gates = 2 if self.activation.is_gated else 1
        parts = size(self.groups.expert_tensor)
        hidden_size, width = settings.hidden_size, settings.ffn_hidden_size // parts
        self.linear_fc1 = self._parameter((num_local_experts, self.gates * width, hidden_size), dim=1)
        self.linear_fc2 = self._parameter((num_local_experts, hidden_size, width), dim=2)
        self.bias_fc1 = self.bias_fc2 = None
        if settings.has_bias:
            channels = hidden_size // parts
            self.bias_fc1 = ExpertBias(self._parameter((num_local_experts, self.gates * width), dim=1))
            self.bias_fc2 = ExpertBias(self._parameter((num_local_experts, channels), dim=1))
        self.lora_fc1 = self.lora_fc2 = None
        if settings.lora_rank:
            self.lora_fc1 = self._adapter(self.gates * width, hidden_size, cuts_outputs=True)
            self.lora_fc2 = self._adapter(hidden_size, width, cuts_outputs=False)

    def _adapter(self, outputs: int, inputs: int, cuts_outputs: bool) -> ExpertAdapter:
        build, experts, group = self._parameter, self.num_local_experts, self.groups.expert_tensor
        return ExpertAdapter(build, experts, outputs, inputs, self.settings.lora_rank, cuts_outputs, group)

    def _parameter(self, shape: tuple[int, ...], dim: int) -> torch.nn.Parameter:
        """An uninitialised weight whose gradient is reduced over the experts' own replicas."""
        parameter = torch.nn.Parameter(
            torch.empty(shape, dtype=self.settings.dtype, device=self.settings.device)
        )
        marks = {
            # Megatron-Core's mark of an expert parameter: replicas are the expert-data-parallel group.
            "allreduce": False,
            # No other rank holds a copy that would count twice in the gradient norm.
            "tensor_model_parallel": True,
            "partition_dim": dim,
            "partition_stride": self.gates if dim == 1 else 1,
        }
        for name, value in marks.items():
            setattr(parameter, name, value)
        return parameter

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Args:
            tokens: [t, h], sorted by local expert.
            tokens_per_expert: [e].
            probs: [t] gate weights.

        Returns:
            [t, h], and no bias: it is in there already, with its gate weight.
        """
        return self._compute(self._weights(), tokens, tokens_per_expert, probs)

    def of_unsorted(self, tokens: Tensor, permutation: Permutation, probs: Tensor) -> Tensor:
        """[t, h] -> [t, h], what the experts make of each token added up; see `dispatch.dispatcher`."""
        if not self._loops(tokens):
            outputs, _ = self(to_experts(tokens, permutation), permutation.counts, probs)
            return to_tokens(outputs, permutation)
        self._wait_for_weights()
        return self._in_a_loop(self._weights(), tokens, permutation.counts, probs, permutation.sources)

    def split(self, sizes: list[int]) -> list[Callable[[Tensor, Tensor, Tensor], tuple[Tensor, None]]]:
        """So many of the local experts each, to be called as all of them.

        To be called anew in each forward pass. The gradients of all parts are put together in one piece, when
        the last of them is there.
        """
        self._wait_for_weights()
        whole = self._weights()
        cut = torch.split if not self._loops(self.linear_fc1) else split
        parts = zip(*([None] * len(sizes) if x is None else cut(x, sizes) for x in whole), strict=True)
        return [partial(self._compute, Weights(*part)) for part in parts]

    def flat(self, expert: int) -> Tensor:
        """All weights of a local expert in one row, for `of_flat` on another rank."""
        self._wait_for_weights()
        return torch.cat([weight_row(weight, expert) for weight in self._weights() if weight is not None])

    def of_flat(self, rows: Tensor) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, None]]:
        """Experts with the weights of these rows [n, numbers], to be called as those of this rank."""
        shapes = [None if weight is None else weight.shape[1:] for weight in self._weights()]
        pieces = iter(rows.split([shape.numel() for shape in shapes if shape is not None], dim=1))
        weights = (None if shape is None else next(pieces).reshape(-1, *shape) for shape in shapes)
        return partial(self._compute, Weights(*weights))  # type: ignore[arg-type]

    def _weights(self) -> Weights:
        return Weights(
            self.linear_fc1,
            self.linear_fc2,
            None if self.bias_fc1 is None else self.bias_fc1(),
            None if self.bias_fc2 is None else self.bias_fc2(),
            *(self.lora_fc1() if self.lora_fc1 is not None else (None, None)),
            *(self.lora_fc2() if self.lora_fc2 is not None else (None, None)),
        )

    def _wait_for_weights(self) -> None:
        """Weights that are still being gathered are waited for in hooks, which only a call of the module
        runs."""
        for hook in self._forward_pre_hooks.values():
            hook(self, ())

    def _compute(
        self, weights: Weights, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, None]:
        if self._loops(tokens):
            return self._in_a_loop(weights, tokens, tokens_per_expert, probs), None
        return self._as_grouped_products(weights, tokens, tokens_per_expert, probs), None

    def _loops(self, tokens: Tensor) -> bool:
        """Whether the experts run in one loop, which has neither biases nor dropout nor adapters."""
        settings = self.settings
        has_more = settings.has_bias or settings.lora_rank or (self.training and settings.dropout > 0)
        return tokens.device.type == "cpu" and not has_more

    def _in_a_loop(
        self,
        weights: Weights,
        tokens: Tensor,
        tokens_per_expert: Tensor,
        probs: Tensor,
        sources: Tensor | None = None,
    ) -> Tensor:
        sizes, activation = tokens_per_expert.tolist(), self.settings.activation
        return expert_loop(tokens, probs, weights.fc1, weights.fc2, activation, sizes, sources)

    def _as_grouped_products(
        self, weights: Weights, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> Tensor:
        inner = grouped_linear(tokens, weights.fc1, tokens_per_expert)
        if weights.a_fc1 is not None and weights.b_fc1 is not None:
            scale = self.settings.lora_scale
            inner = adapted(inner, tokens, weights.a_fc1, weights.b_fc1, scale, tokens_per_expert)
        if weights.bias_fc1 is not None:
            inner = inner + grouped_bias(weights.bias_fc1, tokens_per_expert, len(tokens))
        # Outside of what is recomputed: it must not be drawn a second time.
        survivors = self._survivors(inner)
        if self.settings.recompute_activation:
            activation = DiscardedOutput()
            activated = activation.checkpoint(self._activated, inner, probs, survivors)
            output = self._projected(weights, activated, tokens_per_expert)
            activation.discard_output_and_register_recompute(output)
        else:
            activated = self._activated(inner, probs, survivors)
            output = self._projected(weights, activated, tokens_per_expert)
        if weights.bias_fc2 is not None:
            bias = grouped_bias(weights.bias_fc2, tokens_per_expert, len(tokens))
            bias = (bias * probs.unsqueeze(-1)).to(tokens.dtype)
            before = rank(self.groups.expert_tensor) * bias.size(1)
            output = output + F.pad(bias, (before, output.size(1) - before - bias.size(1)))
        return output

    def _projected(self, weights: Weights, activated: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """[t, f] -> [t, h], without biases."""
        output = grouped_linear(activated, weights.fc2, tokens_per_expert)
        if weights.a_fc2 is None or weights.b_fc2 is None:
            return output
        scale = self.settings.lora_scale
        return adapted(output, activated, weights.a_fc2, weights.b_fc2, scale, tokens_per_expert)

    def _activated(self, inner: Tensor, probs: Tensor, survivors: Tensor | None) -> Tensor:
        """[t, g * f] and gate weights [t] -> [t, f]."""
        activated = self.activation.apply(inner)
        scale = probs.unsqueeze(-1)
        if survivors is not None:
            activated = activated.masked_fill(~survivors, 0)
            scale = scale / (1 - self.settings.dropout)
        return (activated * scale).to(inner.dtype)

    def _survivors(self, inner: Tensor) -> Tensor | None:
        """[t, f] bool: what dropout leaves; None: everything."""
        if not self.training or not self.settings.dropout:
            return None
        shape = (inner.size(0), inner.size(1) // self.gates)
        return torch.rand(shape, device=inner.device) >= self.settings.dropout

    def backward_dw(self) -> None:
        """Weight gradients are not delayed."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Where this rank's weights lie in the global [.., experts, out, in] tensors."""
        from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

        def factory(name: str, parameter: torch.nn.Parameter, build: Any, merge: Any) -> Any:
            # Only one of the replicas writes: rank 0 of the expert-data-parallel group.
            return ShardedTensorFactory(
                f"{prefix}experts.{name}",
                parameter,
                lambda key, data, replica_id, flattened_range: build(key, data, replica_id, sharded_offsets),
                merge,
                (0, 0, rank(self.groups.expert_data)),
            )

        shards = {
            "linear_fc1": factory("linear_fc1.weight", self.linear_fc1, self._shard_fc1, self._merge_fc1),
            "linear_fc2": factory("linear_fc2.weight", self.linear_fc2, self._shard_fc2, _only),
        }
        if self.bias_fc1 is not None and self.bias_fc2 is not None:
            shards |= {
                "bias_fc1.bias": factory(
                    "linear_fc1.bias", self.bias_fc1.bias, self._shard_fc1, self._merge_fc1
                ),
                "bias_fc2.bias": factory("linear_fc2.bias", self.bias_fc2.bias, self._shard_fc2, _only),
            }
        if self.lora_fc1 is not None and self.lora_fc2 is not None:
            for name, one, build_b, merge_b in (
                ("fc1", self.lora_fc1, self._shard_fc1, self._merge_fc1),
                ("fc2", self.lora_fc2, self._shard_rows, _only),
            ):
                shards |= {
                    f"lora_{name}.lora_a": factory(
                        f"linear_{name}.lora_a", one.lora_a, self._shard_fc2, _only
                    ),
                    f"lora_{name}.lora_b": factory(f"linear_{name}.lora_b", one.lora_b, build_b, merge_b),
                }
        return {f"{prefix}{name}": shard for name, shard in shards.items()}

    def _shard_fc1(self, key: str, data: Tensor, replica_id: Any, offsets: tuple[Any, ...]) -> list[Any]:
        tensor_rank, tensor_size = rank(self.groups.expert_tensor), size(self.groups.expert_tensor)
        parts = data.chunk(self.gates, dim=1)
        return [
            self._shard(
                key,
                part,
                (1, index * tensor_size + tensor_rank, self.gates * tensor_size),
                replica_id,
                offsets,
            )
            for index, part in enumerate(parts)
        ]

    def _merge_fc1(self, shards: list[Tensor]) -> Tensor:
        return torch.cat(shards, dim=1)

    def _shard_fc2(self, key: str, data: Tensor, replica_id: Any, offsets: tuple[Any, ...]) -> list[Any]:
        # The matrix is cut along what comes in, the bias along what goes out.
        tensor = (data.dim() - 1, rank(self.groups.expert_tensor), size(self.groups.expert_tensor))
        return [self._shard(key, data, tensor, replica_id, offsets)]

    def _shard_rows(self, key: str, data: Tensor, replica_id: Any, offsets: tuple[Any, ...]) -> list[Any]:
        tensor = (1, rank(self.groups.expert_tensor), size(self.groups.expert_tensor))
        return [self._shard(key, data, tensor, replica_id, offsets)]

    def _shard(
        self, key: str, data: Tensor, tensor: tuple[int, int, int], replica_id: Any, offsets: tuple[Any, ...]
    ) -> Any:
        """One piece: its place among the experts, and `tensor` = (axis, piece, pieces) within each expert's
        matrix."""
        from megatron.core.dist_checkpointing import ShardedTensor

        axis, piece, pieces = tensor
        leading = len(offsets)
        return ShardedTensor.from_rank_offsets(
            key,
            data,
            *offsets,
            (leading, rank(self.groups.expert), size(self.groups.expert)),
            (leading + axis, piece, pieces),
            replica_id=replica_id,
            prepend_axis_num=leading,
        )


def _only(shards: list[Tensor]) -> Tensor:
    (shard,) = shards
    return shard
