"""One line for people with their own model: its feed-forward layers become mixtures of experts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megatron_moe.config.errors import InputError
from megatron_moe.model.moe.experts import Experts
from megatron_moe.model.moe.layer import Mixture, MixtureOfExperts
from megatron_moe.model.moe.library_router import Builder
from megatron_moe.model.moefy.feed_forward import FeedForward, find, on_device, torch_encoders, width_of
from megatron_moe.model.moefy.known_form import KnownForm, known_form


def moefy(
    model: nn.Module,
    num_experts: int,
    *,
    layers: str | int | Sequence[str] | Sequence[int] | None = None,
    copies: bool = True,
    expert: Builder | None = None,
    process_group: Any = None,
    expert_data_group: Any = None,
    **settings: Any,
) -> nn.Module:
    """Replace the feed-forward layers of `model` by `MixtureOfExperts`, in place; returns the model.

    Every expert starts as a copy of its layer, so that the model computes what it did, wherever a token's
    weights add up to 1. Layers of the usual form become experts that are computed together; others are copied
    as they are, one module an expert. Precision, device, mode, frozen and shared parameters stay. On an error
    the model is as it was.

    Args:
        model: of plain PyTorch, Hugging Face or Megatron-Core.
        layers: which: numbers from 0 among those that are found, or patterns of names (`*.ffn`), under which
            any module [.., h] -> [.., h] is one; None: all of known structure.
        copies: False: our experts start with fresh weights instead.
        expert: makes an expert, any module [n, h] -> [n, h], at each call, in the place of copies.
        process_group, expert_data_group, settings: see `MixtureOfExperts`.

    Raises InputError where no layer is found, and for wrong settings.
    """
    found = _chosen(model, layers)
    _refuse_shared_outside(model, found)
    arguments = {"process_group": process_group, "expert_data_group": expert_data_group, **settings}
    made: dict[tuple[int, ...], MixtureOfExperts] = {}
    for number, layer in enumerate(found):
        key = _parameters(layer)
        if key not in made:
            its = {"num_experts": num_experts, "layer_number": number + 1, **arguments}
            made[key] = _mixture(layer, copies, expert, its)
    _put(model, [(layer, made[_parameters(layer)]) for layer in found])
    return model


def _chosen(model: nn.Module, layers: str | int | Sequence[str] | Sequence[int] | None) -> list[FeedForward]:
    wanted = None if layers is None else [layers] if isinstance(layers, str | int) else list(layers)
    by_name = [name for name in wanted or [] if isinstance(name, str)]
    found = find(model, by_name or None)
    if not found:
        raise InputError(_nothing_found(model, by_name))
    if wanted is None or by_name:
        return found
    numbers = [number for number in wanted if isinstance(number, int)]
    beyond = [number for number in numbers if not 0 <= number < len(found)]
    if beyond or not numbers:
        raise InputError(
            f"layers: {beyond or numbers} names no feed-forward layer; {type(model).__name__} has "
            f"{len(found)}, numbered from 0: {_listed([layer.name for layer in found])}"
        )
    return [found[number] for number in sorted(set(numbers))]


def _nothing_found(model: nn.Module, patterns: list[str]) -> str:
    names = [name for name, _ in model.named_modules() if name]
    kinds = Counter(type(module).__name__ for name, module in model.named_modules() if name)
    if patterns:
        what = f"layers: no module has a name like {', '.join(patterns)}"
        return f"{what}; {type(model).__name__} has {_listed(names)}"
    if any(isinstance(module, Mixture) for module in model.modules()):
        return (
            f"moefy: {type(model).__name__} has no feed-forward layer of known structure beside those that "
            "are mixtures of experts already; name others by layers"
        )
    if not names:
        return f"moefy: {type(model).__name__} is a single layer; give the model that it is part of"
    seen = _listed([f"{count} {kind}" for kind, count in kinds.items()])
    likely = [name for name, part in model.named_modules() if type(part) is nn.Sequential and name] or names
    return (
        f"moefy: found no feed-forward layer of known structure in {type(model).__name__}; looked at {seen}: "
        f'{_listed(names)}; name yours by layers, for example layers="{likely[0]}"'
    )


def _listed(entries: Sequence[str], limit: int = 12) -> str:
    more = f", .. ({len(entries)} in all)" if len(entries) > limit else ""
    return ", ".join(entries[:limit]) + more


def _parameters(layer: FeedForward) -> tuple[int, ...]:
    """What tells layers with weights of their own apart."""
    return tuple(id(parameter) for parameter in layer.dense.parameters()) or (id(layer.dense),)


def _refuse_shared_outside(model: nn.Module, found: list[FeedForward]) -> None:
    """A weight that something else has too would be shared no more."""
    inside = {id(module) for layer in found for module in layer.dense.modules()}
    outside = {
        id(parameter): name
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) not in inside
        for parameter in module._parameters.values()
        if parameter is not None
    }
    whole = {_parameters(layer) for layer in found}
    for layer in found:
        for name, parameter in layer.dense.named_parameters():
            elsewhere = outside.get(id(parameter))
            if elsewhere is None and any(id(parameter) in key for key in whole - {_parameters(layer)}):
                elsewhere = "another feed-forward layer that has not all of its weights"
            if elsewhere is not None:
                raise InputError(
                    f"{layer.name}: its parameter {name} is shared with {elsewhere}, which a mixture would "
                    "end; choose other layers"
                )


def _mixture(
    layer: FeedForward, copies: bool, expert: Builder | None, arguments: dict[str, Any]
) -> MixtureOfExperts:
    """The mixture in the place of a layer."""
    hidden_size, like = width_of(layer), on_device(layer)
    if hidden_size is None or like is None:
        raise InputError(
            f"{layer.name}: {type(layer.dense).__name__} is no feed-forward layer with as many channels "
            "behind its last matrix as before its first one; choose others by layers"
        )
    build: Any = MixtureOfExperts
    if layer.of_megatron:
        from megatron_moe.model.moefy.megatron_model import MegatronMixture, groups_of

        build = MegatronMixture
        arguments |= groups_of(layer.dense, layer.name, arguments["process_group"])
    else:
        arguments["batch_first"] = layer.batch_first
    arguments |= {"dtype": like.dtype, "device": like.device}
    form = None if expert else known_form(layer)
    if expert is not None:
        mixture: MixtureOfExperts = build(hidden_size, expert=expert, **arguments)
    elif form is not None:
        mixture = _of_known_form(build, hidden_size, form, layer, copies, arguments)
    elif layer.of_megatron:
        raise InputError(f"{layer.name}: does not compute what its matrices say; pass expert")
    else:
        mixture = build(hidden_size, expert=_builder(layer, copies), **arguments)
    return mixture.train(layer.training)


def _of_known_form(
    build: Any, hidden_size: int, form: KnownForm, layer: FeedForward, copies: bool, arguments: dict[str, Any]
) -> MixtureOfExperts:
    """With experts that are computed together."""
    arguments = {"ffn_hidden_size": form.width, "activation": form.activation, **_long(arguments)}
    arguments.setdefault("moe_expert_dropout", layer.dropout)
    if copies:
        for key, own in (("ffn_hidden_size", form.width), ("activation", form.activation)):
            if arguments[key] != own:
                raise InputError(
                    f"{key}: {arguments[key]} is not the {own} of {layer.name}, whose copies the experts "
                    "are; leave it out, or set copies=False"
                )
        if "moe_expert_init_scale" in arguments:
            raise InputError(
                "moe_expert_init_scale: has no effect on copies; leave it out, or set copies=False"
            )
    mixture: MixtureOfExperts = build(hidden_size, expert_bias=form.biases is not None, **arguments)
    experts: Any = mixture.experts
    assert isinstance(experts, Experts)
    if copies:
        with torch.no_grad():
            experts.linear_fc1.copy_(form.fc1.expand_as(experts.linear_fc1))
            experts.linear_fc2.copy_(form.fc2.expand_as(experts.linear_fc2))
            if form.biases is not None:
                assert experts.bias_fc1 is not None and experts.bias_fc2 is not None
                experts.bias_fc1.bias.copy_(form.biases[0].expand_as(experts.bias_fc1.bias))
                experts.bias_fc2.bias.copy_(form.biases[1].expand_as(experts.bias_fc2.bias))
    for weight, bias, trained in zip(
        (experts.linear_fc1, experts.linear_fc2),
        (experts.bias_fc1, experts.bias_fc2),
        form.trained,
        strict=True,
    ):
        weight.requires_grad_(trained)
        if bias is not None:
            bias.requires_grad_(trained)
    return mixture


def _long(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, the two that a layer's form decides by their short names."""
    short = {"moe_ffn_hidden_size": "ffn_hidden_size", "moe_expert_activation": "activation"}
    return {short.get(key, key): value for key, value in arguments.items()}


def _builder(layer: FeedForward, copies: bool) -> Builder:
    """Makes modules like the layer."""

    def build() -> nn.Module:
        module = copy.deepcopy(layer.dense)
        if not copies:
            for part in module.modules():
                if next(iter(part._parameters.values()), None) is None:
                    continue
                if not callable(reset := getattr(part, "reset_parameters", None)):
                    raise InputError(
                        f"{layer.name}: {type(part).__name__} has no reset_parameters, by which fresh "
                        "experts would be drawn; leave out copies=False, or pass expert"
                    )
                reset()
        return module

    return build


def _put(model: nn.Module, pairs: list[tuple[FeedForward, MixtureOfExperts]]) -> None:
    """Put the mixtures in their places, or leave everything as it was."""
    before: list[tuple[nn.Module, str, Any]] = []

    def set_to(holder: nn.Module, name: str, value: Any) -> None:
        before.append((holder, name, getattr(holder, name)))
        _assign(holder, name, value)

    try:
        for layer, mixture in pairs:
            for index, (holder, name) in enumerate(layer.places):
                set_to(holder, name, nn.Identity().train(layer.training) if index else mixture)
            for holder, name, value in layer.settings_off:
                set_to(holder, name, value)
        for encoder in torch_encoders(model):
            set_to(encoder, "use_nested_tensor", False)
    except BaseException:
        for holder, name, value in reversed(before):
            _assign(holder, name, value)
        raise


def _assign(holder: nn.Module, name: str, value: Any) -> None:
    if name in holder._modules and not isinstance(value, nn.Module):
        delattr(holder, name)  # a module's place takes modules only
    setattr(holder, name, value)
