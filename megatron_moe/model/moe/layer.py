"""The MoE layer alone, for any PyTorch program: no Megatron-Core, no process group unless one is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.config.errors import InputError
from megatron_moe.config.layer_settings import moe_settings
from megatron_moe.config.schema.moe import MoE
from megatron_moe.model.moe.dispatch import dispatcher
from megatron_moe.model.moe.experts import Experts, ExpertSettings
from megatron_moe.model.moe.filled import filled
from megatron_moe.model.moe.gates.gate import Gate
from megatron_moe.model.moe.groups import MoEGroups, rank, size
from megatron_moe.model.moe.library_router import Builder, LibraryRouter, Statistics
from megatron_moe.model.moe.marks import mark
from megatron_moe.model.moe.module_experts import ModuleExperts
from megatron_moe.model.moe.routing import Routing
from megatron_moe.model.moe.shared import SharedExperts

OF_OUR_EXPERTS = (
    "moe_ffn_hidden_size",
    "moe_expert_activation",
    "moe_expert_dropout",
    "moe_expert_init_scale",
    "moe_shadowing",
)
"""Keys that say what experts are made of, or copy them."""


def _built(name: str, builder: Callable[..., torch.nn.Module], *arguments: Any) -> torch.nn.Module:
    """What the caller's builder makes. A module in its place, or anything else that it makes, is an error."""
    if isinstance(builder, torch.nn.Module):
        raise InputError(
            f"{name}: is a module ({type(builder).__name__}); give a function that makes a new one at each "
            f"call, for example {name}=lambda: {type(builder).__name__}(...)"
        )
    module: Any = builder(*arguments)
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"{name}: made {type(module).__name__}; it must make a torch.nn.Module")
    return module


class Mixture(torch.nn.Module):
    """What one gate or several have in common: settings, experts, shared experts, and a way to them.

    Args: see `MixtureOfExperts`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        expert: Builder | None = None,
        expert_bias: bool = False,
        process_group: Any = None,
        expert_data_group: Any = None,
        init_method_std: float = 0.02,
        batch_first: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.hidden_size, self.batch_first = hidden_size, batch_first
        for name, group in (("process_group", process_group), ("expert_data_group", expert_data_group)):
            if group is not None and not isinstance(group, dist.ProcessGroup):
                raise InputError(
                    f"{name}: is {type(group).__name__}; give a group of ranks, as "
                    "megatron_moe.expert_groups makes them"
                )
        self.groups = MoEGroups(
            expert=process_group, expert_ranks=process_group, expert_data=expert_data_group
        )
        of_callers_own = OF_OUR_EXPERTS if expert else ()
        self.moe: MoE = moe_settings(hidden_size, settings, size(process_group), of_callers_own)
        self._dtype = dtype or torch.get_default_dtype()
        self._device = None if device is None else torch.device(device)
        self.local_experts = self.moe.num_moe_experts // size(process_group)
        first = self.local_experts * rank(process_group)
        mine = range(first, first + self.local_experts)
        if expert is None:
            self.experts: torch.nn.Module = self._drawn(mine, init_method_std, expert_bias)
        else:
            # All are made on every rank, so that ranks that began with the same seed go on with the same one.
            modules = [_built("expert", expert) for _ in range(self.moe.num_moe_experts)]
            if len({id(module) for module in modules}) < len(modules):
                raise InputError(
                    "expert: returned the same module twice; it must make a new one at each call"
                )
            self.experts = ModuleExperts(modules[mine.start : mine.stop], first).to(self._device, dtype)
        self.shared = self._shared_experts(init_method_std)
        self.dispatcher = dispatcher(self.moe, self.groups, hidden_size, self._dtype)
        self.given: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def routers(self) -> list[LibraryRouter]:
        """One a gate."""
        return [module for module in self.modules() if isinstance(module, LibraryRouter)]

    @torch.no_grad()
    def _drawn(self, mine: range, std: float, has_bias: bool) -> Experts:
        """Experts from normal(0, std), biases 0. A rank passes over the others' numbers, so that each expert
        is the same in every mode."""
        moe = self.moe
        assert moe.moe_ffn_hidden_size is not None and moe.moe_expert_activation is not None
        settings = ExpertSettings(
            hidden_size=self.hidden_size,
            ffn_hidden_size=moe.moe_ffn_hidden_size,
            activation=moe.moe_expert_activation,
            dropout=moe.moe_expert_dropout,
            has_bias=has_bias,
            dtype=self._dtype,
            device=self._device,
        )
        experts = Experts(len(mine), settings, self.groups)
        for number in range(moe.num_moe_experts):
            for weight in (experts.linear_fc1, experts.linear_fc2):
                drawn = torch.empty_like(weight[0]).normal_(std=std * moe.moe_expert_init_scale)
                if number in mine:
                    weight[number - mine.start].copy_(drawn)
        for bias in (experts.bias_fc1, experts.bias_fc2):
            if bias is not None:
                bias.bias.zero_()
        return experts

    def _shared_experts(self, std: float) -> SharedExperts | None:
        moe, width = self.moe, self.moe.moe_shared_expert_intermediate_size
        if width is None:
            return None
        activation = moe.moe_expert_activation or "swiglu"
        gated = moe.moe_shared_expert_gate
        return SharedExperts(self.hidden_size, width, activation, gated, std, self._dtype, self._device)

    def make_router(self, gate: Callable[..., torch.nn.Module] | None, **arguments: Any) -> LibraryRouter:
        """A router with these settings; `gate` builds what takes the place of its gate."""
        built = None
        if gate is not None:
            of_ours = isinstance(gate, type) and issubclass(gate, Gate)
            its = (self.moe, self.hidden_size) if of_ours else ()
            built = _built("gate", gate, *its).to(self._device, self._dtype)
        return LibraryRouter(
            self.moe,
            self.hidden_size,
            self.groups,
            built,
            dtype=self._dtype,
            device=self._device,
            **arguments,
        )

    def sequences(self, x: Tensor) -> Tensor:
        """[.., h] -> [s, b, h], as routers take it."""
        if x.dim() < 2 or x.size(-1) != self.hidden_size:
            raise InputError(
                f"the layer was given input of shape {tuple(x.shape)}; the last of at least two dimensions "
                f"must be hidden_size, {self.hidden_size}"
            )
        if not x.is_floating_point():
            raise InputError(f"the layer was given input in {x.dtype}; hidden states are of floats")
        return self._in_order(x, x.dim() - 1)

    def marks(self, x: Tensor, padding_mask: Tensor | None, token_ids: Tensor | None) -> Tensor | None:
        """[s, b] what routers are told of each token beside its hidden state (see `marks`)."""
        for name, given in (("padding_mask", padding_mask), ("token_ids", token_ids)):
            if given is not None and given.shape != x.shape[:-1]:
                raise InputError(
                    f"{name}: has the shape {tuple(given.shape)} beside input of shape {tuple(x.shape)}; "
                    f"give one value for each token, {tuple(x.shape[:-1])}"
                )
        if self.moe.moe_router_gate == "hash" and token_ids is None:
            raise InputError("token_ids: are missing; moe_router_gate hash chooses experts by them")
        padding = None if padding_mask is None else padding_mask.bool()
        if token_ids is None:
            return None if padding is None else self._in_order(padding, padding.dim())
        # From torch's random state, which recompute restores: other numbers in each iteration.
        first = int(torch.randint(1 << 39, ()))
        positions = torch.arange(token_ids.numel(), device=token_ids.device).view_as(token_ids) + first
        return self._in_order(mark(padding, token_ids, positions), token_ids.dim())

    def tokens_given(
        self, padding_mask: Tensor | None, token_ids: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The arguments, or what `telling` said in their place."""
        return (
            self.given[0] if padding_mask is None else padding_mask,
            self.given[1] if token_ids is None else token_ids,
        )

    def _in_order(self, values: Tensor, token_dims: int) -> Tensor:
        """[.., ..] with so many dimensions of tokens -> [s, b, ..]."""
        rest = values.shape[token_dims:]
        if token_dims == 1:
            return values.unsqueeze(1)
        if not self.batch_first:
            return values.reshape(values.size(0), -1, *rest)
        return values.reshape(-1, values.size(token_dims - 1), *rest).transpose(0, 1)

    def back(self, tokens: Tensor, like: Tensor) -> Tensor:
        """[t, h] in the order of routers -> the shape of the input."""
        if like.dim() == 2 or not self.batch_first:
            return tokens.view(like.shape)
        length = like.size(-2)
        return tokens.view(length, -1, self.hidden_size).transpose(0, 1).reshape(like.shape)

    def through_experts(self, tokens: Tensor, routing: Routing) -> Tensor:
        """[t, h] -> [t, h], the sum over each token's experts and the shared ones."""
        with self.autocast_of_experts(tokens):
            experts, shared = filled(self.experts, routing.capacity), self.shared
            if shared is None:
                return self.dispatcher(tokens, routing, experts)
            if self.moe.moe_shared_expert_overlap:
                return self.dispatcher(tokens, routing, experts, lambda: shared(tokens))
            return self.dispatcher(tokens, routing, experts) + shared(tokens)

    def autocast_of_experts(self, tokens: Tensor) -> Any:
        """Off for our experts, which compute in the precision of their weights."""
        is_off = isinstance(self.experts, Experts)
        kind = tokens.device.type
        return torch.autocast(kind, enabled=torch.is_autocast_enabled(kind) and not is_off)

    def into_experts(self, tokens: Tensor) -> Tensor:
        """In the precision of our experts' weights; modules get what came."""
        return tokens.to(self.experts.linear_fc1.dtype) if isinstance(self.experts, Experts) else tokens

    def extra_repr(self) -> str:
        """For print(model)."""
        moe = self.moe
        text = (
            f"hidden_size={self.hidden_size}, num_experts={moe.num_moe_experts}, topk={moe.moe_router_topk}"
        )
        parts = size(self.groups.expert)
        return text if parts == 1 else f"{text}, {self.local_experts} of them on this rank"


class MixtureOfExperts(Mixture):
    """A mixture of experts in the place of a feed-forward layer: [.., h] -> [.., h].

    Args:
        hidden_size: h.
        expert: makes an expert, any module [n, h] -> [n, h], at each call; None: experts that are computed
            together, see `experts.Experts`.
        gate: makes any module [t, h] -> logits [t, e], or is a subclass of `gates.gate.Gate`, which chooses
            itself; None: a linear one.
        expert_bias: whether experts that are not the caller's have biases.
        process_group: over whose ranks the experts are spread (expert-parallel); None: all experts are here
            (one process, or data-parallel).
        expert_data_group: the ranks that hold the same experts, where `process_group` is not all of the
            data-parallel ranks; see `parallel.expert_groups`.
        attach_losses: the routers' losses come along in the backward pass of whatever is made of the output,
            once for each call, times `parallel.scale_losses`. False: add `aux_loss(model)` to your loss.
        init_method_std: standard deviation of initial weights of our experts.
        batch_first: input is [b, s, h], and not [s, b, h]; of losses over sequences and of the order in which
            tokens find room.
        layer_number, seed: by which random gates draw.
        dtype, device: of the weights.
        settings: keys of the section `moe`; for four of them there are short names, `num_experts`, `topk`,
            `ffn_hidden_size` and `activation`.

    Raises InputError where settings, shapes, or what an expert or gate returns are wrong.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        gate: Callable[..., torch.nn.Module] | None = None,
        attach_losses: bool = True,
        layer_number: int = 1,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        super().__init__(hidden_size, **arguments)
        self.router = self.make_router(gate, is_attached=attach_losses, layer_number=layer_number, seed=seed)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> Tensor:
        """Args:
        x: [.., h].
        padding_mask: [..], true where a token counts neither in losses nor in statistics.
        token_ids: [..] numbers in the vocabulary, which the hash gate goes by.
        """
        hidden = self.sequences(x)
        routing = self.router(hidden, self.marks(x, *self.tokens_given(padding_mask, token_ids)))
        tokens = self.into_experts(hidden.reshape(-1, self.hidden_size))
        return self.back(self.through_experts(tokens, routing), x).to(x.dtype)

    def statistics(self) -> Statistics:
        """What the router did on this rank since the iteration began."""
        return self.router.read()
