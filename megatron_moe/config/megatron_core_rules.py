"""What may stand under `model.megatron_core`: a field of the installed `TransformerConfig`, of its type, that
is not ours to set.

Fields are refused with the reason, whatever their value: the model room sets many of them to what works here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from megatron_moe.config.keys import known_keys, section_in
from megatron_moe.config.origin import Problem
from megatron_moe.config.refused_fields import OTHER_NAMES, refusal
from megatron_moe.config.schema import Experiment
from megatron_moe.config.transformer_fields import NotInstalled, accepts, describe, transformer_fields


def megatron_core_fields(e: Experiment) -> Iterator[Problem]:
    """One problem for each entry that cannot be passed on."""
    if not e.model.megatron_core:
        return
    try:
        known = transformer_fields()
    except NotInstalled:
        text = "cannot be checked, because megatron-core is not installed"
        yield Problem(
            ("model.megatron_core",), text, "pip install 'megatron-core>=0.16.1,<0.20', or leave it out"
        )
        return
    for name, value in e.model.megatron_core.items():
        key = f"model.megatron_core.{name}"
        own, reason = own_key(name), refusal(name, e.model.spec)
        if own is not None:
            yield Problem((key, own), f"is what {own} decides", f"set {own} and leave this out")
        elif name not in known:
            yield Problem((key,), "is no field of the installed TransformerConfig", _meant(name, list(known)))
        elif reason is not None:
            yield Problem((key,), f"cannot be set: {reason}", "leave it out")
        elif not accepts(known[name], value):
            words = describe(known[name])
            if words is None:
                yield Problem((key,), "stands where only a Python object fits", "leave it out")
            else:
                yield Problem((key,), f"must be {words}", "write it so, or leave it out")
        elif name.startswith("moe_") and e.moe is None:
            yield Problem((key, "moe"), "is for experts, and there is no section moe", "leave it out")


def own_key(field: str) -> str | None:
    """The key of the schema that decides this field of Megatron-Core, None if there is none."""
    if field in OTHER_NAMES:
        return OTHER_NAMES[field]
    for key, annotation in known_keys().items():
        if key.rpartition(".")[2] == field and section_in(annotation) is None:
            return key
    return None


def as_unknown_key(field: str) -> str | None:
    """What to say of an unknown key that has the name of a field of Megatron-Core; None if it has not."""
    try:
        known = transformer_fields()
    except NotInstalled:
        return None
    if field not in known:
        return None
    if (own := own_key(field)) is not None:
        return f"did you mean {own}?"
    if (reason := refusal(field, "native")) is not None:
        return f"it is a field of Megatron-Core that cannot be set: {reason}"
    return f"did you mean model.megatron_core.{field}?"


def _meant(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return (
        f"did you mean {close[0]}?"
        if close
        else "look the name up in megatron.core.transformer.TransformerConfig"
    )
