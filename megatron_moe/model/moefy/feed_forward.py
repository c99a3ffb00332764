"""Feed-forward layers in other people's models, found by their structure."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_moe.model.moe.layer import Mixture

PAIRS = (
    ("gate_proj", "up_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma
    ("gate_up_proj", "down_proj"),  # Phi-3
    ("w1", "w3", "w2"),  # Llama as its authors published it
    ("wi_0", "wi_1", "wo"),  # T5 1.1
    ("fc1", "fc2"),  # CLIP, ViT, Phi
    ("c_fc", "c_proj"),  # GPT-2
    ("fc_in", "fc_out"),  # GPT-J
    ("dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, BLOOM, Falcon
    ("linear_fc1", "linear_fc2"),  # Megatron-Core
    ("linear1", "linear2"),
    ("lin1", "lin2"),  # DistilBERT
    ("wi", "wo"),  # T5
    ("w1", "w2"),
)
"""Names of the matrices in modules that are feed-forward layers: gate and up-projection first, where there
are two, and the one back last."""

TRIPLES = (("fc1", "activation_fn", "fc2"), ("ffn", "activation", "ffn_output"))
"""The same in layers that hold more than that: OPT, BART; ALBERT."""

ACTIVATION_NAMES = ("act_fn", "act", "activation_fn", "activation", "activation_func", "intermediate_act_fn")


@dataclass
class FeedForward:
    """A feed-forward layer [.., h] -> [.., h].

    Attributes:
        name: in the model.
        dense: the layer as one module.
        places: (module, name of a child) for the mixture, and for what becomes the identity behind it.
        matrices: its linear maps, as in `PAIRS`; empty where they are not known.
        is_plain: between them stands nothing but the activation and the dropout behind it.
        activation: between them.
        dropout: probability behind the activation, where the form is known to have it there.
        batch_first: whether the layer gets [b, s, h].
        settings_off: (module, attribute, value) to be set, so that a layer does not pass by its mixture.
        of_megatron: Megatron-Core's, which returns its bias apart.
    """

    name: str
    dense: nn.Module
    places: list[tuple[nn.Module, str]]
    matrices: list[nn.Module] = field(default_factory=list)
    is_plain: bool = True
    activation: Any = None
    dropout: float = 0.0
    batch_first: bool = True
    settings_off: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    of_megatron: bool = False

    @property
    def training(self) -> bool:
        """The mode of its parts."""
        return next((part.training for part in self.matrices), self.dense.training)


def find(model: nn.Module, patterns: list[str] | None) -> list[FeedForward]:
    """All feed-forward layers of a model, in its order; a module that is used in several places, once for
    each.

    Args:
        patterns: of the names of modules (as of files in a shell), which then are taken for feed-forward
            layers whatever is in them; None: those whose structure is known.
    """
    inside = [name for name, module in model.named_modules() if isinstance(module, Mixture)]
    found: list[FeedForward] = []
    for parent_name, parent in model.named_modules(remove_duplicate=False):
        if any(parent_name == name or parent_name.startswith(f"{name}.") for name in inside):
            continue
        for child_name, child in parent.named_children():
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if patterns is not None:
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                    found += _within(name, child) or [_whole(name, parent, child_name, child)]
            elif not any(name.startswith(f"{other.name}.") for other in found):
                found += _known(name, parent, child_name, child)
        if patterns is None and parent is model:
            found = _within("", model) + found
    return found


def _known(name: str, parent: nn.Module, child_name: str, child: nn.Module) -> list[FeedForward]:
    """The feed-forward layer that a module is or that lies among its children, if any."""
    if isinstance(child, Mixture):
        return []
    found = [_whole(name, parent, child_name, child)] if _names(child) else _within(name, child)
    return [layer for layer in found if width_of(layer) is not None]


def _whole(name: str, parent: nn.Module, child_name: str, child: nn.Module) -> FeedForward:
    """A module that is nothing but a feed-forward layer."""
    names = _names(child)
    made = FeedForward(name, child, [(parent, child_name)])
    made.of_megatron = type(child).__module__.startswith("megatron.core") and hasattr(child, "linear_fc1")
    made.batch_first = not made.of_megatron
    if names is not None:
        made.matrices = [getattr(child, part) for part in names]
        made.activation = activation_of(child)
        # Where a dropout stands is not known.
        made.is_plain = not any(part.p for part in child.modules() if isinstance(part, nn.Dropout))
    elif type(child) is nn.Sequential:
        _read_sequential(made, child)
    return made


def _names(module: nn.Module) -> tuple[str, ...] | None:
    """The names of its matrices, where a module has these and nothing else with parameters."""
    with_parameters = {
        name for name, child in module.named_children() if next(child.parameters(), None) is not None
    }
    if next(iter(module._parameters.values()), None) is not None:
        return None
    return next((names for names in PAIRS if with_parameters == set(names)), None)


def activation_of(module: nn.Module) -> Any:
    """What stands between the matrices, by its usual names; None where there is nothing of that name."""
    return next((found for name in ACTIVATION_NAMES if callable(found := getattr(module, name, None))), None)


def _read_sequential(made: FeedForward, parts: nn.Sequential) -> None:
    """Linear, activation, dropout or none, Linear."""
    inside = [part for part in parts if not (isinstance(part, nn.Dropout) and part.p == 0)]
    kinds = [type(part) for part in inside]
    if len(inside) == 4 and kinds[2] is nn.Dropout:
        made.dropout = inside.pop(2).p  # type: ignore[assignment]
    if len(inside) == 3 and isinstance(inside[0], nn.Linear) and isinstance(inside[2], nn.Linear):
        made.matrices, made.activation = [inside[0], inside[2]], inside[1]


class InParts(nn.Module):
    """A feed-forward layer whose parts lie apart in its parent."""

    def __init__(self, first: nn.Module, activation: Any, dropout: nn.Module | None, last: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.last = first, activation, last
        self.dropout = dropout or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[.., h] -> [.., h]."""
        result: Tensor = self.last(self.dropout(self.activation(self.first(x))))
        return result


def _within(name: str, layer: nn.Module) -> list[FeedForward]:
    """A feed-forward layer in the parts of a transformer layer: PyTorch's own, BERT's (ViT, RoBERTa, ..), and
    those with the names of `TRIPLES`."""
    if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        if isinstance(layer.linear1, Mixture):
            return []
        dense = InParts(layer.linear1, layer.activation, layer.dropout, layer.linear2)
        made = _in_parts(name, dense, [(layer, part) for part in ("linear1", "dropout", "linear2")])
        made.dropout, made.batch_first = layer.dropout.p, layer.self_attn.batch_first
        made.settings_off.append((layer, "activation", unchanged))
        if isinstance(layer, nn.TransformerEncoderLayer):
            # Or in evaluation the layer reads the matrices and calls nothing.
            made.settings_off.append((layer, "activation_relu_or_gelu", 0))
        return [made]
    first, last = getattr(layer, "intermediate", None), getattr(layer, "output", None)
    if hasattr(first, "dense") and hasattr(first, "intermediate_act_fn") and hasattr(last, "dense"):
        assert isinstance(first, nn.Module) and isinstance(last, nn.Module)
        dense = InParts(first.dense, first.intermediate_act_fn, None, last.dense)  # type: ignore[arg-type]
        return [_in_parts(name, dense, [(layer, "intermediate"), (last, "dense")])]
    for first_name, activation, last_name in TRIPLES:
        first, last = getattr(layer, first_name, None), getattr(layer, last_name, None)
        between = getattr(layer, activation, None)
        if isinstance(first, nn.Module) and isinstance(last, nn.Module) and callable(between):
            made = _in_parts(
                name, InParts(first, between, None, last), [(layer, first_name), (layer, last_name)]
            )
            made.settings_off.append((layer, activation, unchanged))
            return [made]
    return []


def _in_parts(name: str, dense: InParts, places: list[tuple[nn.Module, str]]) -> FeedForward:
    return FeedForward(name, dense, places, matrices=[dense.first, dense.last], activation=dense.activation)


def unchanged(x: Tensor) -> Tensor:
    """In the place of an activation that is in the experts."""
    return x


def torch_encoders(model: nn.Module) -> Iterator[nn.TransformerEncoder]:
    """Stacks of PyTorch's encoder layers, which may read the matrices of their layers themselves."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            yield module


def matrix_of(linear: nn.Module) -> Tensor | None:
    """[out, in] of a linear map; None where it has none."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    # GPT-2's maps are called so, and hold [in, out].
    return weight.t() if type(linear).__name__ == "Conv1D" else weight


def width_of(layer: FeedForward) -> int | None:
    """h: what the first matrix takes and the last one gives; None where these are not the same."""
    linears = layer.matrices or [part for part in layer.dense.modules() if matrix_of(part) is not None]
    if not linears:
        return None
    first, last = matrix_of(linears[0]), matrix_of(linears[-1])
    if first is None or last is None or first.size(1) != last.size(0):
        return None
    return int(first.size(1))


def on_device(layer: FeedForward) -> torch.nn.Parameter | None:
    """A parameter that says where the layer lies, and in which precision."""
    return next(layer.dense.parameters(), None)
