"""What config.json says of rotary positions, and back.

Transformers 5 writes one section, `rope_parameters`; before it there were `rope_theta` and `rope_scaling`.
Both are read; both are written, so that neither an older reader nor a key left over from an older file says
something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_moe.config.schema import Experiment
from megatron_moe.convert.config_json import ConfigJson

Values = dict[str, Any]

_OF_KIND = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    ),
}
"""What each kind of scaling reads. Others change their frequencies with the length of the sequence."""


def read_rotary(config: ConfigJson, theta: float = 10000.0, default: Values | None = None) -> Values:
    """Keys of `model`.

    Args:
        theta: the family's default base.
        default: the family's default scaling, as in config.json.
    """
    theta, part, kind, scaling = _section(config, theta, default or {})
    values: Values = {"rotary_base": theta}
    if part != 1.0:
        values["rotary_percent"] = part
    if kind == "default":
        return values
    mscales = scaling.pop("mscale", 0.0), scaling.pop("mscale_all_dim", 0.0)
    if all(mscales) and "attention_factor" not in scaling:
        over, under = (_mscale(scaling["factor"], mscale) for mscale in mscales)
        scaling["attention_factor"] = over / under
    return values | {"rotary_scaling": {"kind": kind, **scaling}}


def write_rotary(e: Experiment) -> Values:
    """The other way round."""
    scaling = e.model.rotary_scaling
    if scaling is None:
        return _written(e, {"rope_type": "default"})
    values = scaling.model_dump(exclude_none=True)
    kind = values.pop("kind")
    return _written(e, {"rope_type": kind} | {key: values[key] for key in _OF_KIND[kind] if key in values})


def read_latent_rotary(config: ConfigJson) -> tuple[Values, Values]:
    """Keys of `model`, and of `model.multi_latent_attention`."""
    theta, part, kind, scaling = _section(config, 10000.0, {})
    key = "rope_parameters" if config.get("rope_parameters", default=None) else "rope_scaling"
    if part != 1.0:
        config.refuse(
            "partial_rotary_factor", "does not go with latent attention, of which qk_rope_head_dim is rotated"
        )
    if kind == "default":
        return {"rotary_base": theta}, {}
    if kind != "yarn":
        config.refuse(key, "is of another kind than yarn, the one that latent attention is computed with")
    mscales = scaling.pop("mscale", 0.0), scaling.pop("mscale_all_dim", 0.0)
    if bool(mscales[0]) != bool(mscales[1]):
        config.refuse(
            key, "has one of mscale and mscale_all_dim, which programs read differently: set both or none"
        )
    if "attention_factor" in scaling:
        config.refuse(
            key, "has an attention_factor, which latent attention takes from mscale and mscale_all_dim"
        )
    if not scaling.pop("truncate", True):
        config.refuse(key, "has truncate: false, which latent attention does not compute")
    yarn = {"rotary_scaling_factor": scaling.pop("factor"), **scaling}
    yarn |= dict(zip(("mscale", "mscale_all_dim"), mscales if all(mscales) else (1.0, 0.0), strict=True))
    return {"rotary_base": theta}, {"yarn": yarn}


def write_latent_rotary(e: Experiment) -> Values:
    """The other way round."""
    assert e.model.multi_latent_attention is not None
    yarn = e.model.multi_latent_attention.yarn
    if yarn is None:
        return _written(e, {"rope_type": "default"})
    values: Values = {"rope_type": "yarn", "factor": yarn.rotary_scaling_factor}
    values |= yarn.model_dump(include={"original_max_position_embeddings", "beta_fast", "beta_slow"})
    if yarn.mscale and yarn.mscale_all_dim:
        values |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
    return _written(e, values)


def _section(config: ConfigJson, theta: float, default: Values) -> tuple[float, float, str, Values]:
    """Base, rotated part, kind and what belongs to the kind."""
    new: Mapping[str, Any] = config.get("rope_parameters", default={})
    old: Mapping[str, Any] = config.get("rope_scaling", default={})
    key = "rope_scaling" if old else "rope_parameters"
    scaling = {name: value for name, value in (old or new or default).items() if value is not None}
    theta = config.get("rope_theta", default=theta)
    theta = scaling.pop("rope_theta", new.get("rope_theta") or theta)
    part = config.get("partial_rotary_factor", default=1.0)
    part = scaling.pop("partial_rotary_factor", new.get("partial_rotary_factor") or part)
    older = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", older)
    if not isinstance(kind, str) or kind not in _OF_KIND:
        config.refuse(key, f"is of another kind than {', '.join(_OF_KIND)}: it cannot be computed here")
        return theta, part, "default", {}
    if not all(isinstance(value, int | float) for value in (theta, part, *scaling.values())):
        config.refuse(key, "has something else than numbers")
        return 1.0, 1.0, "default", {}
    if kind in ("llama3", "yarn"):
        longest = config.integer("max_position_embeddings")
        before = config.get("original_max_position_embeddings", default=longest)
        scaling.setdefault("original_max_position_embeddings", before)
        if kind == "yarn" and scaling["original_max_position_embeddings"]:
            scaling.setdefault("factor", longest / scaling["original_max_position_embeddings"])
    if unknown := set(scaling) - set(_OF_KIND[kind]):
        config.refuse(key, f"has {', '.join(sorted(unknown))}, which {kind} does not read")
    if kind != "default" and "factor" not in scaling:
        config.refuse(key, "has no factor")
        scaling["factor"] = 1.0
    return (
        float(theta),
        float(part),
        kind,
        {name: scaling[name] for name in _OF_KIND[kind] if name in scaling},
    )


def _written(e: Experiment, scaling: Values) -> Values:
    positions: Values = {"rope_theta": e.model.rotary_base}
    if e.model.rotary_percent != 1.0:
        positions["partial_rotary_factor"] = e.model.rotary_percent
    is_plain = scaling["rope_type"] == "default"
    return {
        **positions,
        "rope_scaling": None if is_plain else {**scaling, "type": scaling["rope_type"]},
        "rope_parameters": {**positions, **scaling},
    }


def _mscale(factor: float, mscale: float) -> float:
    """YaRN's 0.1 m ln s + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
