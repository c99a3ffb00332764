"""The model that a run starts from, held against the experiment that is to train it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_moe.config.errors import InputError
from megatron_moe.config.origin import Problem, shown
from megatron_moe.config.schema import Experiment
from megatron_moe.convert.agreement import disagreements
from megatron_moe.convert.huggingface import HuggingFaceWeights
from megatron_moe.convert.models import Model, open_model
from megatron_moe.plan.costs.parameters import padded_vocab_size

KEY = "checkpoint.initialize_from"

_FOLLOWS = {
    "model.kv_channels": "model.hidden_size",
    "model.ffn_hidden_size": "model.hidden_size",
    "model.window_attn_skip_freq": "model.num_layers",
    "moe.moe_layer_freq": "model.num_layers",
}
"""Keys whose value another one decides where they are left out: one line is enough then."""


def open_source(path: str | Path, experiment: Experiment) -> Model:
    """The model at `path`, its weights in the shapes of `experiment`, which computes the same. Raises
    InputError where there is no model."""
    try:
        model = open_model(path)
    except InputError as error:
        raise InputError(*(f"{KEY}: {line}" for line in str(error).splitlines())) from None
    if isinstance(model.weights, HuggingFaceWeights) and model.family is not None:
        # The vocabulary there is not padded yet.
        return replace(model, weights=HuggingFaceWeights(model.folder, model.family, experiment))
    return model


def differences(experiment: Experiment, model: Model) -> Iterator[Problem]:
    """A problem for each key whose value makes the experiment another model than the one that it starts
    from."""
    source = model.experiment
    sections = {"model": source.model.model_dump(), "moe": source.moe and source.moe.model_dump()}
    learned = experiment.model.position_embedding_type == "learned_absolute"
    found = {key: other for key, _, other in disagreements(experiment, sections)}
    for key, other in found.items():
        if key == "model.max_position_embeddings" and not learned:
            # Without a table of them it changes nothing.
            continue
        if _FOLLOWS.get(key) in found:
            continue
        text = f"disagrees with the model that {KEY} names, which has {shown(other)}"
        remedy = f"set it to {shown(other)}" if other is not None else "leave it out"
        if isinstance(other, dict):
            remedy = "describe it as there"
        yield Problem((key, KEY), text, remedy)
    rows = padded_vocab_size(source)
    if "model.vocab_size" in found or isinstance(model.weights, HuggingFaceWeights):
        return
    if padded_vocab_size(experiment) != rows:
        key = "model.make_vocab_size_divisible_by"
        text = f"gives another number of rows to the embedding than the model that {KEY} names has, {rows}"
        yield Problem((key, KEY), text, f"set it to {source.model.make_vocab_size_divisible_by}")
