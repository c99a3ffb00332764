"""Rules about what the model reads."""

from __future__ import annotations

import difflib

from megatron_moe.config.origin import Problem
from megatron_moe.config.rule import Problems
from megatron_moe.config.schema import Experiment
from megatron_moe.config.sources import PARTS, split_of, texts_of, weights_of


def data_said_once(e: Experiment) -> Problems:
    """Token files are either given, or made, or blended of several; mock data and records have none."""
    d = e.data
    said = {"data.path": d.path, "data.prepare.input": d.prepare and d.prepare.input, "data.blend": d.blend}
    there = [key for key, value in said.items() if value is not None]
    if d.kind != "pretraining":
        for key in there:
            remedy = f"set {key.removesuffix('.input')} to null, or data.kind to pretraining"
            yield Problem((key, "data.kind"), "is not read under data.kind", remedy)
    elif not there:
        keys = ("data.path", "data.prepare", "data.blend")
        yield Problem(keys, "is not set, and neither are data.prepare and data.blend", "set one of the three")
    elif len(there) > 1:
        first, *others = there
        text = f"and {' and '.join(others)} are {'both' if len(there) == 2 else 'all'} set"
        yield Problem((first, *others), text, f"keep one of the {'two' if len(there) == 2 else 'three'}")


def source_said_once(e: Experiment) -> Problems:
    """Each source of a blend is token files or text."""
    blend = e.data.blend or {}
    for name, source in blend.items():
        path, prepare = f"data.blend.{name}.path", f"data.blend.{name}.prepare"
        if source.path is not None and source.prepare is not None:
            yield Problem(
                (path, f"{prepare}.input"), f"and {prepare}.input are both set", "keep one of the two"
            )
        elif source.path is None and source.prepare is None:
            close = difflib.get_close_matches(name, [other for other in blend if other != name], n=1)
            advice = "set one of the two" + (f", or did you mean data.blend.{close[0]}?" if close else "")
            yield Problem((path, prepare), f"is not set, and neither is {prepare}", advice)


def weights_or_epochs(e: Experiment) -> Problems:
    """All sources of a blend are weighed in one way."""
    blend = e.data.blend or {}
    with_weight = [name for name, source in blend.items() if source.weight is not None]
    with_epochs = [name for name, source in blend.items() if source.epochs is not None]
    without = [name for name in blend if name not in with_weight]
    if with_weight and with_epochs:
        keys = (f"data.blend.{with_weight[0]}.weight", f"data.blend.{with_epochs[0]}.epochs")
        yield Problem(
            keys, f"and {keys[1]} don't go together in one blend", "use weights only, or epochs only"
        )
    elif with_weight and without:
        keys = (f"data.blend.{without[0]}.weight", f"data.blend.{with_weight[0]}.weight")
        yield Problem(keys, f"is not set, but {keys[1]} is", "give every source a weight, or none")


def sources_are_read(e: Experiment) -> Problems:
    """Each source has a weight in some part, and documents for each part that it has a weight in."""
    for name, source in (e.data.blend or {}).items():
        key, weights = f"data.blend.{name}.weight", weights_of(e.data, source)
        split, of = split_of(e.data, source), "data.split"
        if source.split is not None:
            of = f"data.blend.{name}.split"
        if not any(split):
            yield Problem((of,), "leaves the source no part", "make an entry positive, for example [95, 5]")
        elif all(weight == 0 for weight in weights):
            advice = "make it positive, or take the source out"
            yield Problem((key,), "leaves the source out of every part", advice)
        for part, weight, documents in zip(PARTS, weights, split, strict=True):
            if weight and not documents:
                text = f"gives it a share of the {part} part, where {of} leaves it no documents"
                advice = "set that entry of the weight to 0, or that of the split above 0"
                yield Problem((key, of), text, advice)


def split_has_training_part(e: Experiment) -> Problems:
    """Something is left to train on."""
    if _is_read(e, "training"):
        return
    if e.data.blend:
        text = "has no source with a weight in the training part"
        advice = "make the first entry of a source's split, and its weight, positive"
        yield Problem(("data.blend",), text, advice)
    else:
        advice = "make the first entry positive, for example [95, 5]"
        yield Problem(("data.split",), "leaves nothing to train on", advice)


def evaluation_has_data(e: Experiment) -> Problems:
    """What is evaluated on is held out."""
    if e.training.eval_interval is None or e.data.kind == "mock" or _is_read(e, "validation"):
        return
    if e.data.blend:
        text = "needs a validation part, and no source of data.blend has a weight in one"
        remedy = "give one a split such as [95, 5] or [0, 100], or leave eval_interval out"
        yield Problem(("training.eval_interval", "data.blend"), text, remedy)
    else:
        yield Problem(
            ("training.eval_interval", "data.split"),
            "needs a validation part, and data.split has none",
            "set data.split to [95, 5], or leave it out",
        )


def _is_read(e: Experiment, part: str) -> bool:
    """Whether any documents are for that part."""
    at = PARTS.index(part)
    if e.data.instruction is not None and e.data.instruction.validation is not None:
        return True
    if e.data.blend:
        return any(weights_of(e.data, source)[at] != 0 for source in e.data.blend.values())
    return split_of(e.data)[at] != 0


def ends_of_documents(e: Experiment) -> Problems:
    """What goes by the ends of documents needs some, and a model that can follow."""
    d = e.data
    for name in ("eod_mask_loss", "reset_position_ids", "reset_attention_mask"):
        key = f"data.{name}"
        if not getattr(d, name):
            continue
        if d.kind == "instruction":
            text = "is not read under data.kind, where data.instruction.packing keeps records apart"
            yield Problem((key, "data.kind"), text, "set it to false")
        elif d.kind == "mock":
            text = "needs documents, and data.kind has none"
            yield Problem((key, "data.kind"), text, "set it to false, or data.kind to pretraining")
        for section, prepare in texts_of(d).items():
            if not prepare.append_eod:
                other = f"{section}.append_eod"
                text = f"goes by the ends of documents, which {other} leaves out"
                yield Problem((key, other), text, f"set it to false, or {other} to true")


def positions_can_be_reset(e: Experiment) -> Problems:
    """Positions that begin anew must reach the model."""
    keys = ("data.reset_position_ids", "model.position_embedding_type", "data.reset_attention_mask")
    if not e.data.reset_position_ids:
        return
    if e.model.position_embedding_type == "none":
        yield Problem(keys[:2], f"has no effect with {keys[1]}", "set it to false")
    elif e.model.position_embedding_type == "rope" and not e.data.reset_attention_mask:
        text = (
            f"cannot be computed with {keys[1]} while {keys[2]} is off: Megatron-Core turns queries and keys "
            "by their place in the sample, whatever the position ids are"
        )
        remedy = (
            f"set {keys[2]} too, under which documents see only themselves and rotary positions, "
            "which are relative, come to the same; or use learned_absolute"
        )
        yield Problem(keys, text, remedy)


def attention_can_be_reset(e: Experiment) -> Problems:
    """Only our own attention is told where documents end."""
    keys = ("data.reset_attention_mask", "model.spec")
    if e.data.reset_attention_mask and e.model.spec != "native":
        text = f"does not work with {keys[1]}: its attention is not told where documents end"
        yield Problem(keys, text, f"set {keys[1]} to native, or it to false")
