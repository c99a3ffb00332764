"""The router of a layer that stands in a program of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.gates.gate import Choice, Gate, GateInput
from megatron_moe.model.moe.groups import MoEGroups
from megatron_moe.model.moe.layer_sums import COLUMNS, layer_sums
from megatron_moe.model.moe.router import Router
from megatron_moe.model.moe.routing import Routing


@dataclass(frozen=True)
class Statistics:
    """What a router did with its tokens, padding left out, since the iteration began.

    Attributes:
        tokens: how many.
        load: assignments to each expert, before drops.
        drop_rate: dropped over made assignments.
        would_drop_rate: what moe_would_drop_capacity_factor would have dropped.
        load_max_over_mean: 1 at perfect balance.
        dead_experts: experts without any token.
        entropy: mean over tokens of the scores' entropy, in nats.
        top1_over_top2: sum of the largest scores over that of the second largest.
    """

    tokens: int
    load: list[int]
    drop_rate: float
    would_drop_rate: float
    load_max_over_mean: float
    dead_experts: int
    entropy: float
    top1_over_top2: float


class LibraryRouter(Router):
    """A router whose record stays small when nobody reads it, and whose gate or logits may be the user's.

    Args:
        gate: a `Gate`, which then chooses, or another module [t, h] -> logits [t, e] in the place of the
            router's weight; None: as the settings say.
        is_attached: losses ride on the gate weights; else they are collected.

    Attributes:
        sums: [e + len(COLUMNS)] float64, see `layer_sums`, since the iteration began.
    """

    def __init__(
        self,
        moe: MoE,
        hidden_size: int,
        groups: MoEGroups,
        gate: torch.nn.Module | None,
        *,
        is_attached: bool,
        layer_number: int,
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> None:
        super().__init__(
            moe,
            hidden_size,
            groups,
            seed=seed,
            gate=gate if isinstance(gate, Gate) else None,
            dtype=dtype or torch.get_default_dtype(),
            device=device,
        )
        self.scorer = None if isinstance(gate, Gate) else gate
        if self.scorer is not None:
            if moe.moe_router_bias:
                raise InputError("moe_router_bias: has no effect on logits of your own gate; leave it out")
            self.weight = None
        if isinstance(gate, Gate):
            gate.register_forward_hook(_check)
        self.balancing.is_attached = is_attached
        self.set_layer_number(layer_number)
        # No buffer: DistributedDataParallel would overwrite it by that of rank 0.
        self.sums = torch.zeros(moe.num_moe_experts + len(COLUMNS), dtype=torch.float64)

    def forward(self, hidden: Tensor, marks: Tensor | None = None) -> Routing:
        """As `Router.forward`, in the router's own precision whatever autocast says."""
        with torch.autocast(hidden.device.type, enabled=False):
            routing = super().forward(hidden, marks)
        if self.statistics.rows:
            with torch.no_grad():
                these = layer_sums(self.statistics.take().unsqueeze(0), self.moe)[0]
                self.sums = self.sums.to(these.device) + these
            self.balancing.values.clear()
        return routing

    def _logits(self, tokens: Tensor) -> Tensor:
        if self.scorer is None:
            return super()._logits(tokens)
        parameter = next(self.scorer.parameters(), None)
        logits: Tensor = self.scorer(tokens if parameter is None else tokens.to(parameter.dtype))
        wanted = (len(tokens), self.moe.num_moe_experts)
        if not isinstance(logits, Tensor) or logits.shape != wanted:
            given = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(
                f"the gate ({type(self.scorer).__name__}) returned {given} for {len(tokens)} tokens; it must "
                f"return logits of shape {wanted}, one for each expert, or be a megatron_moe.Gate"
            )
        return logits.to(self.dtype)

    def read(self) -> Statistics:
        """What was done since the iteration began, on this rank. Waits for the device."""
        experts = self.moe.num_moe_experts
        load, columns = self.sums[:experts].tolist(), self.sums[experts:].tolist()
        column = dict(zip(COLUMNS, columns, strict=True))
        routed = max(column["assigned"], 1.0)
        return Statistics(
            tokens=int(column["tokens"]),
            load=[int(count) for count in load],
            drop_rate=column["dropped"] / routed,
            would_drop_rate=column["would_drop"] / routed,
            load_max_over_mean=max(load) * experts / max(sum(load), 1.0),
            dead_experts=sum(count == 0 for count in load),
            entropy=column["entropy"] / max(column["tokens"], 1.0),
            top1_over_top2=column["top1"] / column["top2"] if column["top2"] else float("inf"),
        )


def _check(gate: torch.nn.Module, arguments: tuple[GateInput], choice: object) -> None:
    """Raise InputError where what a gate returns is not what `Choice` says."""
    tokens, experts = arguments[0].logits.shape
    name = type(gate).__name__
    if not isinstance(choice, Choice):
        raise InputError(f"the gate ({name}) returned {type(choice).__name__}; return a megatron_moe.Choice")
    chosen, wanted = tuple(choice.experts.shape), (tokens, experts)
    if choice.experts.dtype != torch.int64 or choice.experts.dim() != 2 or len(choice.experts) != tokens:
        raise InputError(
            f"the gate ({name}) returned experts of shape {chosen} in {choice.experts.dtype} for {tokens} "
            "tokens; they must be int64, one row a token"
        )
    for what, shape, right in (
        ("weights", tuple(choice.weights.shape), chosen),
        ("scores", tuple(choice.scores.shape), wanted),
    ):
        if shape != right:
            raise InputError(f"the gate ({name}) returned {what} of shape {shape}; it must be {right}")


Builder = Callable[[], torch.nn.Module]
"""Makes a module, a new one at each call."""
